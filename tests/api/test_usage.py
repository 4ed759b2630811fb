"""The usage filter: the same bytes at every split, the usage event hidden only when it was not asked for."""

from __future__ import annotations

import pytest

from api.usage import Usage, UsageFilter
from engine.client import Endpoint

TEXT = b'data: {"choices":[{"delta":{"content":"say \\"choices\\":[] aloud"}}]}\n\n'
USAGE = b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM = TEXT + USAGE + DONE


@pytest.mark.parametrize("hide", [True, False])
def test_every_split_gives_the_same_bytes_and_counts(hide: bool) -> None:
    for cut in range(len(STREAM) + 1):
        usage = Usage()
        sift = UsageFilter(Endpoint.CHAT, usage, hide=hide)
        out = sift.feed(STREAM[:cut]) + sift.feed(STREAM[cut:]) + sift.rest()
        assert out == (TEXT + DONE if hide else STREAM), cut
        assert (usage.input_tokens, usage.output_tokens) == (7, 3)


def test_an_unfinished_event_is_not_lost() -> None:
    sift = UsageFilter(Endpoint.CHAT, Usage(), hide=True)
    assert sift.feed(TEXT + b"data: {") == TEXT
    assert sift.rest() == b"data: {"


def test_an_endless_event_is_not_held_for_ever() -> None:
    sift = UsageFilter(Endpoint.CHAT, Usage(), hide=True)
    data = b"data: " + b"x" * 300_000
    assert sift.feed(data) == data


def test_responses_report_usage_in_their_last_event() -> None:
    usage = Usage()
    event = b'event: response.completed\ndata: {"response":{"usage":{"input_tokens":4,"output_tokens":9}}}\n\n'
    assert UsageFilter(Endpoint.RESPONSES, usage, hide=False).feed(event) == event
    assert (usage.input_tokens, usage.output_tokens) == (4, 9)
