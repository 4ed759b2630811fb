"""However the engine's bytes are split on their way, and framed, the client's are the same."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.api.conftest import Door
from tests.api.wire.conftest import CHAT, STREAM, STREAM_AND_USAGE, Client, RawEngine, chunked, connected, post

EVENTS = [
    'data: {"choices":[{"index":0,"delta":{"role":"assistant"},"finish_reason":null}]}\n\n',
    'data: {"choices":[{"index":0,"delta":{"content":"ä€🦀"}}]}\n\n',
    'data: {"choices":[{"index":0,"delta":{"content":"\\n\\ndata: [DONE]\\n\\n{\\"choices\\":[]}"}}]}\n\n',
    ": a comment\n\n",
    'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n',
    'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n',
    "data: [DONE]\n\n",
]
PARTS = [event.encode() for event in EVENTS]
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
JSON = '{"choices":[{"message":{"content":"ä€🦀\\n\\n"}}],"usage":{"prompt_tokens":7,"completion_tokens":3}}'.encode()


def framed(head: bytes, parts: list[bytes]) -> dict[str, bytes]:
    """The same answer in every way that HTTP/1.1 knows."""
    whole = b"".join(parts)
    return {
        "chunks": head + b"transfer-encoding: chunked\r\n\r\n" + chunked(*parts),
        "other chunks": head + b"Transfer-Encoding: Chunked\r\nTrailer: x-t\r\n\r\n"
        + chunked(whole[:7], whole[7:], extension=b';n=v;q="a;b"', trailers=b"x-t: 1\r\nx-u: 0\r\n"),
        "length": head + b"content-length: %d\r\n\r\n" % len(whole) + whole,
        "last": head + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(whole) + whole,
        "to the end": head + b"connection: close\r\n\r\n" + whole,
    }  # fmt: skip


STREAMS = framed(SSE, PARTS)
WHOLE = framed(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n", [JSON[:20], JSON[20:]])
FRAMES = ["chunks", "other chunks", "length", "last", "to the end"]


def asked(shown: bool) -> tuple[bytes, bytes]:
    """A request for a stream, and what it gets."""
    return (STREAM_AND_USAGE, b"".join(PARTS)) if shown else (STREAM, b"".join([*PARTS[:-2], PARTS[-1]]))


async def check(client: Client, engine: RawEngine, request: bytes, pieces: list[bytes], frame: str) -> bytes:
    """What the client gets when the engine says these pieces."""
    engine.says(*pieces, end="close" if frame in {"last", "to the end"} else "")
    said = await client.ask(request)
    assert (said.status, said.whole) == (200, True), pieces
    return said.body


@pytest.mark.parametrize("frame", FRAMES)
async def test_a_stream_is_the_same_wherever_it_is_split(door: Door, engine: RawEngine, frame: str) -> None:
    data = STREAMS[frame]
    async with connected(door) as client:
        for cut in range(1, len(data)):
            body, expected = asked(shown=cut % 2 == (frame == "chunks"))
            got = await check(client, engine, post(door, body), [data[:cut], data[cut:]], frame)
            assert got == expected, (cut, data[:cut])
    assert engine.posts == len(data) - 1


@pytest.mark.parametrize("frame", FRAMES)
async def test_so_is_an_answer_that_is_no_stream(door: Door, engine: RawEngine, frame: str) -> None:
    data = WHOLE[frame]
    async with connected(door) as client:
        for cut in range(1, len(data)):
            assert await check(client, engine, post(door, CHAT), [data[:cut], data[cut:]], frame) == JSON, cut


def pieces(data: bytes, cuts: set[int]) -> Iterator[bytes]:
    """`data`, cut there."""
    edges = [0, *sorted(cut for cut in cuts if 0 < cut < len(data)), len(data)]
    return (data[start:stop] for start, stop in pairwise(edges))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frame=st.sampled_from(FRAMES), shown=st.booleans(), cuts=st.sets(st.integers(1, 900), max_size=12))
@example(frame="chunks", shown=False, cuts=set(range(900)))
@example(frame="other chunks", shown=True, cuts=set(range(900)))
@example(frame="to the end", shown=False, cuts=set(range(900)))
async def test_and_in_how_many_pieces(door: Door, engine: RawEngine, frame: str, shown: bool, cuts: set[int]) -> None:
    body, expected = asked(shown)
    async with connected(door) as client:
        assert await check(client, engine, post(door, body), list(pieces(STREAMS[frame], cuts)), frame) == expected


TROUBLE = b'data: {"error": {"message": "it broke", "type": "InternalServerError", "code": 500}}\n\n'


async def test_an_error_event_is_no_clean_end_wherever_it_is_split(door: Door, engine: RawEngine) -> None:
    """vLLM ends a stream that failed as if nothing had happened."""
    start = SSE + b"transfer-encoding: chunked\r\n\r\n"
    stream = chunked(PARTS[1], TROUBLE, PARTS[-1])
    untold, clean = [], []
    for cut in range(stream.index(TROUBLE), stream.index(TROUBLE) + len(TROUBLE)):
        async with connected(door) as client:
            engine.says(start, stream[:cut], stream[cut:])
            said = await client.ask(post(door, STREAM))
        if TROUBLE not in said.body:
            untold.append(cut)
        if said.whole:
            clean.append(cut)
    assert (untold, clean) == ([], [])
