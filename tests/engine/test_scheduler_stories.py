"""velocity's scheduler on the installed vLLM's own, before a virtual worker: time is virtual, so it may be judged."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of them. A wrong, lost or repeated token ends the process with an error."""
    command = [sys.executable, "-m", "tests.engine.scheduler_stories", str(tmp_path_factory.mktemp("model"))]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert told.returncode == 0, told.stderr[-4000:]
    found: dict[str, dict[str, Any]] = json.loads(told.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", ["no blocks, two steps deep", "no blocks, step by step", "no seats", "clients leave"])
def test_tokens_are_the_same_however_often_requests_are_parked_and_preempted(
    stories: dict[str, dict[str, Any]], name: str
) -> None:
    story = stories[name]
    assert story["preemptions"] > 0
    assert story["parked"] > 100
    assert story["bulk"] > 1000
    assert story["people"] > 10
    assert not story["unfinished"]


def test_people_hardly_notice_bulk_and_bulk_gets_the_rest(stories: dict[str, dict[str, Any]]) -> None:
    assert stories["half"]["ttft"] <= 2.0
    assert stories["half"]["itl"] <= 1.25
    assert stories["half"]["harvest"] >= 0.48
    assert stories["strict"]["ttft"] <= 1.5
    assert stories["strict"]["itl"] <= 1.1
    assert stories["rarely"]["harvest"] >= 0.85


def test_a_person_who_comes_after_a_long_time_finds_a_model_that_knows_small_steps(
    stories: dict[str, dict[str, Any]],
) -> None:
    assert stories["rarely"]["itl"] <= 1.25


def test_who_asks_again_at_once_does_not_find_a_long_step_of_bulk(stories: dict[str, dict[str, Any]]) -> None:
    assert stories["again"]["ttft"] <= 1.5
    assert stories["again"]["itl"] <= 1.25
    assert stories["again"]["longest_pause"] <= 30


def test_bulk_goes_on_while_somebody_always_reads(stories: dict[str, dict[str, Any]]) -> None:
    assert stories["always"]["harvest"] >= 0.15
    assert stories["always"]["longest_pause"] <= 30
    assert stories["always"]["itl50"] <= 1.25  # one gap in twenty is another reader's prompt here
