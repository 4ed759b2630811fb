"""Properties of the body reader and of what it hands on: any chunks, any bytes, any depth."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from api import shape
from api.asgi import Message, Receive, read_body
from api.errors import ApiError
from api.request_caps import MAX_DEPTH

LIMIT = 64
CHUNKS = st.lists(st.binary(max_size=40), max_size=8)
WAITS = 60.0

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""How fast this machine is at the moment is not what is tested."""


def receiver(messages: Sequence[Message]) -> Receive:
    """What an ASGI server gives; asking for more than there is never returns."""
    left = list(messages)

    async def receive() -> Message:
        if left:
            return left.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    return receive


def requests(chunks: Sequence[bytes], *, last_is_empty: bool = False) -> list[Message]:
    """The messages of a body in these chunks."""
    parts = [*chunks, b""] if last_is_empty or not chunks else list(chunks)
    return [
        {"type": "http.request", "body": part, "more_body": number < len(parts) - 1}
        for number, part in enumerate(parts)
    ]


def run(messages: Sequence[Message], limit: int = LIMIT, seconds: float = WAITS) -> bytes | ApiError:
    """The body, or the refusal."""

    async def read() -> bytes | ApiError:
        try:
            return await read_body(receiver(messages), limit, seconds)
        except ApiError as error:
            return error

    return asyncio.run(read())


@patient
@given(chunks=CHUNKS, last_is_empty=st.booleans())
@example(chunks=[b"x" * LIMIT], last_is_empty=True)
@example(chunks=[b"x" * LIMIT, b"x"], last_is_empty=False)
def test_chunks_make_no_difference(chunks: list[bytes], last_is_empty: bool) -> None:
    whole = b"".join(chunks)
    read = run(requests(chunks, last_is_empty=last_is_empty))
    if len(whole) <= LIMIT:
        assert read == whole
    else:
        assert isinstance(read, ApiError)
        assert (read.status, read.code) == (413, "request_too_large")
        assert not read.headers  # closing would reset the connection before most clients read the answer


@pytest.mark.parametrize("size", [LIMIT - 1, LIMIT, LIMIT + 1])
@pytest.mark.parametrize("step", [1, 7, LIMIT + 1])
def test_the_limit_is_exact(size: int, step: int) -> None:
    body = b"x" * size
    read = run(requests([body[start : start + step] for start in range(0, size, step)]))
    assert (read == body) if size <= LIMIT else (isinstance(read, ApiError) and read.status == 413)


@patient
@given(chunks=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=8))
def test_nothing_is_read_beyond_the_limit(chunks: list[bytes]) -> None:
    asked = 0
    given_chunks = receiver(requests(chunks))

    async def receive() -> Message:
        nonlocal asked
        asked += 1
        return await given_chunks()

    async def read() -> None:
        with suppress(ApiError):
            await read_body(receive, LIMIT, WAITS)

    asyncio.run(read())
    sizes = [sum(map(len, chunks[: count + 1])) for count in range(len(chunks))]
    assert asked == next((count + 1 for count, size in enumerate(sizes) if size > LIMIT), len(chunks))


@patient
@given(chunks=CHUNKS.filter(lambda chunks: sum(map(len, chunks)) <= LIMIT), data=st.data())
def test_a_client_that_leaves_is_no_body(chunks: list[bytes], data: st.DataObject) -> None:
    whole = requests(chunks, last_is_empty=True)
    cut = data.draw(st.integers(0, len(whole) - 1))
    read = run([*whole[:cut], {"type": "http.disconnect"}])
    assert isinstance(read, ApiError)
    assert read.status == 400


@patient
@given(chunks=CHUNKS.filter(lambda chunks: sum(map(len, chunks)) <= LIMIT))
def test_a_body_that_does_not_end_is_not_waited_for(chunks: list[bytes]) -> None:
    endless = requests(chunks, last_is_empty=True)[:-1]
    read = run(endless, seconds=0.001)
    assert isinstance(read, ApiError)
    assert (read.status, read.code) == (408, "request_timeout")
    assert (b"connection", b"close") in read.headers


@pytest.mark.parametrize("message", [{"type": "http.request"}, {"type": "http.request", "body": b""}])
def test_asgi_allows_to_leave_the_defaults_out(message: Message) -> None:
    assert run([message]) == b""


def parsed(body: bytes) -> dict[str, object] | ApiError:
    try:
        return shape.parse(body)
    except ApiError as error:
        return error


@patient
@given(st.binary(max_size=200))
@example(b"\xff\xfe{\x00}\x00")
@example(b"\xef\xbb\xbf{}")
@example(b"")
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b'{"a": NaN}')
@example(b'{"a": Infinity}')
@example(b'{"a": 1e999}')
@example(b'{"a": "\\ud800"}')
@example(b'{"\\udfff": 1}')
@example(b'{"a": "\xed\xa0\x80"}')
@example(b"9" * 5000)
def test_any_bytes_are_an_object_or_a_refusal(body: bytes) -> None:
    content = parsed(body)
    if isinstance(content, ApiError):
        assert (content.status, content.code) == (400, "invalid_json")
        orjson.loads(content.body())  # and that is fit to be sent
    else:
        assert isinstance(content, dict)
        orjson.dumps(content)  # and that is fit to go to the engine


LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.floats(allow_nan=False)
JSON = st.recursive(
    LEAVES.filter(lambda leaf: leaf not in (float("inf"), float("-inf"))),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=30,
)  # fmt: skip


@patient
@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_objects_are_read_as_they_are(content: dict[str, object]) -> None:
    assert parsed(orjson.dumps(content)) == content


@patient
@given(JSON.filter(lambda content: not isinstance(content, dict)))
def test_only_objects_are_requests(content: object) -> None:
    assert isinstance(parsed(orjson.dumps(content)), ApiError)


def nested(depth: int, kinds: Sequence[bool], siblings: int) -> bytes:
    """JSON of that depth: objects where `kinds` (in turns) says so, arrays elsewhere, with shallow siblings."""
    inner = b"0"
    for level in reversed(range(depth)):
        shallow = b"[]," * siblings
        if level == 0 or kinds[level % len(kinds)]:
            inner = b'{"s":[%s0],"k":%s}' % (shallow, inner) if level < depth - 2 else b'{"k":%s}' % inner
        else:
            inner = b"[%s%s]" % (shallow if level < depth - 1 else b"", inner)
    return inner


@patient
@given(depth=st.integers(1, 100), kinds=st.lists(st.booleans(), min_size=1, max_size=5), siblings=st.integers(0, 3))
@example(depth=MAX_DEPTH, kinds=[True], siblings=0)
@example(depth=MAX_DEPTH, kinds=[False], siblings=3)
@example(depth=MAX_DEPTH + 1, kinds=[True], siblings=0)
@example(depth=MAX_DEPTH + 1, kinds=[False], siblings=3)
def test_the_depth_is_exact(depth: int, kinds: list[bool], siblings: int) -> None:
    content = parsed(nested(depth, kinds, siblings))
    assert isinstance(content, dict) == (depth <= 32)
