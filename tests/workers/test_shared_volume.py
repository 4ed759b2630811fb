"""Workers that reach the same data directory by different paths, as two hosts with one volume do, share one job."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.fake_engine import fake_engine
from tests.workers.test_process import TENANT, submit, worker
from workers import tickets
from workers.job import LANE, JobStatus
from workers.ledger import Ledger
from workers.preflight import Preflight, read_identity
from workers.redis import connect, connect_sync
from workers.store import JobFiles

ITEMS = 96


@pytest.fixture
async def redis(clean_redis: str) -> AsyncIterator[Redis]:
    client = connect(clean_redis, 5)
    yield client
    await client.aclose()


@pytest.fixture(params=["symlink", "bind mount"])
def two_paths(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """One directory under two names."""
    one, other = tmp_path / "one" / "data", tmp_path / "other"
    one.mkdir(parents=True)
    if request.param == "symlink":
        other.symlink_to(one, target_is_directory=True)
        yield one, other
        return
    other.mkdir()
    if os.geteuid() or subprocess.run(["mount", "--bind", one, other], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to bind a mount")
    try:
        yield one, other
    finally:
        subprocess.run(["umount", other], check=True)


async def test_two_workers_finish_one_job_together(
    clean_redis: str, redis: Redis, two_paths: tuple[Path, Path]
) -> None:
    one, other = two_paths
    ledger = Ledger(redis)
    await Preflight(redis, one, owner=True).check()
    assert read_identity(other) == read_identity(one)
    async with fake_engine() as first, fake_engine() as second:
        first.token_seconds = second.token_seconds = 0.02
        async with asyncio.timeout(60), worker(clean_redis, first, one), worker(clean_redis, second, other):
            while await ledger.beat() < 2:
                await asyncio.sleep(0.05)
            job = await submit(ledger, clean_redis, one, *(f"say {number}" for number in range(ITEMS)))
            for_both = connect_sync(clean_redis, 5)
            tickets.ring(for_both, LANE, 2)
            for_both.close()
            while not (await ledger.job(TENANT, job)).status.terminal:
                await asyncio.sleep(0.05)
        said = [[request["messages"][-1]["content"] for request in engine.requests] for engine in (first, second)]
    assert all(said), "one of them did nothing"
    assert sorted(said[0] + said[1]) == sorted(f"say {number}" for number in range(ITEMS)), "something ran twice"
    state = await ledger.job(TENANT, job)
    assert (state.status, state.completed, state.failed) == (JobStatus.COMPLETED, ITEMS, 0)
    for path in (one, other):
        assert [record.index for record in JobFiles(path, TENANT, job).results(-1)] == list(range(ITEMS))
    assert not [path for path in one.rglob("*") if path.is_file() and str(one.parent).encode() in path.read_bytes()]
