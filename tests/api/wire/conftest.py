"""Raw bytes on both sides of the door: an engine and clients whose every byte, and pause, a test decides."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests import fake_engine
from tests.api.conftest import Door
from tests.fake_engine import FakeEngine

PATIENCE = 30.0
CHAT = b'{"model":"tiny","messages":[{"role":"user","content":"hi"}]}'
STREAM = b'{"model":"tiny","messages":[{"role":"user","content":"hi"}],"stream":true}'
STREAM_AND_USAGE = STREAM[:-1] + b',"stream_options":{"include_usage":true}}'


class Connection(fake_engine.Connection):
    """One connection to the engine; what is no generation request is answered as the fake engine does."""

    engine: RawEngine

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.engine.connections.append(self)

    def on_headers_complete(self) -> None:
        if self.engine.early and self.url.startswith(b"/v1/chat"):
            self.begin()

    def on_message_complete(self) -> None:
        if not self.url.startswith(b"/v1/chat"):
            super().on_message_complete()
        elif not self.engine.early:
            self.begin()

    def begin(self) -> None:
        """Count the request, and do what the test says."""
        self.engine.posts += 1
        self.engine.bodies.append(self.body)
        self.task = asyncio.get_running_loop().create_task(self.engine.script(self))

    async def say(self, *pieces: bytes) -> None:
        """Each as a packet of its own, which is read before the next one is sent."""
        for piece in pieces:
            self.transport.write(piece)
            for _ in range(3):
                await asyncio.sleep(0)


Script = Callable[[Connection], Coroutine[Any, Any, None]]


async def _nothing(_: Connection) -> None:
    return


@dataclass
class RawEngine(FakeEngine):
    """An engine that answers chats with the bytes of a test."""

    script: Script = _nothing
    early: bool = False
    """Whether the script begins when the head of a request has come, rather than its body."""
    posts: int = 0
    bodies: list[bytes] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)

    def says(self, *pieces: bytes, end: str = "") -> None:
        """Answer with these pieces, and then "close" the connection, "reset" it, or keep it."""

        async def script(connection: Connection) -> None:
            await connection.say(*pieces)
            if end == "close":
                connection.transport.close()
            elif end == "reset":
                raw = connection.transport.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.transport.abort()

        self.script = script


@dataclass
class Said:
    """One answer as a client has read it."""

    status: int
    head: bytes
    body: bytes
    whole: bool
    """Whether it ended as HTTP says that it has to."""


class Client:
    """A client's connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def answer(self) -> Said:
        """The next one."""
        async with asyncio.timeout(PATIENCE):
            head = await self.reader.readuntil(b"\r\n\r\n")
            body, whole = bytearray(), True
            try:
                await self._body(head, body)
            except (asyncio.IncompleteReadError, ConnectionError):
                whole = False
            return Said(int(head.split(b" ", 2)[1]), head, bytes(body), whole)

    async def _body(self, head: bytes, body: bytearray) -> None:
        if b"\r\ntransfer-encoding: chunked\r\n" not in head:
            length = int(head.split(b"\r\ncontent-length: ")[1].split(b"\r\n")[0])
            body += await self.reader.readexactly(length)
            return
        while size := int((await self.reader.readuntil(b"\r\n"))[:-2], 16):
            body += await self.reader.readexactly(size)
            assert await self.reader.readexactly(2) == b"\r\n"
        assert await self.reader.readexactly(2) == b"\r\n"

    async def ask(self, request: bytes) -> Said:
        """Send it, and read its answer."""
        self.writer.write(request)
        return await self.answer()

    async def closed(self) -> bool:
        """Wait until the server has closed the connection, with no byte more."""
        async with asyncio.timeout(PATIENCE):
            return await self.reader.read() == b""


@asynccontextmanager
async def connected(door: Door) -> AsyncIterator[Client]:
    """A client of the door."""
    parts = urlsplit(door.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


def post(door: Door, body: bytes, head: bytes | None = None, version: bytes = b"1.1") -> bytes:
    """A chat request; `head` replaces the line with the body's length."""
    lines = b"Content-Length: %d\r\n" % len(body) if head is None else head
    start = b"POST /v1/chat/completions HTTP/" + version + b"\r\nHost: velocity.test\r\n"
    return start + f"Authorization: Bearer {door.key}\r\n".encode() + lines + b"\r\n" + body


def chunked(*parts: bytes, extension: bytes = b"", trailers: bytes = b"") -> bytes:
    """Parts of a body as HTTP's chunks."""
    chunks = b"".join(b"%x%s\r\n%s\r\n" % (len(part), extension, part) for part in parts)
    return chunks + b"0" + extension + b"\r\n" + trailers + b"\r\n"


@pytest.fixture
async def engine() -> AsyncIterator[RawEngine]:
    """In the place of the fake engine."""
    async with fake_engine.serving(RawEngine(), Connection) as running:
        yield running
        for connection in running.connections:
            connection.transport.abort()
