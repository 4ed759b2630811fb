"""The pump against a fake engine: engines that die, items that nobody can run, deadlines, and whose turn it is."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
from redis.asyncio import Redis

from engine.client import EngineClient
from tests.fake_engine import Connection, FakeEngine, serving
from workers.job import JobSpec, JobStatus, new_id
from workers.ledger import Ledger
from workers.pump import Pump
from workers.redis import connect
from workers.settings import WorkerSettings
from workers.store import JobFiles, encode_item

TENANT = new_id("tenant")


class MortalEngine(FakeEngine):
    """One that an item "crash" kills, with all that it was doing, for a moment."""

    deaths = 0


class _Mortal(Connection):
    alive: ClassVar[set[_Mortal]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.alive.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.alive.discard(self)

    async def generate(self, request: dict[str, Any]) -> None:
        assert isinstance(self.engine, MortalEngine)
        if request["messages"][-1]["content"] == "crash":
            await asyncio.sleep(0.05)
            self.engine.deaths += 1
            self.engine.healthy = False
            asyncio.get_running_loop().call_later(0.2, setattr, self.engine, "healthy", True)
            for connection in list(self.alive):
                connection.transport.abort()
            return
        await super().generate(request)


@pytest.fixture
async def redis(clean_redis: str) -> AsyncIterator[Redis]:
    client = connect(clean_redis, 5)
    yield client
    await client.aclose()


@pytest.fixture
def ledger(redis: Redis) -> Ledger:
    return Ledger(redis)


@pytest.fixture
async def engine() -> AsyncIterator[MortalEngine]:
    async with serving(MortalEngine(), _Mortal) as running:
        assert isinstance(running, MortalEngine)
        yield running


@pytest.fixture
def settings(clean_redis: str, engine: MortalEngine, tmp_path: Path) -> WorkerSettings:
    return WorkerSettings(
        redis_url=clean_redis, engine_url=engine.url, data_dir=tmp_path, shard_items=8, bulk_window=4, lease_seconds=2,
        retry_backoff=0.01, drain_seconds=0.2,
    )  # fmt: skip


@asynccontextmanager
async def draining(ledger: Ledger, settings: WorkerSettings) -> AsyncIterator[asyncio.Task[None]]:
    """A worker's drain, ended with the block."""
    stop = threading.Event()
    async with EngineClient(settings.engine_url) as client:
        task = asyncio.create_task(Pump(ledger, client, settings).drain(stop))
        try:
            yield task
        finally:
            stop.set()
            await asyncio.wait([task])


async def submitted(ledger: Ledger, data: Path, *contents: str, **more: object) -> JobFiles:
    fields = {
        "id": new_id("job"), "tenant": TENANT, "account": "a", "endpoint": "/v1/chat/completions", "model": "tiny",
        "total": len(contents), "shard_items": 8, "created": time.time(), **more,
    }  # fmt: skip
    spec = JobSpec.model_validate(fields)
    files = JobFiles(data, TENANT, spec.id)
    lines = (encode_item(str(n), {"messages": [{"role": "user", "content": text}]}) for n, text in enumerate(contents))
    files.create(spec, lines)
    await ledger.submit(spec)
    return files


async def over(ledger: Ledger, files: JobFiles, seconds: float = 30) -> JobStatus:
    async with asyncio.timeout(seconds):
        while not (state := await ledger.job(TENANT, files.path.name)).status.terminal:
            await ledger.sweep()
            await asyncio.sleep(0.05)
    return state.status


def outcomes(files: JobFiles) -> dict[int, str]:
    return {record.index: record.error["code"] if record.error else "ok" for record in files.results(-1)}


async def test_an_item_that_kills_the_engine_is_given_up_and_takes_no_others_along(
    ledger: Ledger, settings: WorkerSettings, engine: MortalEngine
) -> None:
    files = await submitted(ledger, settings.data_dir, "hi", "tokens 3", "crash", *["tokens 2"] * 13)
    engine.token_seconds = 0.02
    async with draining(ledger, settings):
        assert await over(ledger, files) is JobStatus.COMPLETED
    assert outcomes(files) == {index: "engine_crashed" if index == 2 else "ok" for index in range(16)}
    assert engine.deaths == 3


async def test_a_job_that_cannot_be_read_does_not_hold_up_the_others(ledger: Ledger, settings: WorkerSettings) -> None:
    damaged = await submitted(ledger, settings.data_dir, "hi", "hi")
    path = damaged.path / "input.jsonl"
    path.write_bytes(b"x" * path.stat().st_size)
    fine = await submitted(ledger, settings.data_dir, *["hi"] * 20, account="b")
    async with draining(ledger, settings) as task:
        assert await over(ledger, fine) is JobStatus.COMPLETED
        assert not task.done()
    assert (await ledger.job(TENANT, damaged.path.name)).completed == 0


async def test_at_the_deadline_every_item_is_in_exactly_one_of_the_files(
    ledger: Ledger, settings: WorkerSettings
) -> None:
    contents = ["hi"] * 3 + ["status 400"] + ["hang"] + ["hi"] * 15
    files = await submitted(ledger, settings.data_dir, *contents, deadline=int(time.time()) + 2)
    async with draining(ledger, settings):
        assert await over(ledger, files) is JobStatus.EXPIRED
    found = outcomes(files)
    assert sorted(found) == list(range(20))
    assert (found[3], found[4]) == ("invalid_request", "batch_expired")
    assert set(found.values()) == {"ok", "invalid_request", "batch_expired"}
    state = await ledger.job(TENANT, files.path.name)
    assert (state.completed, state.failed) == (18, 2)


async def test_a_job_with_too_many_failures_is_stopped(ledger: Ledger, settings: WorkerSettings) -> None:
    files = await submitted(ledger, settings.data_dir, *["status 400"] * 40, *["hi"] * 400, max_error_rate=0.05)
    async with draining(ledger, settings):
        assert await over(ledger, files) is JobStatus.FAILED
    state = await ledger.job(TENANT, files.path.name)
    assert 22 < state.failed <= 40
    assert state.completed < 400
    assert len(outcomes(files)) == state.completed + state.failed


async def test_two_accounts_take_turns_in_the_window(
    ledger: Ledger, settings: WorkerSettings, engine: MortalEngine
) -> None:
    engine.token_seconds = 0.005
    large = await submitted(ledger, settings.data_dir, *["tokens 3"] * 200)
    small = await submitted(ledger, settings.data_dir, *["tokens 4"] * 24, account="b")
    async with draining(ledger, settings):
        await over(ledger, small)
        assert (await ledger.job(TENANT, large.path.name)).left > 60
        await over(ledger, large)


async def test_items_whose_commit_redis_forgot_run_again(
    ledger: Ledger, settings: WorkerSettings, engine: MortalEngine, redis: Redis
) -> None:
    engine.token_seconds = 0.05
    files = await submitted(ledger, settings.data_dir, *["tokens 4"] * 64, shard_items=64)
    job = files.path.name
    async with draining(ledger, settings):
        async with asyncio.timeout(30):
            while not (await ledger.job(TENANT, job)).completed:
                await asyncio.sleep(0.01)
        await redis.delete(f"velocity:job:{job}:done")
        await redis.hset(f"velocity:job:{job}", "completed", 0)
        await redis.hdel(f"velocity:job:{job}:unit:0", "finished")
        assert await over(ledger, files) is JobStatus.COMPLETED
    assert outcomes(files) == dict.fromkeys(range(64), "ok")


async def test_what_waits_in_memory_is_bounded(ledger: Ledger, settings: WorkerSettings, engine: MortalEngine) -> None:
    settings = settings.model_copy(update={"shard_items": 512})
    await submitted(ledger, settings.data_dir, *["hi"] * 512, shard_items=512)
    frozen = asyncio.Event()

    class Slow(Ledger):
        async def commit(self, *args: Any, **more: Any) -> Any:
            await frozen.wait()
            return await super().commit(*args, **more)

    slow = Slow(ledger._redis)
    async with draining(slow, settings):
        await asyncio.sleep(1.5)
        assert len(engine.requests) <= 64 + 4, "more was run than can be committed"
        frozen.set()
        async with asyncio.timeout(30):
            while len(engine.requests) < 512:
                await asyncio.sleep(0.05)
