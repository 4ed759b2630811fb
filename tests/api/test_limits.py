"""Limits over real HTTP: what each way of ending a request costs, and what clients are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from api.settings import ApiSettings
from tests.api.conftest import Door, front_door
from tests.fake_engine import FakeEngine

CHAT = "/v1/chat/completions"


def chat(content: str, **fields: object) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 100, **fields}


async def tokens_used(client: httpx.AsyncClient) -> int:
    """Of the key's tokens per minute, less what has flowed back meanwhile."""
    headers = (await client.get("/v1/models")).headers
    return int(headers["x-ratelimit-limit-tokens"]) - int(headers["x-ratelimit-remaining-tokens"])


async def settled(door: Door) -> None:
    """All requests are over and accounted."""
    async with asyncio.timeout(10):
        while door.gateway.limiter._book.all() or door.gateway.limiter._settling:
            await asyncio.sleep(0.01)


@pytest.fixture
async def limited(door: Door) -> AsyncIterator[httpx.AsyncClient]:
    """A client with a key of 600 tokens per minute: ten flow back in a second."""
    async with door.client(await door.new_key(tpm=600)) as client:
        yield client


@pytest.fixture
async def measured(door: Door) -> AsyncIterator[httpx.AsyncClient]:
    """A client with a key to which tokens flow back slowly, 2.5 in a second: what is used can be seen for a while."""
    async with door.client(await door.new_key(tpm=150)) as client:
        yield client


@pytest.mark.parametrize(
    ("body", "used"),
    [
        (chat("tokens 5"), 12),  # the fake engine counts 7 input tokens
        (chat("tokens 5", stream=True), 12),
        (chat("status 400"), 0),
        (chat("status 500", stream=True), 0),
        (chat("die"), 0),
    ],
)
async def test_what_was_used_is_what_counts(
    door: Door, measured: httpx.AsyncClient, body: dict[str, Any], used: int
) -> None:
    response = await measured.post(CHAT, json=body)
    await settled(door)
    assert int(response.headers["x-ratelimit-remaining-tokens"]) < 150 - 100  # while it ran, all it may take was taken
    assert used - 5 <= await tokens_used(measured) <= used


async def test_an_answer_that_timed_out_was_not_free(settings: ApiSettings, engine: FakeEngine) -> None:
    """Nobody knows how far the engine had come, so what was reserved stays spent."""
    hasty = settings.model_copy(update={"total_timeout": 0.3})
    async with front_door(hasty, engine) as door, door.client(await door.new_key(tpm=600)) as client:
        assert (await client.post(CHAT, json=chat("hang"))).status_code == 504
        await settled(door)
        assert await tokens_used(client) >= 100


async def test_an_aborted_stream_costs_what_was_generated(door: Door, measured: httpx.AsyncClient) -> None:
    async with measured.stream("POST", CHAT, json=chat("stall 20", stream=True)) as response:
        async for line in response.aiter_lines():
            if "t19" in line:
                break
    await settled(door)
    assert 40 <= await tokens_used(measured) <= 60  # the prompt by its length, and an event per token


async def test_a_broken_stream_costs_what_was_generated(door: Door, measured: httpx.AsyncClient) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        await measured.post(CHAT, json=chat("break 20", stream=True))
    await settled(door)
    assert 40 <= await tokens_used(measured) <= 60


async def test_tokens_that_do_not_fit_now_or_never(limited: httpx.AsyncClient) -> None:
    never = await limited.post(CHAT, json=chat("hi", max_tokens=5000))
    assert never.status_code == 429
    assert never.headers["x-should-retry"] == "false"
    assert "retry-after" not in never.headers
    assert never.json()["error"]["type"] == "tokens"
    assert await tokens_used(limited) == 0
    assert (await limited.post(CHAT, json=chat("tokens 550", max_tokens=550))).status_code == 200
    refused = await limited.post(CHAT, json=chat("hi", max_tokens=60))
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "tokens")
    assert refused.headers["x-ratelimit-limit-tokens"] == "600"
    wait = int(refused.headers["retry-after-ms"]) / 1000
    assert 0 < wait < 15
    assert int(refused.headers["retry-after"]) >= wait
    assert "600 tokens per minute" in refused.json()["error"]["message"]
    await asyncio.sleep(wait)
    assert (await limited.post(CHAT, json=chat("hi", max_tokens=60))).status_code == 200


async def test_waiting_as_long_as_told_succeeds(door: Door) -> None:
    async with door.client(await door.new_key(rpm=60, burst=2)) as client:
        for _ in range(2):
            assert (await client.post(CHAT, json=chat("hi"))).status_code == 200
        refused = await client.post(CHAT, json=chat("hi"))
        assert refused.status_code == 429
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        await asyncio.sleep(int(refused.headers["retry-after-ms"]) / 1000)
        assert (await client.post(CHAT, json=chat("hi"))).status_code == 200


async def test_a_refused_request_costs_nothing(door: Door) -> None:
    async with door.client(await door.new_key(rpm=1000, tpm=6000, concurrency=1)) as client:
        before = (await client.get("/v1/models")).headers
        refused = await client.post(CHAT, json=chat("hi", max_tokens=6000))
        invalid = await client.post(CHAT, content=b"{")
        unknown = await client.post(CHAT, json={**chat("hi"), "model": "none"})
        after = (await client.get("/v1/models")).headers
    assert [answer.status_code for answer in (refused, invalid, unknown)] == [429, 400, 404]
    for name in ("requests", "tokens"):
        assert after[f"x-ratelimit-remaining-{name}"] == before[f"x-ratelimit-remaining-{name}"]
        assert invalid.headers[f"x-ratelimit-remaining-{name}"] == before[f"x-ratelimit-remaining-{name}"]


async def test_every_answer_says_how_the_limits_stand(door: Door) -> None:
    async with door.client(await door.new_key(rpm=60, tpm=60000)) as client:
        item = {"id": "a", "messages": [{"role": "user", "content": "hi"}]}
        answers = [
            await client.post(CHAT, json=chat("hi")),
            await client.post(CHAT, json=chat("hi", stream=True)),
            await client.post(CHAT, json=chat("status 400")),
            await client.post("/jobs", json={"model": "tiny", "items": [item]}),
            await client.get("/jobs"),
            await client.get("/nothing"),
            await client.get("/v1/usage"),
        ]
    assert [answer.status_code for answer in answers] == [200, 200, 400, 202, 200, 404, 200]
    for answer in answers:
        for name, limit in (("requests", "60"), ("tokens", "60000")):
            assert answer.headers[f"x-ratelimit-limit-{name}"] == limit
            assert 0 <= int(answer.headers[f"x-ratelimit-remaining-{name}"]) <= int(limit)
            assert answer.headers[f"x-ratelimit-reset-{name}"].endswith("s")


@pytest.mark.parametrize(
    ("limits", "code"), [({"global_rpm": 1}, "overloaded"), ({"global_concurrency": 1, "queue_wait": 0}, "overloaded")]
)
async def test_the_global_limit_is_nobodys_fault(
    settings: ApiSettings, engine: FakeEngine, limits: dict[str, Any], code: str
) -> None:
    async with (
        front_door(settings.model_copy(update=limits), engine) as door,
        door.client() as client,
        client.stream("POST", CHAT, json=chat("stall 1", stream=True)) as first,
        door.client(await door.new_key()) as other,
    ):
        assert first.status_code == 200
        refused = await other.post(CHAT, json=chat("hi"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, code)
    assert int(refused.headers["retry-after"]) >= 1


async def test_a_key_is_bound_to_its_terms(door: Door) -> None:
    async with door.client(await door.new_key(max_tokens=7, models=("velocity-30b",))) as client:
        assert (await client.post(CHAT, json={**chat("hi"), "model": "vllm/velocity-30b"})).status_code == 200
        assert door.engine.requests[-1]["max_tokens"] == 7
        refused = await client.post(CHAT, json=chat("hi"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_allowed")
        assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == ["velocity-30b"]
        job = {"model": "tiny", "items": [{"id": "a", "messages": [{"role": "user"}]}]}
        assert (await client.post("/jobs", json=job)).status_code == 403
    async with door.client(await door.new_key(expires=1)) as client:
        expired = await client.get("/v1/models")
    assert expired.status_code == 401
    assert "expired on 1970-01-01" in expired.json()["error"]["message"]


async def test_prompts_are_cached_per_tenant(door: Door) -> None:
    async with door.client() as client, door.client(await door.new_key()) as other:
        for each in (client, client, other):
            await each.post(CHAT, json={**chat("hi"), "cache_salt": "theirs"})
    salts = [request["cache_salt"] for request in door.engine.requests]
    assert salts[0] == salts[1] != salts[2]
    assert "theirs" not in salts
