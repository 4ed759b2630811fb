"""What bulk workers see of interactive requests: those at the engine, and whether the api records them."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Any

import pytest

from api.limits import limiter
from api.settings import ApiSettings
from tests.api.conftest import Door, front_door
from tests.api.test_limits import CHAT, chat, settled
from tests.conftest import redis_server
from tests.fake_engine import FakeEngine
from workers.ledger import Ledger, People
from workers.redis import connect


async def until(ledger: Ledger, told: Callable[[People], bool], seconds: float = 20) -> People:
    async with asyncio.timeout(seconds):
        while not told(people := await ledger.people()):
            await asyncio.sleep(0.02)
    return people


async def ended(door: Door, *requests: asyncio.Task[Any]) -> None:
    for request in requests:
        request.cancel()
    await asyncio.gather(*requests, return_exceptions=True)
    await settled(door)


async def at_engine(door: Door, count: int) -> None:
    async with asyncio.timeout(20):
        while door.engine.running < count:
            await asyncio.sleep(0.01)


async def test_who_waits_for_a_slot_is_not_at_the_engine(door: Door) -> None:
    async with door.client(await door.new_key(concurrency=2)) as client:
        requests = [asyncio.create_task(client.post(CHAT, json=chat("hang"))) for _ in range(3)]
        await at_engine(door, 2)
        async with asyncio.timeout(10):
            while not door.gateway.limiter._book.waiting:
                await asyncio.sleep(0.01)
        assert (await door.gateway.ledger.people()).requests == 2
        await ended(door, *requests)
    assert (await door.gateway.ledger.people()).requests == 0


async def test_requests_of_an_open_door_are_seen_too(settings: ApiSettings, engine: FakeEngine) -> None:
    async with front_door(settings.model_copy(update={"open": True}), engine) as door, door.client() as client:
        async with asyncio.timeout(30):
            while not door.gateway.watch.up:
                await asyncio.sleep(0.01)
        request = asyncio.create_task(client.post(CHAT, json=chat("hang")))
        await at_engine(door, 1)
        assert (await door.gateway.ledger.people()).requests == 1
        await ended(door, request)


async def test_the_api_says_every_second_that_it_records(door: Door) -> None:
    for _ in range(3):
        await asyncio.sleep(1)
        people = await door.gateway.ledger.people()
        assert people.silence is not None
        assert people.silence < 5  # what a worker believes; a busy machine may take its time


async def test_requests_that_were_let_in_without_redis_are_recorded_when_it_is_back(
    settings: ApiSettings, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limiter, "RENEW_SECONDS", 1000.0)
    with redis_server() as (url, process):
        own = settings.model_copy(update={"redis_url": url, "outage_seconds": 60.0, "stall_timeout": 60.0})
        redis = connect(url, 5)
        async with front_door(own, engine) as door, door.client() as client:
            async with asyncio.timeout(30):
                while not door.gateway.watch.up:
                    await asyncio.sleep(0.01)
            assert (await client.post(CHAT, json=chat("hi"))).status_code == 200
            await settled(door)
            process.send_signal(signal.SIGSTOP)
            try:
                requests = []
                for count in (1, 2):  # the first finds out that Redis is away, the second does not ask it any more
                    requests.append(asyncio.create_task(client.post(CHAT, json=chat("stall 1", stream=True))))
                    await at_engine(door, count)
            finally:
                process.send_signal(signal.SIGCONT)
            await until(Ledger(redis), lambda told: told.requests == 2)
            await ended(door, *requests)
        await redis.aclose()
