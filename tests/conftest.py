"""Fixtures that every ring uses: a real Redis, and processes that end with the test, also after a failure."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
import uvloop

from api import redis_server as embedded

REDIS_7 = Path(sys.prefix) / "redis" / "redis-server"  # see tests/tools.sh


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests run on the event loop that velocity ships with."""
    return {"uvloop": uvloop.new_event_loop}


@contextmanager
def redis_server(
    *options: str, binary: Path | None = None, config: str = ""
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A real Redis of its own, on a unix socket, that keeps nothing: its address and its process.

    `options` as on its command line, `config` as in its configuration file.
    """
    directory = Path(tempfile.mkdtemp(prefix="velocity-test-redis-"))
    socket = directory / "redis.sock"
    file = directory / "redis.conf"
    file.write_text(f'port 0\nunixsocket {socket}\ndir {directory}\nsave ""\n{config}\n')
    process = subprocess.Popen(
        [binary or embedded.binary(), file, *options],
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


@pytest.fixture(scope="session", params=["usual", "7.0"])
def each_redis_url(request: pytest.FixtureRequest, redis_url: str) -> Iterator[str]:
    """The Redis of the run (the embedded 6.2 where no other is installed), then Debian's 7.0."""
    if request.param == "usual":
        yield redis_url
    elif REDIS_7.exists():
        with redis_server(binary=REDIS_7) as (url, _):
            yield url
    else:
        reason = "Redis 7.0 is not there; tests/tools.sh unpacks it where it can"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


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
    return emptied(redis_url)


@pytest.fixture
def each_clean_redis(each_redis_url: str) -> str:
    """One Redis of each version that velocity is tested with, with nothing in it."""
    return emptied(each_redis_url)


def emptied(url: str) -> str:
    """The same address, when nothing is left there."""
    client = redis.Redis.from_url(url)
    client.flushall()
    client.close()
    return url
