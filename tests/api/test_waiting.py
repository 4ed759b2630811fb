"""Waiting for a slot: in turn, with pings, for a bounded time, across processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from api.settings import ApiSettings
from tests.api.conftest import Door, front_door
from tests.api.test_limits import CHAT, chat, settled
from tests.fake_engine import FakeEngine
from workers import redis_keys
from workers.redis import connect


async def waiting(door: Door, count: int) -> None:
    """Until so many requests stand in the line of any key, as Redis sees it."""
    redis = connect(door.settings.redis_url, 5)
    async with asyncio.timeout(10):
        while True:
            keys = [key async for key in redis.scan_iter(f"{redis_keys.ROOT}limit:*:waiting")]
            if sum([await redis.zcard(key) for key in keys]) == count:
                break
            await asyncio.sleep(0.01)
    await redis.aclose()


@pytest.fixture
async def narrow(door: Door) -> AsyncIterator[httpx.AsyncClient]:
    """A client with a key that may do one thing at a time."""
    async with door.client(await door.new_key(concurrency=1, rpm=100)) as client:
        yield client


async def test_a_stream_waits_with_pings_and_is_then_served(door: Door, narrow: httpx.AsyncClient) -> None:
    door.engine.token_seconds = 0.4
    first = asyncio.create_task(narrow.post(CHAT, json=chat("tokens 3", stream=True)))
    async with asyncio.timeout(10):
        while not door.engine.running:
            await asyncio.sleep(0.01)
    second = await narrow.post(CHAT, json=chat("tokens 3", stream=True))
    assert (await first).status_code == second.status_code == 200
    assert ": ping" in second.text
    assert second.text.endswith("data: [DONE]\n\n")
    assert door.engine.most_running == 1


async def test_first_come_first_served_whoever_asks_where(
    settings: ApiSettings, engine: FakeEngine, door: Door
) -> None:
    """Two api processes' worth of gateways on one Redis: the line is one."""
    key = await door.new_key(concurrency=1)
    async with front_door(settings, engine) as other, door.client(key) as here, other.client(key) as there:
        async with asyncio.timeout(10):
            while not other.gateway.watch.up:
                await asyncio.sleep(0.01)
        running = asyncio.create_task(here.post(CHAT, json=chat("stall 1", stream=True)))
        async with asyncio.timeout(10):
            while not engine.running:
                await asyncio.sleep(0.01)
        queued = []
        for number in range(6):
            client = here if number % 3 else there
            queued.append(asyncio.create_task(client.post(CHAT, json=chat(f"turn {number}"))))
            await waiting(door, number + 1)
        with pytest.raises(httpx.RemoteProtocolError):  # it stalls, and is ended
            await running
        answers = await asyncio.gather(*queued)
        assert [answer.status_code for answer in answers] == [200] * 6
    turns = [request["messages"][-1]["content"] for request in engine.requests][1:]
    assert turns == [f"turn {number}" for number in range(6)]
    assert engine.most_running == 1


async def test_who_leaves_gives_up_the_place_and_pays_nothing(door: Door, narrow: httpx.AsyncClient) -> None:
    running = asyncio.create_task(narrow.post(CHAT, json=chat("hang")))
    async with asyncio.timeout(10):
        while not door.engine.running:
            await asyncio.sleep(0.01)
    before = (await narrow.get("/v1/models")).headers["x-ratelimit-remaining-requests"]
    leaving = asyncio.create_task(narrow.post(CHAT, json=chat("hi", stream=True)))
    await waiting(door, 1)
    leaving.cancel()
    await waiting(door, 0)
    async with asyncio.timeout(10):
        while (await narrow.get("/v1/models")).headers["x-ratelimit-remaining-requests"] < before:
            await asyncio.sleep(0.01)
    running.cancel()
    await settled(door)
    assert len(door.engine.requests) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_who_waited_too_long_is_told_so(settings: ApiSettings, engine: FakeEngine, stream: bool) -> None:
    impatient = settings.model_copy(update={"queue_wait": 0.6})
    async with front_door(impatient, engine) as door, door.client(await door.new_key(concurrency=1)) as client:
        running = asyncio.create_task(client.post(CHAT, json=chat("hang")))
        async with asyncio.timeout(10):
            while not engine.running:
                await asyncio.sleep(0.01)
        if stream:  # 200 went out with the first ping: an error event, and no clean end
            text = b""
            with pytest.raises(httpx.RemoteProtocolError):
                async with client.stream("POST", CHAT, json=chat("hi", stream=True)) as response:
                    async for data in response.aiter_bytes():
                        text += data
            assert b": ping" in text
            assert b"rate_limit_exceeded" in text
        else:
            refused = await client.post(CHAT, json=chat("hi"))
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
        running.cancel()
        await settled(door)


async def test_the_line_has_an_end(settings: ApiSettings, engine: FakeEngine) -> None:
    async with (
        front_door(settings.model_copy(update={"max_waiting": 1}), engine) as door,
        door.client(await door.new_key(concurrency=1)) as client,
    ):
        tasks = [asyncio.create_task(client.post(CHAT, json=chat("hang")))]
        async with asyncio.timeout(10):
            while not engine.running:
                await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(client.post(CHAT, json=chat("hi"))))
        await waiting(door, 1)
        refused = await client.post(CHAT, json=chat("hi"))
        assert refused.status_code == 429
        assert "too many wait" in refused.json()["error"]["message"]
        for task in tasks:
            task.cancel()
        await settled(door)


async def test_a_revoked_key_ends_what_runs_under_it(door: Door) -> None:
    text = await door.new_key()
    async with door.client(text) as client:
        running = asyncio.create_task(client.post(CHAT, json=chat("stall 1", stream=True)))
        async with asyncio.timeout(10):
            while not door.engine.running:
                await asyncio.sleep(0.01)
        await door.gateway.keys.revoke(text.split("_")[1])
        await door.gateway.limiter._renew()  # what happens every five seconds
        with pytest.raises(httpx.RemoteProtocolError):
            await running
        assert (await client.post(CHAT, json=chat("hi"))).status_code == 401
    await settled(door)
    assert len(door.engine.aborted) == 1


async def test_another_process_learns_of_a_change_at_the_next_request(
    settings: ApiSettings, engine: FakeEngine, door: Door
) -> None:
    text = await door.new_key(rpm=100)
    async with front_door(settings, engine) as other, other.client(text) as client:
        assert (await client.post(CHAT, json=chat("hi"))).status_code == 200  # now it is in the other's cache
        await door.gateway.keys.update(text.split("_")[1], rpm=50)
        assert (await client.post(CHAT, json=chat("hi"))).headers["x-ratelimit-limit-requests"] == "50"
        await door.gateway.keys.revoke(text.split("_")[1])
        assert (await client.post(CHAT, json=chat("hi"))).status_code == 401


async def test_a_process_that_ends_settles_what_it_breaks_off(settings: ApiSettings, engine: FakeEngine) -> None:
    hasty = settings.model_copy(update={"shutdown_seconds": 0, "stall_timeout": 60})
    async with front_door(hasty, engine) as door, door.client(await door.new_key(concurrency=1)) as client:
        stalled = asyncio.create_task(client.post(CHAT, json=chat("stall 5", stream=True)))
        async with asyncio.timeout(10):
            while not engine.running:
                await asyncio.sleep(0.01)
    with pytest.raises(httpx.TransportError):
        await stalled
    redis = connect(settings.redis_url, 5)
    left = [name async for name in redis.scan_iter(f"{redis_keys.ROOT}*")]
    usage = [await redis.hgetall(name) for name in left if b"usage" in name]
    await redis.aclose()
    assert not [name for name in left if b":request:" in name or b":leases" in name]
    assert int(usage[0][b"output_tokens"]) >= 4
