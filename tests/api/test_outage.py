"""Redis gone or frozen: chat goes on for known keys under a local share, all else fails closed, nothing hangs."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from subprocess import Popen
from typing import Any

import pytest

from api.errors import ApiError
from api.keys import Key, Terms
from api.limits.outage import LocalShare
from api.limits.rates import Rates
from api.settings import ApiSettings
from tests.api.conftest import Door, front_door
from tests.api.test_limits import CHAT, chat, settled
from tests.conftest import redis_server
from tests.fake_engine import FakeEngine


@dataclass
class Stage:
    """A front door with a Redis of its own."""

    door: Door
    redis: Popen[bytes]

    def freeze(self) -> None:
        self.redis.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.redis.send_signal(signal.SIGCONT)


@pytest.fixture
async def stage(settings: ApiSettings, engine: FakeEngine) -> AsyncIterator[Stage]:
    with redis_server() as (url, process):
        own = settings.model_copy(update={"redis_url": url, "outage_seconds": 3.0})
        async with front_door(own, engine) as door:
            async with asyncio.timeout(30):
                while not door.gateway.watch.up:
                    await asyncio.sleep(0.01)
            yield Stage(door, process)
            process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
async def test_a_known_key_goes_on_under_its_share(stage: Stage, how: signal.Signals) -> None:
    door = stage.door
    key, unknown, admin = (
        await door.new_key(rpm=6, burst=3),
        await door.new_key(),
        await door.new_key(scopes=("admin",)),
    )
    async with door.client(key) as client, door.client(unknown) as stranger, door.client(admin) as operator:
        assert (await client.post(CHAT, json=chat("hi"))).status_code == 200
        assert (await operator.get("/admin/keys")).status_code == 200
        stage.redis.send_signal(how)
        door.gateway.keys._cache = {  # as it is when five seconds have passed
            name: (at - 6, cached) for name, (at, cached) in door.gateway.keys._cache.items()
        }
        answers = [await client.post(CHAT, json=chat("hi")) for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
        assert 5 < int(answers[-1].headers["retry-after"]) <= 10
        item = {"id": "a", "messages": [{"role": "user", "content": "hi"}]}
        refusals = [
            await stranger.post(CHAT, json=chat("hi")),
            await client.post("/jobs", json={"model": "tiny", "items": [item]}),
            await client.get("/jobs"),
            await operator.get("/admin/keys"),
            await client.get("/v1/usage"),
        ]
        for refused in refusals:
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "redis_unavailable")
        assert (
            max(answer.elapsed.total_seconds() for answer in answers + refusals) < 5
        )  # it is bounded: see the settings
        text = door.gateway.metrics.render()[0].decode()
        assert 'velocity_local_decisions_total{outcome="admitted"} 3.0' in text
        assert 'velocity_local_decisions_total{outcome="refused"} 2.0' in text
        assert "velocity_redis_failures_total{" in text
        await asyncio.sleep(3.2)
        over = await client.post(CHAT, json=chat("hi"))
        assert (over.status_code, over.json()["error"]["code"]) == (503, "redis_unavailable")
    assert len(door.engine.requests) == 4


async def test_when_redis_is_back_it_decides_again(stage: Stage) -> None:
    door = stage.door
    async with door.client(await door.new_key(rpm=600, burst=10)) as client:
        assert (await client.post(CHAT, json=chat("hi"))).status_code == 200
        stage.freeze()
        assert (await client.post(CHAT, json=chat("hi"))).status_code == 200
        stage.thaw()
        async with asyncio.timeout(10):
            while door.gateway.limiter._redis.down_since is not None:
                assert (await client.get("/v1/models")).status_code == 200
                await asyncio.sleep(0.1)
        assert (await client.post(CHAT, json=chat("hi"))).status_code == 200
    await settled(door)


async def test_a_stream_outlives_the_loss_of_redis(stage: Stage) -> None:
    stage.door.engine.token_seconds = 0.05
    async with stage.door.client() as client:
        async with client.stream("POST", CHAT, json=chat("tokens 20", stream=True)) as response:
            text = ""
            async for part in response.aiter_text():
                text += part
                if "t1 " in text:
                    stage.redis.kill()
        assert text.endswith("data: [DONE]\n\n")
    await settled(stage.door)


def key(**terms: Any) -> Key:
    return Key(**Terms(name="x", **terms).model_dump(), id="0" * 12, tenant="t", hash="", created=0)


def taken(share: LocalShare, key: Key, cost: int, processes: int, running: int = 0, whole: Rates | None = None) -> bool:
    try:
        share.admit(key, whole or Rates(), cost, processes, (running, running))
    except ApiError:
        return False
    return True


def test_each_process_has_an_equal_part() -> None:
    requests = LocalShare()
    assert sum(taken(requests, key(rpm=60, burst=8), 1, processes=4) for _ in range(20)) == 2
    tokens = LocalShare()
    assert sum(taken(tokens, key(tpm=4000), 100, processes=4) for _ in range(40)) == 10
    assert taken(LocalShare(), key(concurrency=4), 1, processes=4, running=0)
    assert not taken(LocalShare(), key(concurrency=4), 1, processes=4, running=1)
    assert not taken(LocalShare(), key(), 1, processes=1, running=3, whole=Rates(concurrency=3))


def test_an_idle_key_is_let_in_whatever_its_rate() -> None:
    assert all(taken(LocalShare(), key(rpm=rpm, burst=1), 1, 1) for rpm in (1, 7, 70, 600) for _ in range(200))


def test_what_was_not_used_flows_back() -> None:
    share, limited = LocalShare(), key(tpm=1000)
    assert taken(share, limited, 1000, 1)
    assert not taken(share, limited, 500, 1)
    share.give_back(limited, Rates(), 900, 1)
    assert taken(share, limited, 500, 1)
