"""What the process holds of a stream whose client does not read."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from api.settings import ApiSettings
from tests.api.conftest import Door
from tests.api.wire.conftest import PATIENCE, STREAM, Client, Connection, RawEngine, post

MOST = 256 * 1024
"""Bytes that the process may hold of one stream, in however large pieces the engine sends it."""
EVENT = b"data: " + b"x" * 1016 + b"\n\n"
WHOLE = 24 * 1024 * 1024
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % WHOLE


def in_kernel(*connections: set[int]) -> int:
    """Bytes in the socket buffers of both sides of connections, which are named by their two ports."""
    held = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, remote, _, queues = line.split()[1:5]
        if {int(local[9:], 16), int(remote[9:], 16)} in connections:
            held += sum(int(queue, 16) for queue in queues.split(":"))
    return held


class Flood:
    """Writes a stream as fast as its kernel takes it, in pieces of so many events."""

    def __init__(self, events: int) -> None:
        self.block = EVENT * events
        self.given = 0
        self.transport: asyncio.Transport

    async def __call__(self, connection: Connection) -> None:
        self.transport = connection.transport
        self.transport.write(HEAD)
        while self.given < WHOLE:
            self.transport.write(self.block)
            self.given += len(self.block)
            await asyncio.sleep(0)
            while self.transport.get_write_buffer_size():
                await asyncio.sleep(0.001)

    @property
    def sent(self) -> int:
        """Bytes that the kernel has taken."""
        return self.given - self.transport.get_write_buffer_size()

    @property
    def ports(self) -> set[int]:
        """Of the connection."""
        return {self.transport.get_extra_info(end)[1] for end in ("sockname", "peername")}

    async def stuck(self) -> int:
        """The same, once it takes no more."""
        before = -1
        async with asyncio.timeout(PATIENCE):
            while before != self.sent:
                before = self.sent
                await asyncio.sleep(0.3)
        return before


@pytest.fixture
def settings(settings: ApiSettings) -> ApiSettings:
    """With more patience than these tests take."""
    return settings.model_copy(update={"stall_timeout": 60.0})


@pytest.mark.parametrize("events", [1, 16, 1024])
async def test_the_engine_waits_for_a_client_that_does_not_read(door: Door, engine: RawEngine, events: int) -> None:
    engine.script = flood = Flood(events)
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        raw.connect(("127.0.0.1", int(door.url.rpartition(":")[2])))
        raw.sendall(post(door, STREAM))
        async with asyncio.timeout(PATIENCE):
            while not flood.given:
                await asyncio.sleep(0.01)
        sent = await flood.stuck()
        assert sent < WHOLE
        assert sent - in_kernel(flood.ports, {raw.getsockname()[1], raw.getpeername()[1]}) <= MOST
        reader, writer = await asyncio.open_connection(sock=raw.dup())
        said = await Client(reader, writer).answer()
        writer.close()
    assert said.whole
    assert said.body == EVENT * (WHOLE // len(EVENT))
