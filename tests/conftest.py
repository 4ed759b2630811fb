"""Fixtures that every ring uses: a real Redis, and processes that end with the test, also after a failure."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
import uvloop

from api.redis_server import binary


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests run on the event loop that velocity ships with."""
    return {"uvloop": uvloop.new_event_loop}


@contextmanager
def redis_server() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A real Redis of its own, on a unix socket, that keeps nothing: its address and its process."""
    directory = Path(tempfile.mkdtemp(prefix="velocity-test-redis-"))
    socket = directory / "redis.sock"
    process = subprocess.Popen(
        [binary(), "--port", "0", "--unixsocket", socket, "--save", "", "--dir", directory],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        client = redis.Redis(unix_socket_path=str(socket))
        _wait_for(client)
        client.close()
        yield f"unix://{socket}", process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(10)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """The Redis of the run."""
    with redis_server() as (url, _):
        yield url


def _wait_for(client: redis.Redis) -> None:
    for _ in range(100):
        try:
            client.ping()
        except redis.ConnectionError:
            time.sleep(0.1)
        else:
            return
    pytest.fail("Redis did not come up within 10 s")


@pytest.fixture
def clean_redis(redis_url: str) -> str:
    """The Redis with nothing in it."""
    client = redis.Redis.from_url(redis_url)
    client.flushall()
    client.close()
    return redis_url
