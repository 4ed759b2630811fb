"""The worker process itself, in front of a fake engine: SIGTERM gives work back, a killed one is followed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.fake_engine import FakeEngine, fake_engine
from workers import tickets
from workers.job import LANE, JobSpec, JobStatus, new_id
from workers.ledger import Ledger
from workers.redis import connect, connect_sync
from workers.store import JobFiles, encode_item

TENANT = new_id("tenant")


@asynccontextmanager
async def worker(redis_url: str, engine: FakeEngine, data: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    settings = {
        "REDIS_URL": redis_url, "ENGINE_URL": engine.url, "DATA_DIR": str(data), "DRAIN_SECONDS": "0.5",
        "LEASE_SECONDS": "2", "BULK_WINDOW": "4",
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "api.cli.main", "worker",
        env=os.environ | {f"VELOCITY_{name}": value for name, value in settings.items()},
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def submit(ledger: Ledger, redis_url: str, data: Path, *contents: str) -> str:
    spec = JobSpec(
        id=new_id("job"), tenant=TENANT, endpoint="/v1/chat/completions", model="tiny", total=len(contents),
        shard_items=8, created=0,
    )  # fmt: skip
    lines = (encode_item(str(n), {"messages": [{"role": "user", "content": text}]}) for n, text in enumerate(contents))
    JobFiles(data, TENANT, spec.id).create(spec, lines)
    await ledger.submit(spec)
    ring(redis_url)
    return spec.id


def ring(redis_url: str) -> None:
    connection = connect_sync(redis_url, 5)
    tickets.ring(connection, LANE, 1)
    connection.close()


async def test_sigterm_gives_the_work_back_and_another_finishes_it(clean_redis: str, tmp_path: Path) -> None:
    redis = connect(clean_redis, 5)
    ledger = Ledger(redis)
    async with fake_engine() as engine:
        job = await submit(ledger, clean_redis, tmp_path, "hi", "hi", "hang", "hi", "hi", "hi")
        async with asyncio.timeout(30), worker(clean_redis, engine, tmp_path) as first:
            while (await ledger.job(TENANT, job)).completed < 5:
                await asyncio.sleep(0.05)
            first.send_signal(signal.SIGTERM)
            assert await first.wait() == 0
        assert len(engine.aborted) == 1
        assert await ledger.beat() == 0
        state = await ledger.job(TENANT, job)
        assert (state.status, state.completed) == (JobStatus.IN_PROGRESS, 5)
        assert (await ledger.sweep()).pending[LANE] == 1, "the shard was not given back"
        await ledger.cancel(job)
        ring(clean_redis)
        async with asyncio.timeout(30), worker(clean_redis, engine, tmp_path):
            while not (await ledger.job(TENANT, job)).status.terminal:
                await asyncio.sleep(0.05)
        assert (await ledger.job(TENANT, job)).status is JobStatus.CANCELLED
    await redis.aclose()


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_worker_that_is_gone_or_frozen_is_followed(
    clean_redis: str, tmp_path: Path, fault: signal.Signals
) -> None:
    redis = connect(clean_redis, 5)
    ledger = Ledger(redis)
    async with fake_engine() as engine:
        engine.token_seconds = 0.3
        job = await submit(ledger, clean_redis, tmp_path, *["tokens 3"] * 24)
        async with asyncio.timeout(60), worker(clean_redis, engine, tmp_path) as first:
            while not (await ledger.job(TENANT, job)).completed:
                await asyncio.sleep(0.05)
            first.send_signal(fault)
            engine.token_seconds = 0.0
            async with worker(clean_redis, engine, tmp_path):
                while not (await ledger.job(TENANT, job)).status.terminal:
                    if any((await ledger.sweep()).pending.values()):
                        ring(clean_redis)
                    await asyncio.sleep(0.2)
            if fault is signal.SIGSTOP:
                first.send_signal(signal.SIGCONT)
                await asyncio.sleep(1)  # it wakes up and tries to commit what it had
        state = await ledger.job(TENANT, job)
        assert (state.status, state.completed, state.failed) == (JobStatus.COMPLETED, 24, 0)
        found = [record.index for record in JobFiles(tmp_path, TENANT, job).results(-1)]
        assert found == list(range(24))
    await redis.aclose()
