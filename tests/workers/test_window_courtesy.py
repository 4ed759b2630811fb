"""The pump stands back for people: a real Redis says who is there, a fake engine sees what is sent and broken off."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from engine.client import EngineClient
from tests.fake_engine import FakeEngine, fake_engine
from tests.workers.people import Api
from tests.workers.test_pump import outcomes, over, submitted
from workers.job import JobStatus
from workers.ledger import Ledger
from workers.pump import Pump
from workers.redis import connect
from workers.settings import WorkerSettings
from workers.window import Tally

PRIORITY = {"scheduler": "vllm", "policy": "priority", "batch_seats": 0}
SCHEDULER = {"scheduler": "velocity", "policy": "priority", "batch_seats": 24}


@pytest.fixture
async def redis(clean_redis: str) -> AsyncIterator[Redis]:
    client = connect(clean_redis, 5)
    yield client
    await client.aclose()


@pytest.fixture
def ledger(redis: Redis) -> Ledger:
    return Ledger(redis)


@pytest.fixture
async def api(redis: Redis) -> AsyncIterator[Api]:
    api = Api(redis)
    await api.signs()
    yield api
    await api.falls_silent()


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with fake_engine() as running:
        running.scheduler = PRIORITY
        running.token_seconds = 0.1
        yield running


@pytest.fixture
def settings(clean_redis: str, engine: FakeEngine, tmp_path: Path) -> WorkerSettings:
    return WorkerSettings(
        redis_url=clean_redis, engine_url=engine.url, data_dir=tmp_path, shard_items=64, lease_seconds=2,
        retry_backoff=0.01, drain_seconds=0.2,
    )  # fmt: skip


@asynccontextmanager
async def draining(
    ledger: Ledger, settings: WorkerSettings, tally: Tally | None = None
) -> AsyncIterator[threading.Event]:
    """A worker's drain, ended with the block."""
    stop = threading.Event()
    async with EngineClient.of(settings) as client:
        task = asyncio.create_task(Pump(ledger, client, settings, tally=tally).drain(stop))
        try:
            yield stop
            assert not task.done() or not task.exception()
        finally:
            stop.set()
            await asyncio.wait([task])


async def until(condition: Callable[[], Any], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def asked(engine: FakeEngine) -> list[str]:
    return [request["messages"][-1]["content"] for request in engine.requests]


def items(count: int, tokens: int = 3) -> list[str]:
    return [f"tokens {tokens} item-{n}" for n in range(count)]


async def test_people_get_the_engine_and_the_youngest_give_way(
    ledger: Ledger, settings: WorkerSettings, engine: FakeEngine, api: Api
) -> None:
    files = await submitted(ledger, settings.data_dir, *items(48, 40), shard_items=64)
    tally = Tally()
    async with draining(ledger, settings, tally):
        await until(lambda: engine.running == 16)
        await api.people(2)
        await until(lambda: engine.running == 1)
        assert (len(engine.aborted), tally.given_back, tally.in_flight) == (15, 15, 1)
        eldest = asked(engine)[0]
        assert eldest not in [request["messages"][-1]["content"] for request in engine.aborted]
        await asyncio.sleep(0.6)
        assert len(engine.requests) == 16, "bulk was sent while people were there"
        await api.people(0)
        engine.token_seconds = 0.0
        assert await over(ledger, files) is JobStatus.COMPLETED
    assert outcomes(files) == dict.fromkeys(range(48), "ok")
    runs = Counter(asked(engine))
    assert (sum(runs.values()), len(runs), max(runs.values())) == (48 + 15, 48, 2)


async def test_it_comes_back_slowly_and_in_order(
    ledger: Ledger, settings: WorkerSettings, engine: FakeEngine, api: Api
) -> None:
    await submitted(ledger, settings.data_dir, *items(40, 600), shard_items=64)
    sizes: list[int] = []
    async with draining(ledger, settings):
        await until(lambda: engine.running == 16)
        first = asked(engine)
        await api.people(1)
        await until(lambda: engine.running == 1)
        await api.people(0)
        async with asyncio.timeout(20):
            while engine.running < 16:
                if not sizes or sizes[-1] != engine.running:
                    sizes.append(engine.running)
                await asyncio.sleep(0.02)
        again = asked(engine)[16:]
    assert [size for size in sizes if size in {1, 2, 4, 8}] == [1, 2, 4, 8]
    order = {content: place for place, content in enumerate(first)}
    assert set(again) == set(first[1:]), "a new item came before one that was given back"
    assert [order[again[0]], *sorted(order[content] for content in again[1:3])] == [1, 2, 3]


async def test_without_a_floor_bulk_stops_and_goes_on(
    ledger: Ledger, settings: WorkerSettings, engine: FakeEngine, api: Api
) -> None:
    settings = settings.model_copy(update={"batch_floor": 0})
    files = await submitted(ledger, settings.data_dir, *items(8, 20))
    await api.people(1)
    async with draining(ledger, settings):
        await asyncio.sleep(1)
        assert not engine.requests
        await api.people(0)
        await until(lambda: engine.running)
        await api.people(1)
        await until(lambda: not engine.running)
        assert engine.aborted
        await asyncio.sleep(3)  # longer than a lease: it is renewed meanwhile
        await ledger.sweep()
        engine.token_seconds = 0.0
        await api.people(0)
        assert await over(ledger, files) is JobStatus.COMPLETED
    assert outcomes(files) == dict.fromkeys(range(8), "ok")


async def test_an_engine_that_decides_itself_gets_all_that_it_can_use(
    ledger: Ledger, settings: WorkerSettings, engine: FakeEngine, api: Api
) -> None:
    engine.scheduler = SCHEDULER
    await submitted(ledger, settings.data_dir, *items(64, 300), shard_items=64)
    await api.people(3)
    async with draining(ledger, settings):
        await until(lambda: engine.running == 24 + 8)
        await api.falls_silent()
        await asyncio.sleep(0.5)
        assert engine.running == 24 + 8
        assert not engine.aborted


@pytest.mark.usefixtures("api")
async def test_an_unknown_engine_gets_little(ledger: Ledger, settings: WorkerSettings, engine: FakeEngine) -> None:
    engine.scheduler = None
    engine.token_seconds = 0.01
    tally = Tally()
    files = await submitted(ledger, settings.data_dir, *items(24))
    async with draining(ledger, settings, tally):
        await over(ledger, files)
    assert engine.most_running == 4
    assert tally.warned


async def test_without_a_sign_of_the_api_little_is_sent_and_nothing_given_back(
    ledger: Ledger, settings: WorkerSettings, engine: FakeEngine, api: Api
) -> None:
    await submitted(ledger, settings.data_dir, *items(64, 300), shard_items=64)
    await api.falls_silent()
    async with draining(ledger, settings):
        await until(lambda: engine.running == 4)
        await asyncio.sleep(0.5)
        assert engine.running == 4
        await api.signs()
        await until(lambda: engine.running == 16)
        await api.falls_silent()
        await api.people(1)
        await asyncio.sleep(1)
        assert (engine.running, len(engine.aborted)) == (16, 0)


async def test_workers_share_what_is_meant_for_all(
    ledger: Ledger, settings: WorkerSettings, engine: FakeEngine, api: Api
) -> None:
    settings = settings.model_copy(update={"batch_floor": 2, "shard_items": 8})
    files = await submitted(ledger, settings.data_dir, *items(64, 40))
    for name in ("a", "b"):
        await ledger.beat(name, 60)
    await ledger.beat("q", 60, "quarantine")
    async with draining(ledger, settings), draining(ledger, settings):
        await until(lambda: engine.running == 32)
        await api.people(1)
        await until(lambda: engine.running == 2)
        await asyncio.sleep(0.3)
        assert engine.running == 2
        engine.token_seconds = 0.0
        await api.people(0)
        assert await over(ledger, files) is JobStatus.COMPLETED
    assert outcomes(files) == dict.fromkeys(range(64), "ok")


async def test_what_is_given_back_costs_no_try(
    ledger: Ledger, settings: WorkerSettings, engine: FakeEngine, api: Api
) -> None:
    files = await submitted(ledger, settings.data_dir, "status 500", "tokens 30")
    settings = settings.model_copy(update={"batch_floor": 0, "retry_backoff": 0.2})
    async with draining(ledger, settings):
        for _ in range(2):
            await until(lambda: engine.running)
            await api.people(1)
            await until(lambda: not engine.running)
            await api.people(0)
        engine.token_seconds = 0.0
        assert await over(ledger, files, 60) is JobStatus.COMPLETED
    assert outcomes(files) == {0: "engine_failed", 1: "ok"}
    assert 3 <= asked(engine).count("status 500") <= 3 + 2


async def test_a_stop_or_a_cancellation_while_people_are_there(
    ledger: Ledger, settings: WorkerSettings, engine: FakeEngine, api: Api
) -> None:
    settings = settings.model_copy(update={"drain_seconds": 60})
    files = await submitted(ledger, settings.data_dir, *items(24, 10))
    async with draining(ledger, settings) as stop:
        await until(lambda: engine.running == 16)
        await api.people(1)
        await until(lambda: engine.running == 1)
        stop.set()
    assert len(engine.requests) == 16, "something was sent after the stop"
    job = files.path.name
    assert (await ledger.job(files.path.parent.name, job)).completed <= 1
    async with draining(ledger, settings):
        await ledger.cancel(job)
        assert await over(ledger, files) is JobStatus.CANCELLED
