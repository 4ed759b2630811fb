"""Engines that answer early, oddly, or not to the end: never a cut answer that looks whole, never a second POST."""

from __future__ import annotations

import asyncio

import orjson
import pytest

from tests.api.conftest import Door
from tests.api.wire.conftest import CHAT, STREAM, Client, Connection, RawEngine, Said, chunked, connected, post

EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
CHUNKS = SSE + b"transfer-encoding: chunked\r\n\r\n"
STREAMED = CHUNKS + chunked(EVENT, DONE)
TO_THE_END = SSE + b"\r\n"
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
REFUSAL = b'{"error":{"message":"no","type":"BadRequestError","param":null,"code":400}}'
LARGE = b'{"model":"tiny","messages":[{"role":"user","content":"%s"}],"stream":true}' % (b"x" * 6_000_000)


def counted(status: bytes, body: bytes) -> bytes:
    """An answer with its length."""
    return b"HTTP/1.1 %s X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body)


async def asked(door: Door, body: bytes) -> Said:
    """What a client of its own gets."""
    async with connected(door) as client:
        return await client.ask(post(door, body))


async def good(door: Door, engine: RawEngine, client: Client) -> bool:
    """Whether the client's next stream comes whole."""
    engine.says(STREAMED)
    said = await client.ask(post(door, STREAM))
    return (said.status, said.whole, said.body) == (200, True, EVENT + DONE)


INTERIM = {
    "100": b"HTTP/1.1 100 Continue\r\n\r\n",
    "103 with headers": b"HTTP/1.1 103 Early Hints\r\nlink: </a>; rel=preload\r\ncontent-length: 3\r\n\r\n",
    "several": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n",
}


async def test_interim_answers_are_kept_from_the_client(door: Door, engine: RawEngine) -> None:
    async with connected(door) as client:
        for interim in INTERIM.values():
            for cut in range(1, len(interim)):
                engine.says(interim[:cut], interim[cut:] + STREAMED)
                said = await client.ask(post(door, STREAM))
                assert (said.status, said.whole, said.body) == (200, True, EVENT + DONE)
                assert b"link" not in said.head
                engine.says(interim[:cut], interim[cut:] + OK)
                assert (await client.ask(post(door, CHAT))).body == b"{}"
    assert len(engine.connections) <= 3  # it is kept alive; the other ones are the watch's


@pytest.mark.parametrize("end", ["close", ""])
async def test_an_answer_before_the_body_was_read_is_the_answer(door: Door, engine: RawEngine, end: str) -> None:
    for status in (400, 413, 503):
        engine.early, engine.posts = True, 0
        engine.says(counted(b"%d" % status, REFUSAL), end=end)
        for body in (STREAM, LARGE):
            said = await asked(door, body)
            assert said.status == status
            assert orjson.loads(said.body)["error"]["message"] == "no"
        assert engine.posts == 2
        engine.early = False
        async with connected(door) as client:
            assert await good(door, engine, client)


async def test_so_is_one_of_an_engine_that_reads_no_more(door: Door, engine: RawEngine) -> None:
    async def script(connection: Connection) -> None:
        connection.transport.pause_reading()
        connection.transport.write(counted(b"400", REFUSAL))
        await asyncio.sleep(60)

    engine.early, engine.script = True, script
    assert (await asked(door, LARGE)).status == 400


LOST_BEFORE = {
    "nothing": b"", "half a status line": b"HTTP/1.1 20", "half a head": SSE, "an interim answer": INTERIM["100"],
    "half an answer": OK[:-1], "half a chunk": CHUNKS + b"5\r\nab", "no last chunk": CHUNKS + b"2\r\n{}\r\n",
}  # fmt: skip


@pytest.mark.parametrize("end", ["close", "reset"])
async def test_an_engine_that_is_lost_before_the_answer_is_502_and_not_asked_again(
    door: Door, engine: RawEngine, end: str
) -> None:
    for name, data in LOST_BEFORE.items():
        for body in (CHAT, STREAM)[: 1 + (b"\r\n\r\n" not in data)]:
            engine.posts = 0
            engine.says(data, end=end)
            async with connected(door) as client:
                said = await client.ask(post(door, body))
                assert (said.status, said.whole) == (502, True), name
                assert orjson.loads(said.body)["error"]["code"] == "engine_lost"
                assert engine.posts == 1, name
                assert await good(door, engine, client), name


LOST_AFTER = {
    "the head": b"", "an event": b"%x\r\n%s\r\n" % (len(EVENT), EVENT), "half an event": b"5\r\ndata:\r\n",
    "half a chunk": b"%x\r\n%s" % (len(EVENT), EVENT[:9]), "a chunk's size": b"f",
    "all but the last chunk": b"%x\r\n%s\r\n" % (len(DONE), DONE), "half of the last chunk": b"0\r\n",
}  # fmt: skip


@pytest.mark.parametrize("end", ["close", "reset"])
async def test_an_engine_that_is_lost_in_mid_stream_is_told_of_and_no_clean_end(
    door: Door, engine: RawEngine, end: str
) -> None:
    for name, data in LOST_AFTER.items():
        engine.posts = 0
        engine.says(CHUNKS + chunked(EVENT)[:-5], data, end=end)
        said = await asked(door, STREAM)
        assert (said.status, said.whole) == (200, False), name
        assert said.body.startswith(EVENT), name
        error = said.body[said.body.rindex(b"data: {") + 6 :]
        assert orjson.loads(error)["error"]["code"] == "engine_lost", name
        assert engine.posts == 1, name


async def test_so_is_one_whose_length_is_short_or_whose_end_is_a_reset(door: Door, engine: RawEngine) -> None:
    for head, end in ((TO_THE_END, "reset"), (SSE + b"content-length: 900\r\n\r\n", "close")):
        engine.says(head, EVENT, end=end)
        said = await asked(door, STREAM)
        assert (said.whole, b'"engine_lost"' in said.body) == (False, True)


GARBAGE = {
    "no HTTP": b"this is not http\r\n\r\n", "TLS": b"\x15\x03\x01\x00\x02\x02\x46", "zeros": bytes(100),
    "another protocol": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    "a length and chunks": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}",
    "a status of two digits": b"HTTP/1.1 20 OK\r\n\r\n", "HTTP/9": b"HTTP/9.9 200 OK\r\ncontent-length: 2\r\n\r\n{}",
}  # fmt: skip


async def test_garbage_is_502(door: Door, engine: RawEngine) -> None:
    for name, garbage in GARBAGE.items():
        for body in (CHAT, STREAM):
            engine.posts = 0
            engine.says(garbage)
            async with connected(door) as client:
                said = await client.ask(post(door, body))
                assert (said.status, said.whole) == (502, True), name
                assert await good(door, engine, client)
            assert engine.posts == 2


async def test_garbage_in_mid_stream_is_no_clean_end(door: Door, engine: RawEngine) -> None:
    for garbage in (b"zz\r\n", b"-1\r\n", b"ffffffffffffffff1\r\n", b"5\r\nabcdefgh\r\n"):
        engine.says(CHUNKS + chunked(EVENT)[:-5], garbage)
        said = await asked(door, STREAM)
        assert (said.status, said.whole) == (200, False), garbage
        assert said.body.startswith(EVENT)
        assert b'"engine_lost"' in said.body


LENGTH = SSE + b"content-length: %d\r\n\r\n" % len(EVENT + DONE) + EVENT + DONE
MORE = {"garbage": b"more than it said", "another answer": OK, "line ends": b"\r\n\r\n"}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("more", MORE)
async def test_what_comes_after_an_answer_is_nobodys(door: Door, engine: RawEngine, more: str, stream: bool) -> None:
    """In the same packet as its end, or in a later one: the answer is whole without it, or broken off."""
    request = post(door, STREAM if stream else CHAT)
    for frame in (LENGTH, STREAMED):
        for cut in (len(frame), len(frame) - len(DONE) - 8, 0):
            async with connected(door) as client:
                engine.says(frame[:cut], frame[cut:] + MORE[more])
                said = await client.ask(request)
                assert not said.whole or said.status == 502 or said.body == EVENT + DONE, cut
            async with connected(door) as client:
                assert await good(door, engine, client)


async def test_a_connection_that_the_engine_closed_while_it_was_idle_is_not_used(door: Door, engine: RawEngine) -> None:
    async with connected(door) as client:
        for count in range(1, 6):
            assert await good(door, engine, client)
            assert engine.posts == count
            for connection in engine.connections:
                connection.transport.close()
            await asyncio.sleep(0.01)


async def test_one_that_is_closed_when_the_next_request_has_come_is_502_and_one_post(
    door: Door, engine: RawEngine
) -> None:
    """The engine may have begun with it: whoever asked decides whether to ask again."""
    async with connected(door) as client:
        assert await good(door, engine, client)
        engine.says(end="close")
        said = await client.ask(post(door, STREAM))
        assert (said.status, engine.posts) == (502, 2)
        assert await good(door, engine, client)
    assert engine.posts == 3
