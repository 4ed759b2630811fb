"""Submissions are refused while the disk, Redis or the queue is full, and what is refused leaves nothing."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError

from api.errors import to_api_error
from api.gateway import Gateway
from api.metrics import Metrics, Refusal
from api.settings import ApiSettings
from tests.conftest import REDIS_7, redis_server
from workers import pressure
from workers.errors import DiskFull, LedgerUnavailable, NoSuchJob, Overloaded, StorageError
from workers.job import JobSpec, new_id
from workers.ledger import Ledger
from workers.preflight import Preflight
from workers.pressure import Limits, Pressure
from workers.redis import connect
from workers.store import JobFiles, encode_item

MIB = 1024 * 1024
TENANT = new_id("tenant")


@pytest.fixture
async def redis(clean_redis: str) -> AsyncIterator[Redis]:
    client = connect(clean_redis, 5)
    yield client
    await client.aclose()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "velocity-test", str(place)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@asynccontextmanager
async def small_redis(binary: Path | None = None) -> AsyncIterator[Redis]:
    """A Redis of 3 MB."""
    with redis_server(binary=binary, config="maxmemory 3mb\nmaxmemory-policy noeviction") as (url, _):
        client = connect(url, 5)
        try:
            yield client
        finally:
            await client.aclose()


class Counted:
    """Pressure on a data directory, and what it refused."""

    def __init__(self, redis: Redis, data: Path, *, free: int = 0, queued: int = 0, most: int = 100) -> None:
        self.refused: list[str] = []
        self.queued = queued
        preflight = Preflight(redis, data, owner=True)
        self.pressure = Pressure(redis, self._ask, preflight, data, Limits(free, most), self.refused.append)

    async def _ask(self) -> int:
        return self.queued


async def fill(redis: Redis, leave: int = 0) -> None:
    """Use up Redis's memory but for about `leave` bytes; with 0, until it takes nothing more."""
    size, number = 64 * 1024, 0
    while size >= 128:
        info = await redis.info("memory")
        if leave and info["maxmemory"] - info["used_memory"] <= leave + size:
            size //= 2
            continue
        number += 1
        try:
            await redis.set(f"ballast:{number}", b"x" * (size - 100))
        except OutOfMemoryError:
            size //= 2


def spec(total: int = 12) -> JobSpec:
    return JobSpec(
        id=new_id("job"), tenant=TENANT, endpoint="/v1/chat/completions", model="tiny", total=total, shard_items=8,
        created=0,
    )  # fmt: skip


async def test_there_is_room(redis: Redis, tmp_path: Path) -> None:
    counted = Counted(redis, tmp_path / "not" / "there" / "yet", queued=99)
    await counted.pressure.require_room()
    await counted.pressure.require_room(1000)
    assert not counted.refused


async def test_a_disk_below_the_threshold_refuses(redis: Redis, tmp_path: Path) -> None:
    counted = Counted(redis, tmp_path, free=1 << 60)
    with pytest.raises(DiskFull) as refused:
        await counted.pressure.require_room()
    answer = to_api_error(refused.value)
    assert (answer.status, answer.code) == (507, "insufficient_storage")
    assert (b"retry-after", b"60") in answer.headers
    assert counted.refused == ["disk_full"]


async def test_what_is_announced_counts(redis: Redis, tmp_path: Path) -> None:
    counted = Counted(redis, tmp_path)
    await counted.pressure.require_room(1)
    with pytest.raises(DiskFull):
        await counted.pressure.require_room(1 << 60)


async def test_a_full_disk_refuses_and_leaves_nothing(redis: Redis, small_disk: Path) -> None:
    counted = Counted(redis, small_disk, free=MIB)
    await counted.pressure.require_room(MIB // 2)
    with pytest.raises(DiskFull):
        await counted.pressure.require_room(MIB + 1)
    job = spec()
    files = JobFiles(small_disk, TENANT, job.id)
    with pytest.raises(StorageError):  # as when others were faster
        files.create(job, (encode_item(str(number), {"text": "x" * 1000}) for number in range(4000)))
    assert not list((small_disk / "jobs" / TENANT).iterdir())
    await counted.pressure.require_room()
    (small_disk / "ballast").write_bytes(b"x" * (MIB + MIB // 2))
    with pytest.raises(DiskFull):
        await counted.pressure.require_room()
    (small_disk / "ballast").unlink()
    await counted.pressure.require_room()


async def test_a_disk_too_full_for_its_identity_is_a_storage_error(redis: Redis, small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space"):
        (small_disk / "ballast").write_bytes(b"x" * 3 * MIB)
    with pytest.raises(StorageError):
        await Counted(redis, small_disk).pressure.require_room()
    assert not (small_disk / "velocity.json").exists()


async def test_a_full_queue_refuses(redis: Redis, tmp_path: Path) -> None:
    counted = Counted(redis, tmp_path, queued=100)
    with pytest.raises(Overloaded) as refused:
        await counted.pressure.require_room()
    answer = to_api_error(refused.value)
    assert (answer.status, answer.code) == (503, "overloaded")
    assert (b"retry-after", b"30") in answer.headers
    assert counted.refused == ["queue_full"]
    counted.queued = 99
    await counted.pressure.require_room()


async def test_the_ledger_counts_what_waits(redis: Redis) -> None:
    ledger = Ledger(redis)
    assert await ledger.queued() == 0
    await ledger.submit(spec(12))
    assert await ledger.queued() == 12


async def test_a_nearly_full_redis_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with small_redis() as redis:
        counted = Counted(redis, tmp_path)
        await counted.pressure.require_room()
        await fill(redis, leave=100_000)
        await counted.pressure.require_room()  # what it knows is less than two seconds old
        monkeypatch.setattr(pressure, "_MEMORY_SECONDS", 0.0)
        counted = Counted(redis, tmp_path)
        with pytest.raises(Overloaded, match="90%"):
            await counted.pressure.require_room()
        assert counted.refused == ["redis_full"]
        await redis.flushall()
        await counted.pressure.require_room()


@pytest.mark.parametrize("binary", [None, REDIS_7], ids=["usual", "7.0"])
@pytest.mark.parametrize("leave", [0, 4_000], ids=["full", "full half-way"])
async def test_a_redis_without_memory_enters_a_job_whole_or_not_at_all(binary: Path | None, leave: int) -> None:
    if binary and not binary.exists():
        pytest.skip("Redis 7.0 is not there; tests/tools.sh unpacks it where it can")
    async with small_redis(binary) as redis:
        ledger = Ledger(redis)
        await ledger.queued()
        await ledger.submit(first := spec())  # loads the script
        await fill(redis, leave)
        job = spec(50_000)
        refusal: LedgerUnavailable | None = None
        try:
            await ledger.submit(job)
        except LedgerUnavailable as error:
            refusal = error
        if refusal:
            assert to_api_error(refusal).status == 503
            assert [key async for key in redis.scan_iter(f"*{job.id}*")] == []
            with pytest.raises(NoSuchJob):
                await ledger.job(TENANT, job.id)
            assert [found.id for found in await ledger.jobs(TENANT, 10, None)] == [first.id]
            assert await ledger.queued() == 12
            async for key in redis.scan_iter("ballast:*"):
                await redis.delete(key)
            await ledger.submit(job)
        else:
            assert leave
        assert (await ledger.job(TENANT, job.id)).total == 50_000
        assert await ledger.queued() == 50_012


async def test_nothing_is_accepted_before_redis_answered(tmp_path: Path) -> None:
    redis = connect(f"unix://{tmp_path}/none.sock", 5)
    with pytest.raises(LedgerUnavailable):
        await Counted(redis, tmp_path).pressure.require_room()
    await redis.aclose()


async def test_the_api_counts_what_it_refuses(clean_redis: str, tmp_path: Path) -> None:
    settings = ApiSettings(redis_url=clean_redis, data_dir=tmp_path, min_free_bytes=1 << 60)
    async with Gateway.opened(settings) as gateway:
        with pytest.raises(DiskFull):
            await gateway.pressure.require_room()
        text = gateway.metrics.render()[0].decode()
    assert 'velocity_refusals_total{reason="disk_full"} 1.0' in text
    assert 'velocity_refusals_total{reason="queue_full"} 0.0' in text
    for reason in ("disk_full", "redis_full", "queue_full"):
        Metrics().refused(Refusal(reason))
