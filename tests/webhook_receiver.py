"""A webhook receiver over real HTTP or HTTPS, that answers what a test wants, byte for byte."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from workers.webhooks import Resolve

OK = b"HTTP/1.1 204 No Content\r\n\r\n"


def to(*addresses: str) -> Resolve:
    """A name server that has one answer to everything."""
    return lambda _host, _port: addresses


def answer(status: int, *headers: str) -> bytes:
    """A whole answer without a body."""
    lines = [f"HTTP/1.1 {status} Status", "content-length: 0", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


@dataclass
class Event:
    """One request as it came."""

    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    def signed_with(self, secret: str) -> bool:
        """What the specification tells a receiver to compute, written down from there."""
        to_sign = b".".join([self.id.encode(), self.headers["webhook-timestamp"].encode(), self.body])
        mac = hmac.new(base64.b64decode(secret.split("_", 1)[1]), to_sign, hashlib.sha256)
        expected = "v1," + base64.b64encode(mac.digest()).decode()
        return expected in self.headers["webhook-signature"].split(" ")


Respond = Callable[[Event, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Receiver:
    """A running receiver; `responds` is what it does after it has read a request."""

    port: int = 0
    events: list[Event] = field(default_factory=list)
    connections: int = 0
    now: int = 0
    most: int = 0
    """Requests at the same time: now, and at most."""
    reply: bytes = OK
    responds: Respond | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.now += 1
        self.most = max(self.most, self.now)
        with suppress(OSError, asyncio.IncompleteReadError):
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, *lines = head.strip().split("\r\n")
                headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
                event = Event(first.split(" ")[1], headers, await reader.readexactly(int(headers["content-length"])))
                self.events.append(event)
                if self.responds:
                    await self.responds(event, writer)
                else:
                    writer.write(self.reply)
                    await writer.drain()
            finally:
                self.now -= 1
                writer.close()


@asynccontextmanager
async def receiving(
    tls: ssl.SSLContext | None = None, host: str = "127.0.0.1", port: int = 0
) -> AsyncIterator[Receiver]:
    """A receiver on a free port, ended with all of its connections."""
    receiver = Receiver()
    running: list[tuple[asyncio.Task[None], asyncio.StreamWriter]] = []

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        running.append((asyncio.create_task(receiver.handle(reader, writer)), writer))

    server = await asyncio.start_server(connected, host, port, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        for task, writer in running:
            task.cancel()
            writer.transport.abort()
        await asyncio.gather(*(task for task, _ in running), return_exceptions=True)
