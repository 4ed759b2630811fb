"""The engine connection: any chunking, any break, bounded memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from engine.client import Endpoint, EngineClient
from engine.connection import HIGH_WATER
from engine.errors import EngineLost, EngineProtocolError, EngineTimeout, EngineUnreachable, SettingsError
from engine.ports import free_port

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def raw_server(handler: Handler) -> AsyncIterator[str]:
    writers: list[asyncio.StreamWriter] = []

    async def tracked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await handler(reader, writer)

    server = await asyncio.start_server(tracked, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)


def answering(*pieces: bytes, close: bool = True) -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if close:
            writer.close()

    return handler


ANSWER = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"


async def test_every_split_of_the_engines_bytes_gives_the_same_body() -> None:
    for cut in range(1, len(ANSWER)):
        async with raw_server(answering(ANSWER[:cut], ANSWER[cut:])) as url, EngineClient(url) as client:
            answer = await client.call(Endpoint.CHAT, b"{}", timeout=5)
        assert (answer.status, answer.body) == (200, b"hello world"), cut


@pytest.mark.parametrize("patience", [0, 1, 100])
async def test_every_split_is_poured_as_the_same_body_however_often_it_is_stopped(patience: int) -> None:
    for cut in range(1, len(ANSWER)):
        async with raw_server(answering(ANSWER[:cut], ANSWER[cut:])) as url, EngineClient(url) as client:
            poured: list[bytes] = []

            def take(data: bytes, poured: list[bytes] = poured) -> bool:
                poured.append(data)
                return len(poured) % (patience + 1) > 0

            async with asyncio.timeout(5), client.exchange(Endpoint.CHAT, b"{}") as up:
                assert (await up.head()).status == 200
                while not await up.pour(take):
                    await asyncio.sleep(0)
        assert b"".join(poured) == b"hello world", cut


async def test_what_is_poured_into_someone_slow_is_not_read_from_the_engine() -> None:
    piece = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    sent = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while sent < 1000:
            writer.write(piece)
            await writer.drain()
            sent += 1
        writer.write(b"0\r\n\r\n")

    taken = 0

    def take(data: bytes) -> bool:
        nonlocal taken
        taken += len(data)
        return False

    async with raw_server(handler) as url, EngineClient(url) as client, client.exchange(Endpoint.CHAT, b"{}") as up:
        await up.head()
        assert not await up.pour(take)
        await asyncio.sleep(0.3)
        assert taken <= 2 * HIGH_WATER
        assert sent < 500  # what the kernel holds for both sides, and no more
        async with asyncio.timeout(60):
            while not await up.pour(take):
                pass
    assert taken == 1000 * 0x10000


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", EngineLost),
        (b"HTTP/1.1 200 OK\r\ncontent-le", EngineLost),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf", EngineLost),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhel", EngineLost),
        (b"this is not http\r\n\r\n", EngineProtocolError),
    ],
)
async def test_a_broken_answer_is_an_error_not_an_end(data: bytes, error: type[Exception]) -> None:
    async with raw_server(answering(data)) as url, EngineClient(url) as client:
        with pytest.raises(error):
            await client.call(Endpoint.CHAT, b"{}", timeout=5)


async def test_a_body_without_length_ends_with_the_connection() -> None:
    async with raw_server(answering(b"HTTP/1.1 200 OK\r\n\r\nto the end")) as url, EngineClient(url) as client:
        assert (await client.call(Endpoint.CHAT, b"{}", timeout=5)).body == b"to the end"


async def test_interim_answers_are_skipped() -> None:
    data = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    async with raw_server(answering(data)) as url, EngineClient(url) as client:
        assert (await client.call(Endpoint.CHAT, b"{}", timeout=5)).body == b"ok"


async def test_nobody_listening_is_unreachable() -> None:
    async with EngineClient(f"http://127.0.0.1:{free_port()}") as client:
        with pytest.raises(EngineUnreachable):
            await client.call(Endpoint.CHAT, b"{}", timeout=5)
        assert not await client.healthy()


async def test_an_answer_that_does_not_come_is_a_timeout() -> None:
    async with raw_server(answering(b"", close=False)) as url, EngineClient(url) as client:
        with pytest.raises(EngineTimeout):
            await client.call(Endpoint.CHAT, b"{}", timeout=0.05)


async def test_connections_are_kept_alive_and_reused() -> None:
    connections = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while await reader.readuntil(b"\r\n\r\n{}"):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    async with raw_server(handler) as url, EngineClient(url) as client:
        for _ in range(5):
            await client.call(Endpoint.CHAT, b"{}", timeout=5)
        assert connections == 1


async def test_an_unread_answer_is_never_the_next_requests() -> None:
    """A client that leaves while its answer is complete but unread must not leave it behind for somebody else."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            name = await reader.readexactly(1)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\nanswer to " + name)

    async with raw_server(handler) as url, EngineClient(url) as client:
        async with client.exchange(Endpoint.CHAT, b"A") as up:
            await up.head()
            await asyncio.sleep(0.1)  # the whole answer has arrived
        assert (await client.call(Endpoint.CHAT, b"B", timeout=5)).body == b"answer to B"


async def test_a_slow_reader_pauses_the_engine() -> None:
    size = 64 * HIGH_WATER
    sent = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        block = b"x" * 65536
        for _ in range(size // len(block)):
            writer.write(block)
            await writer.drain()
            sent += len(block)

    async with raw_server(handler) as url, EngineClient(url) as client, client.exchange(Endpoint.CHAT, b"{}") as up:
        await up.head()
        await asyncio.sleep(0.3)
        assert sent < size // 2, "the engine was read although nobody took the bytes"
        received = 0
        while data := await up.chunk():
            received += len(data)
            assert len(data) <= HIGH_WATER + 512 * 1024
        assert received == size


async def test_leaving_early_closes_the_connection() -> None:
    closed = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n{}")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
        assert await reader.read() == b""
        closed.set()

    async with raw_server(handler) as url, EngineClient(url) as client:
        async with client.exchange(Endpoint.CHAT, b"{}") as up:
            await up.chunk()
        await asyncio.wait_for(closed.wait(), 5)


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(SettingsError):
        EngineClient("localhost:8000")
