"""Which Redis and which data directory a process agrees to work on."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from api.gateway import Gateway
from api.settings import ApiSettings
from api.stack import Stack
from engine.ports import free_port
from tests.conftest import redis_server
from workers import tickets
from workers.errors import LedgerUnavailable, PreflightError, StorageError
from workers.job import LANE
from workers.preflight import IDENTITY, Preflight, create_identity, read_identity, require_supported
from workers.process import run
from workers.redis import connect, connect_sync
from workers.redis_keys import DATA
from workers.settings import WorkerSettings

NOBODY = f"redis://127.0.0.1:{free_port()}/0"


@pytest.fixture
async def redis(clean_redis: str) -> AsyncIterator[Redis]:
    client = connect(clean_redis, 5)
    yield client
    await client.aclose()


@pytest.mark.parametrize(
    ("options", "config", "what"),
    [
        (["--sentinel"], "", "is a Sentinel"),
        ([], f"cluster-enabled yes\nport {free_port()}", "Cluster mode"),
        ([], "replicaof 127.0.0.1 9", "replica of 127.0.0.1:9"),
        ([], "maxmemory 100mb\nmaxmemory-policy allkeys-lru", "allkeys-lru"),
    ],
)
async def test_an_unsuitable_redis_is_refused(tmp_path: Path, options: list[str], config: str, what: str) -> None:
    with redis_server(*options, config=config) as (url, _):
        redis = connect(url, 5)
        for owner in (True, False):
            with pytest.raises(PreflightError, match=what) as refused:
                await Preflight(redis, tmp_path, owner=owner).check()
            assert "one primary Redis, 6.2 or newer" in str(refused.value)
        await redis.aclose()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("version", "refused"), [("5.0.14", True), ("6.0.16", True), ("6.2.0", False), (7.2, False)])
def test_an_old_redis_is_refused(version: Any, refused: bool) -> None:
    info = {"redis_version": version, "redis_mode": "standalone", "role": "master"}
    if refused:
        with pytest.raises(PreflightError, match=r"5\.0|6\.0"):
            require_supported(info)
    else:
        require_supported(info)


@pytest.mark.parametrize(("config", "warned"), [("appendonly yes\nmaxmemory 100mb", False), ("appendonly no", True)])
async def test_a_redis_that_keeps_nothing_is_warned_of(tmp_path: Path, config: str, warned: bool) -> None:
    with redis_server(config=config) as (url, _), capture_logs() as logs:
        redis = connect(url, 5)
        await Preflight(redis, tmp_path, owner=True).check()
        await redis.aclose()
    assert any(entry["event"] == "redis_without_aof" for entry in logs) is warned


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://a:26379/mymaster", "rediss+cluster://a:6379", "redis://a:1,b:2/0", "rediss://:p@a,b/0",
        "127.0.0.1:6379", "",
    ],
)  # fmt: skip
def test_only_the_address_of_one_redis_is_a_setting(url: str) -> None:
    with pytest.raises(ValueError, match="one primary Redis"):
        WorkerSettings(redis_url=url)


@pytest.mark.parametrize("url", ["redis://:a,b@host/0", "unix:///tmp/a,b.sock", "rediss://[::1]:6380/0"])
def test_commas_elsewhere_are_no_hosts(url: str) -> None:
    assert WorkerSettings(redis_url=url).redis_url == url


@pytest.mark.parametrize("path", ["s3://bucket/jobs", "gs://bucket", Path("s3://bucket/jobs"), "file:///data"])
def test_object_storage_is_no_data_directory(path: Any) -> None:
    with pytest.raises(ValueError, match="object storage is not supported"):
        WorkerSettings(data_dir=path)


def test_processes_that_race_agree_on_one_identity(tmp_path: Path) -> None:
    data = tmp_path / "deep" / "data"
    racers = 16
    barrier = threading.Barrier(racers)

    def create() -> str:
        barrier.wait()
        return create_identity(data)

    with ThreadPoolExecutor(racers) as threads:
        found = {future.result() for future in [threads.submit(create) for _ in range(racers)]}
    assert found == {read_identity(data)}
    assert [path.name for path in data.iterdir()] == [IDENTITY]


async def test_apis_that_start_together_agree(redis: Redis, tmp_path: Path) -> None:
    await asyncio.gather(*(Preflight(redis, tmp_path, owner=True).check() for _ in range(8)))
    assert await redis.get(DATA) == (read_identity(tmp_path) or "").encode()


async def test_another_directory_or_none_is_refused(redis: Redis, tmp_path: Path) -> None:
    right, wrong, bare = tmp_path / "right", tmp_path / "wrong", tmp_path / "bare"
    await Preflight(redis, right, owner=True).check()
    await Preflight(redis, right, owner=False).check()
    ids = read_identity(right), create_identity(wrong)
    for owner in (True, False):
        with pytest.raises(PreflightError) as refused:
            await Preflight(redis, wrong, owner=owner).check()
        assert all(str(part) in str(refused.value) for part in (wrong, *ids, f"DEL {DATA}"))
        with pytest.raises(PreflightError, match=r"has no velocity\.json"):
            await Preflight(redis, bare, owner=owner).check()
    assert not bare.exists()
    await redis.delete(DATA)  # as the sentence says
    await Preflight(redis, wrong, owner=True).check()
    with pytest.raises(PreflightError):
        await Preflight(redis, right, owner=False).check()


async def test_a_worker_enters_nothing(redis: Redis, tmp_path: Path) -> None:
    await Preflight(redis, tmp_path, owner=False).check()
    assert not list(tmp_path.iterdir())
    assert not await redis.keys()


async def test_an_emptied_redis_gets_the_id_again(redis: Redis, tmp_path: Path) -> None:
    preflight = Preflight(redis, tmp_path, owner=True)
    await preflight.check()
    await redis.flushall()
    await preflight.check()
    assert await redis.get(DATA) == (read_identity(tmp_path) or "").encode()


async def test_a_volume_that_goes_away_is_noticed(redis: Redis, tmp_path: Path) -> None:
    preflight = Preflight(redis, tmp_path, owner=True)
    await preflight.check()
    (tmp_path / IDENTITY).unlink()
    await redis.flushall()  # even then it is not taken for a new directory
    with pytest.raises(PreflightError, match=r"has no velocity\.json"):
        await preflight.check()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"id": 1}', b'{"id": "../../x"}'])
def test_a_damaged_identity_is_never_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / IDENTITY).write_bytes(content)
    for function in (read_identity, create_identity):
        with pytest.raises(PreflightError, match="damaged"):
            function(tmp_path)
    assert (tmp_path / IDENTITY).read_bytes() == content


async def test_a_directory_that_can_not_be_used_is_no_refusal(redis: Redis, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError):
        await Preflight(redis, tmp_path / "file", owner=True).check()


async def test_the_check_waits_for_redis_and_then_refuses(tmp_path: Path) -> None:
    socket = tmp_path / "later.sock"
    redis = connect(f"unix://{socket}", 5)
    preflight = Preflight(redis, tmp_path, owner=True)
    with pytest.raises(LedgerUnavailable):
        await preflight.check()
    running = asyncio.create_task(preflight.run())
    with redis_server(config="replicaof 127.0.0.1 9") as (url, _):
        socket.symlink_to(url.removeprefix("unix://"))
        with pytest.raises(PreflightError, match="replica"):
            await asyncio.wait_for(running, 30)
    assert not preflight.passed
    await redis.aclose()


async def test_an_api_does_not_start_on_another_directory(redis: Redis, clean_redis: str, tmp_path: Path) -> None:
    await Preflight(redis, tmp_path / "right", owner=True).check()
    create_identity(tmp_path / "wrong")
    settings = ApiSettings(redis_url=clean_redis, data_dir=tmp_path / "wrong")
    with pytest.raises(PreflightError):
        async with Gateway.opened(settings):
            pytest.fail("it started")


async def test_an_api_starts_without_redis(tmp_path: Path) -> None:
    async with Gateway.opened(ApiSettings(redis_url=NOBODY, data_dir=tmp_path)) as gateway:
        assert not gateway.preflight.passed
    assert not list(tmp_path.iterdir())


def test_a_worker_without_redis_says_so(tmp_path: Path) -> None:
    with pytest.raises(LedgerUnavailable):
        run(WorkerSettings(redis_url=NOBODY, data_dir=tmp_path))


async def test_a_worker_process_says_why_it_does_not_start(redis: Redis, clean_redis: str, tmp_path: Path) -> None:
    await Preflight(redis, tmp_path / "right", owner=True).check()
    ended = await asyncio.to_thread(_worker, clean_redis, tmp_path / "missing")
    assert ended.returncode == 1
    assert "error: The data directory" in ended.stderr
    assert "is not the one that this Redis belongs to" in ended.stderr
    assert "Traceback" not in ended.stderr


async def test_a_worker_whose_volume_went_away_ends_with_the_reason(
    redis: Redis, clean_redis: str, tmp_path: Path
) -> None:
    await Preflight(redis, tmp_path / "data", owner=True).check()
    ending = asyncio.create_task(asyncio.to_thread(_worker, clean_redis, tmp_path / "data"))
    async with asyncio.timeout(30):
        while not await redis.zcard("velocity:workers"):
            await asyncio.sleep(0.05)
    shutil.rmtree(tmp_path / "data")
    ring_bell(clean_redis)
    ended = await asyncio.wait_for(ending, 30)
    assert ended.returncode == 1
    assert "error: The data directory" in ended.stderr
    assert not (tmp_path / "data").exists()


async def test_velocity_up_refuses_a_redis_that_was_named(tmp_path: Path) -> None:
    with redis_server(config="replicaof 127.0.0.1 9") as (url, _):
        settings = ApiSettings(redis_url=url, data_dir=tmp_path, port=free_port())
        with pytest.raises(PreflightError, match="replica"):
            async with Stack(settings, print, own_redis=False, own_engine=False).running():
                pytest.fail("it started")


def ring_bell(url: str) -> None:
    connection = connect_sync(url, 5)
    tickets.ring(connection, LANE, 1)
    connection.close()


def _worker(url: str, data: Path) -> subprocess.CompletedProcess[str]:
    names = {"VELOCITY_REDIS_URL": url, "VELOCITY_DATA_DIR": str(data)}
    command = [sys.executable, "-m", "api.cli.main", "worker"]
    return subprocess.run(command, env=os.environ | names, capture_output=True, text=True, timeout=60, check=False)
