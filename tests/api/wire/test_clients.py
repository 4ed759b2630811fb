"""What clients may do on the wire: pipelines, halves, pieces, waits."""

from __future__ import annotations

import asyncio

import orjson
import pytest

from api.settings import ApiSettings
from tests.api.conftest import Door
from tests.api.wire.conftest import CHAT, PATIENCE, STREAM, Connection, RawEngine, chunked, connected, post

EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"


def named(name: str, *, stream: bool = True) -> bytes:
    """A request that `repeats` can tell from others."""
    return orjson.dumps({"model": "tiny", "messages": [{"role": "user", "content": name}], "stream": stream})


async def repeats(connection: Connection) -> None:
    """Answer with what was asked."""
    request = orjson.loads(connection.body)
    said = request["messages"][-1]["content"].encode()
    if request["stream"]:
        await connection.say(SSE, chunked(b"data: " + said + b"\n\n")[:-5], chunked(DONE))
    else:
        await connection.say(OK % (len(said), said))


def repeated(name: str, *, stream: bool = True) -> bytes:
    return b"data: " + name.encode() + b"\n\n" + DONE if stream else name.encode()


async def test_pipelined_requests_are_answered_in_their_order(door: Door, engine: RawEngine) -> None:
    engine.script = repeats
    large = "x" * 300_000
    turns = [("a", True), ("b", True), ("c", False), (large, True), (large + "y", False), ("d", True)]
    for count in (2, len(turns)):
        async with connected(door) as client:
            client.writer.write(b"".join(post(door, named(name, stream=stream)) for name, stream in turns[:count]))
            for name, stream in turns[:count]:
                said = await client.answer()
                assert (said.status, said.whole, said.body) == (200, True, repeated(name, stream=stream))
            assert (await client.ask(post(door, named("again")))).body == repeated("again")


async def until_running(engine: RawEngine, count: int) -> None:
    async with asyncio.timeout(PATIENCE):
        while engine.posts < count:
            await asyncio.sleep(0.01)


async def begins(connection: Connection) -> None:
    """Say a first word, and then nothing."""
    engine = connection.engine
    engine.running += 1
    try:
        await connection.say(SSE + chunked(EVENT)[:-5])
        await asyncio.sleep(3600)
    finally:
        engine.running -= 1


async def frees_the_engine(engine: RawEngine, seconds: float) -> bool:
    """Whether the engine is told within so many seconds that nobody waits."""
    try:
        async with asyncio.timeout(seconds):
            while engine.running:
                await asyncio.sleep(0.01)
    except TimeoutError:
        return False
    return True


@pytest.fixture
def settings(settings: ApiSettings) -> ApiSettings:
    """With more patience than these tests take."""
    return settings.model_copy(update={"stall_timeout": 60.0, "first_token_timeout": 60.0})


@pytest.mark.parametrize("requests", [1, 2])
async def test_a_client_that_leaves_frees_the_engine(door: Door, engine: RawEngine, requests: int) -> None:
    engine.script = begins
    async with connected(door) as client:
        client.writer.write(post(door, STREAM) * requests)
        await until_running(engine, 1)
        await client.reader.readuntil(EVENT)
    assert await frees_the_engine(engine, 2)


async def test_a_client_that_has_closed_its_sending_side_has_left(door: Door, engine: RawEngine) -> None:
    """A half-closed connection looks like one that is gone, until something is written to it; and the engine's time is
    not spent to find out which of the two it is. nginx does the same with its default settings.
    """
    for body in (STREAM, CHAT):
        engine.posts, engine.script = 0, begins
        async with connected(door) as client:
            client.writer.write(post(door, body))
            await until_running(engine, 1)
            client.writer.write_eof()
            async with asyncio.timeout(PATIENCE):
                left = await client.reader.read()
            assert not left.endswith(b"0\r\n\r\n")
            assert await frees_the_engine(engine, 5)


async def test_a_body_that_is_announced_with_expect_is_asked_for(door: Door, engine: RawEngine) -> None:
    engine.script = repeats
    large = "x" * 3_000_000
    for length in (1, 3):
        async with connected(door) as client:
            for name in ("a", large, "b"):
                request = post(door, b"", b"Content-Length: %d\r\nExpect: 100-continue\r\n" % len(named(name)))
                client.writer.write(request)
                async with asyncio.timeout(PATIENCE):
                    assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
                half = len(named(name)) // length
                client.writer.write(named(name)[:half])
                await asyncio.sleep(0.01)
                said = await client.ask(named(name)[half:])
                assert (said.status, said.whole, said.body) == (200, True, repeated(name))


async def test_and_not_if_it_is_refused(door: Door, engine: RawEngine) -> None:
    request = post(door, b"", b"Content-Length: 3000\r\nExpect: 100-continue\r\n").replace(b"Bearer vk_", b"Bearer no_")
    async with connected(door) as client:
        assert (await client.ask(request)).status == 401
    assert not engine.posts


async def test_who_does_not_wait_for_it_is_answered_without(door: Door, engine: RawEngine) -> None:
    engine.script = repeats
    async with connected(door) as client, asyncio.timeout(PATIENCE):
        client.writer.write(post(door, STREAM, b"Content-Length: %d\r\nExpect: 100-continue\r\n" % len(STREAM)))
        assert (await client.answer()).body == repeated("hi")
        assert (await client.ask(post(door, STREAM))).body == repeated("hi")


async def test_a_request_is_the_same_wherever_it_is_split(door: Door, engine: RawEngine) -> None:
    engine.script = repeats
    body = named("ä€🦀\n\n")
    halves = chunked(body[:50], body[50:], extension=b';a="b;c"', trailers=b"X-T: 1\r\nAuthorization: Bearer no\r\n")
    forms = post(door, body), post(door, halves, b"Transfer-Encoding: chunked\r\nTrailer: X-T\r\n")
    sent = None
    async with connected(door) as client:
        for whole in forms:
            for cut in range(1, len(whole)):
                client.writer.write(whole[:cut])
                for _ in range(3):
                    await asyncio.sleep(0)
                said = await client.ask(whole[cut:])
                assert (said.status, said.whole, said.body) == (200, True, repeated("ä€🦀\n\n")), (cut, whole[:cut])
                sent = sent or engine.bodies[0]
                assert engine.bodies[-1] == sent
        for whole in forms:  # byte by byte
            for byte in whole:
                client.writer.write(bytes([byte]))
                for _ in range(3):
                    await asyncio.sleep(0)
            assert (await client.answer()).body == repeated("ä€🦀\n\n")
    assert engine.posts == len(engine.bodies) == sum(map(len, forms))


async def old(door: Door, engine: RawEngine, body: bytes) -> tuple[bytes, bytes]:
    """Head and the rest of what a client of HTTP/1.0 gets until the connection ends."""
    engine.script = repeats
    async with connected(door) as client, asyncio.timeout(PATIENCE):
        client.writer.write(post(door, body, version=b"1.0"))
        head, _, rest = (await client.reader.read(-1)).partition(b"\r\n\r\n")
        return head, rest


async def test_a_client_of_http_1_0_gets_its_answer_and_the_connection_ends(door: Door, engine: RawEngine) -> None:
    head, rest = await old(door, engine, named("a", stream=False))
    assert b" 200 OK\r\n" in head
    assert b"\r\ncontent-length: 1\r\n" in head + b"\r\n"
    assert b"\r\nconnection: close" in head
    assert rest == b"a"


async def test_and_never_chunks(door: Door, engine: RawEngine) -> None:
    """Not sending a stream at all would do, too: without chunks its end looks like a break."""
    head, rest = await old(door, engine, named("a"))
    assert b"transfer-encoding" not in head
    assert b" 200 OK\r\n" not in head or rest == repeated("a")
