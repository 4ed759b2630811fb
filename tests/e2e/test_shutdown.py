"""SIGTERM to a real api process: what runs ends whole, nothing new comes, and it does end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
import pytest

from engine.ports import free_port
from tests.api.wire.conftest import Client
from tests.fake_engine import FakeEngine, fake_engine

PATIENCE = 60.0


def post(content: str, *, stream: bool) -> bytes:
    """A chat request."""
    message = {"role": "user", "content": content}
    body = orjson.dumps({"model": "tiny", "messages": [message], "stream": stream})
    return b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with fake_engine() as running:
        yield running


class Api:
    """A `velocity api`, and connections to it."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.port = port
        self.clients: list[Client] = []

    async def client(self) -> Client:
        """A connection. Raises ConnectionError."""
        self.clients.append(Client(*await asyncio.open_connection("127.0.0.1", self.port)))
        return self.clients[-1]

    async def ended(self) -> int:
        """Its exit code."""
        return await asyncio.wait_for(self.process.wait(), PATIENCE)


@asynccontextmanager
async def api(engine: FakeEngine, redis_url: str, data: Path, seconds: int) -> AsyncIterator[Api]:
    """One that answers, and gives what runs so many seconds after SIGTERM."""
    port = free_port()
    env = os.environ | {
        "VELOCITY_ENGINE_URL": engine.url, "VELOCITY_REDIS_URL": redis_url, "VELOCITY_DATA_DIR": str(data),
        "VELOCITY_OPEN": "1", "VELOCITY_PORT": str(port), "VELOCITY_SHUTDOWN_SECONDS": str(seconds),
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "api.cli.main", "api", env=env, stderr=asyncio.subprocess.DEVNULL
    )
    running = Api(process, port)
    try:
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    client = await running.client()
                except ConnectionError:
                    assert process.returncode is None
                    await asyncio.sleep(0.05)
                    continue
                if (await client.ask(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")).status == 200:
                    break
        yield running
    finally:
        for client in running.clients:
            client.writer.close()
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_what_runs_ends_whole_and_nothing_new_comes(engine: FakeEngine, clean_redis: str, tmp_path: Path) -> None:
    engine.token_seconds = 0.05
    async with api(engine, clean_redis, tmp_path, seconds=30) as running:
        idle, *busy = [await running.client() for _ in range(4)]
        assert (await idle.ask(post("tokens 1", stream=True))).whole
        for client, stream in zip(busy, (True, False, True), strict=True):
            client.writer.write(post("tokens 20", stream=stream))
        busy[2].writer.write(post("tokens 1", stream=True))  # pipelined: it begins after the signal
        await busy[0].reader.readuntil(b"t1 ")
        running.process.send_signal(signal.SIGTERM)
        assert await idle.closed()
        with pytest.raises(ConnectionError):
            await running.client()
        async with asyncio.timeout(PATIENCE):
            streamed = await busy[0].reader.read()
        assert b"t19 " in streamed
        assert streamed.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        said = await busy[1].answer()
        assert (said.status, said.whole, b"\r\nconnection: close\r\n" in said.head) == (200, True, True)
        assert await busy[1].closed()
        first, second = await busy[2].answer(), await busy[2].answer()
        assert (first.whole, second.whole, b"\r\nconnection: close\r\n" in second.head) == (True, True, True)
        assert await busy[2].closed()
        assert await running.ended() == 0
    assert not engine.aborted


async def test_who_does_not_read_does_not_keep_it_from_ending(
    engine: FakeEngine, clean_redis: str, tmp_path: Path
) -> None:
    async with api(engine, clean_redis, tmp_path, seconds=1) as running:
        with socket.create_connection(("127.0.0.1", running.port)) as deaf:
            deaf.sendall(post("tokens 200000", stream=True))
            hanging = await running.client()
            hanging.writer.write(post("stall 1", stream=True))
            await hanging.reader.readuntil(b"t0 ")
            await asyncio.sleep(0.5)
            running.process.send_signal(signal.SIGTERM)
            said = await asyncio.wait_for(hanging.reader.read(), PATIENCE)
            assert not said.endswith(b"0\r\n\r\n")
            assert await running.ended() == 0
