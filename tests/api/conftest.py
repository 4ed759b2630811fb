"""The front door on a free port, in front of a fake engine and a real Redis."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.gateway import Gateway
from api.keys import Terms
from api.server import Server, config
from api.settings import ApiSettings
from engine.client import EngineClient
from engine.ports import listen
from tests.fake_engine import FakeEngine, fake_engine
from workers.errors import LedgerUnavailable
from workers.ledger import Ledger
from workers.pump import Pump
from workers.redis import connect


@dataclass
class Door:
    """A running front door."""

    url: str
    settings: ApiSettings
    gateway: Gateway
    engine: FakeEngine
    key: str

    async def new_key(self, **terms: Any) -> str:
        """The text of another key."""
        return (await self.gateway.keys.create(Terms(**{"name": "other", **terms})))[1]

    def client(self, key: str | None = None) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, headers={"authorization": f"Bearer {key or self.key}"})

    async def drain(self, stop: threading.Event | None = None) -> None:
        """What a worker does with one ticket, or until it is told to stop."""
        redis = connect(self.settings.redis_url, 5)
        async with EngineClient(self.settings.engine_url) as engine:
            await Pump(Ledger(redis), engine, self.settings).drain(stop or threading.Event())
        await redis.aclose()


async def first_key(gateway: Gateway) -> str:
    """The text of a key, also where the machine is so busy that Redis seems to be away at first."""
    while True:
        try:
            return (await gateway.keys.create(Terms(name="test")))[1]
        except LedgerUnavailable:
            await asyncio.sleep(0.2)


@asynccontextmanager
async def front_door(settings: ApiSettings, engine: FakeEngine) -> AsyncIterator[Door]:
    with listen("127.0.0.1", 0, "a test") as bound:
        async with Gateway.opened(settings) as gateway:
            server = Server(config(gateway))
            serving = asyncio.create_task(server.serve(sockets=[bound]))
            try:
                async with asyncio.timeout(30):
                    while not server.started:
                        if serving.done():
                            serving.result()
                        await asyncio.sleep(0.01)
                    key = "none" if settings.open else await first_key(gateway)
                yield Door(f"http://127.0.0.1:{bound.getsockname()[1]}", settings, gateway, engine, key)
            finally:
                server.should_exit = True
                await serving


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with fake_engine() as running:
        yield running


@pytest.fixture
def settings(clean_redis: str, engine: FakeEngine, tmp_path: Path) -> ApiSettings:
    return ApiSettings(
        redis_url=clean_redis, engine_url=engine.url, data_dir=tmp_path, shard_items=8, lease_seconds=2,
        retry_backoff=0.01, head_wait=0.2, ping_interval=0.2, stall_timeout=0.5, first_token_timeout=2,
        shutdown_seconds=1, limiter_timeout=0.5, drain_seconds=0.2,
    )  # fmt: skip


@pytest.fixture
async def door(settings: ApiSettings, engine: FakeEngine) -> AsyncIterator[Door]:
    """A front door that has seen its engine."""
    async with front_door(settings, engine) as running:
        async with asyncio.timeout(30):
            while not running.gateway.watch.up:
                await asyncio.sleep(0.01)
        yield running
