"""Keys, limits, health and the shape of errors, over real HTTP."""

from __future__ import annotations

import asyncio
import re
import time

import httpx
import pytest

from api.fast_redis import FastRedis
from api.key_store import Keys
from api.keys import Terms, new_text
from api.metrics import Metrics
from api.settings import ApiSettings
from engine.errors import SettingsError
from engine.ports import free_port
from tests.api.conftest import Door, front_door
from tests.fake_engine import FakeEngine
from workers import redis_keys
from workers.errors import LedgerUnavailable
from workers.redis import connect

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
ROUTES = [
    ("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"),
    ("POST", "/v1/responses"), ("POST", "/v1/embeddings"), ("POST", "/jobs"), ("GET", "/jobs"),
    ("GET", "/jobs/job_" + "0" * 32), ("GET", "/jobs/job_" + "0" * 32 + "/results"),
    ("POST", "/jobs/job_" + "0" * 32 + "/cancel"), ("POST", "/jobs/job_" + "0" * 32 + "/retry"),
    ("GET", "/jobs/job_" + "0" * 32 + "/events"), ("DELETE", "/jobs/job_" + "0" * 32), ("POST", "/v1/files"),
    ("GET", "/v1/files"), ("GET", "/v1/files/file-" + "0" * 32 + "/content"), ("POST", "/v1/batches"),
    ("GET", "/v1/batches/batch_" + "0" * 32), ("GET", "/webhooks/secret"), ("POST", "/webhooks/test"),
    ("GET", "/nothing"), ("GET", "/docs"), ("GET", "/openapi.json"),
]  # fmt: skip


async def test_no_route_without_a_key(door: Door) -> None:
    for authorization in (None, "", "Bearer", "Bearer nonsense", "Basic dXNlcjpwdw==", "Bearer vk_0_0_00000000"):
        headers = {} if authorization is None else {"authorization": authorization}
        async with httpx.AsyncClient(base_url=door.url, headers=headers) as client:
            for method, path in ROUTES:
                response = await client.request(method, path, json=CHAT if method == "POST" else None)
                assert response.status_code == 401, (authorization, method, path)
                assert response.json()["error"]["code"] in {"missing_api_key", "invalid_api_key"}
    assert not door.engine.requests


async def test_a_wrong_secret_with_a_right_id_is_refused(door: Door) -> None:
    other = await door.new_key()
    mixed = "_".join([*door.key.split("_")[:2], *other.split("_")[2:]])
    async with door.client(mixed) as client:
        assert (await client.get("/v1/models")).status_code == 401


async def test_only_the_hash_of_a_key_is_kept(door: Door, settings: ApiSettings) -> None:
    secret = door.key.split("_")[2]
    redis = connect(settings.redis_url, 5)
    stored = await redis.hgetall(redis_keys.api_key(door.key.split("_")[1]))
    await redis.aclose()
    files = [file.read_text() for file in (settings.data_dir / "keys").iterdir()]
    assert stored
    assert files
    assert all(secret not in text for text in [str(stored), *files])


async def test_keys_survive_the_loss_of_redis(door: Door, settings: ApiSettings) -> None:
    redis = connect(settings.redis_url, 5)
    await redis.flushall()
    async with door.client() as client:
        assert (await client.get("/v1/models")).status_code == 200
    assert await redis.exists(redis_keys.api_key(door.key.split("_")[1]))
    await redis.aclose()


async def test_a_limited_key_is_told_when_to_come_back(door: Door) -> None:
    key = await door.new_key(rpm=2)
    async with door.client(key) as client:
        first, second, third = [await client.post("/v1/chat/completions", json=CHAT) for _ in range(3)]
    assert (first.status_code, second.status_code, third.status_code) == (200, 200, 429)
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert (first.headers["x-ratelimit-remaining-requests"], second.headers["x-ratelimit-remaining-requests"]) == (
        "1",
        "0",
    )
    error = third.json()["error"]
    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
    assert 28 <= int(third.headers["retry-after"]) <= 30
    assert len(door.engine.requests) == 2


async def test_waiting_as_long_as_retry_after_says_succeeds(door: Door) -> None:
    key = await door.new_key(rpm=120)
    async with door.client(key) as client:
        answers = await asyncio.gather(*(client.post("/v1/chat/completions", json=CHAT) for _ in range(125)))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused
        wait = max(int(answer.headers["retry-after-ms"]) for answer in refused) / 1000
        began = time.monotonic()
        await asyncio.sleep(wait)
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        assert time.monotonic() - began < 60


async def test_health_needs_no_key_and_names_each_part_to_who_has_one(door: Door) -> None:
    async with httpx.AsyncClient(base_url=door.url) as client, door.client() as holder:
        for stranger in (
            await client.get("/health"),
            await client.get("/health", headers={"authorization": "Bearer x"}),
        ):
            assert (stranger.status_code, stranger.json()) == (200, {"status": "degraded"})
        parts = {"status": "degraded", "engine": "ok", "protection": "none", "redis": "ok", "workers": "none"}
        assert (await holder.get("/health")).json() == parts
        await door.gateway.ledger.beat("worker-1", 15)
        assert (await client.get("/health")).json()["status"] == "ok"


async def test_without_redis_nothing_hangs_and_bulk_says_503(settings: ApiSettings, engine: FakeEngine) -> None:
    away = settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{free_port()}/0", "open": True})
    async with front_door(away, engine) as door, door.client() as client:
        health = await client.get("/health")
        assert (health.status_code, health.json()["redis"], health.json()["status"]) == (200, "down", "degraded")
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200  # open mode needs no Redis
        job = await client.post("/jobs", json={"model": "tiny", "items": [{"id": "a", "messages": [{"role": "user"}]}]})
        assert job.status_code == 503
        assert job.headers["retry-after"]
        assert job.json()["error"]["code"] == "redis_unavailable"


async def test_a_key_that_redis_can_not_confirm_is_503_not_401(settings: ApiSettings, engine: FakeEngine) -> None:
    async with front_door(settings, engine) as door:
        dead = FastRedis(f"redis://127.0.0.1:{free_port()}/0", 1, Metrics())
        object.__setattr__(door.gateway.keys, "_redis", dead)
        async with door.client() as client:
            response = await client.get("/v1/models")
        await dead.aclose()
    assert response.status_code == 503
    assert response.headers["retry-after"]


async def test_models_and_aliases(door: Door) -> None:
    async with door.client() as client:
        listed = (await client.get("/v1/models")).json()
        assert [card["id"] for card in listed["data"]] == ["tiny", "velocity-30b"]
        assert (await client.get("/v1/models/vllm/velocity-30b")).json()["id"] == "tiny"
        missing = await client.get("/v1/models/gpt-5")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        (b"{}", 400, None),
        (b'{"model": 5}', 400, None),
        (b'{"model": "gpt-5"}', 404, "model_not_found"),
    ],
)
async def test_bad_bodies(door: Door, body: bytes, status: int, code: str | None) -> None:
    async with door.client() as client:
        response = await client.post("/v1/chat/completions", content=body)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code


async def test_unknown_addresses_and_methods_have_openais_shape(door: Door) -> None:
    async with door.client() as client:
        for method, path, status in (
            ("GET", "/nothing", 404),
            ("GET", "/v1/chat/completions", 405),
            ("POST", "/jobs/", 404),
            ("PUT", "/jobs", 405),
        ):
            response = await client.request(method, path)
            assert response.status_code == status
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_metrics_name_routes_and_no_ids(door: Door) -> None:
    async with door.client() as client:
        for method, path in ROUTES:
            await client.request(method, path)
            await client.request(method, f"{path}/x?after=y")
    text = door.gateway.metrics.render()[0].decode()
    assert 'route="/v1/files/{file_id}/content"' in text
    assert 'route="/jobs/{job_id}/events"' in text
    assert "0" * 32 not in text  # the ids above
    assert len(set(re.findall(r'route="([^"]*)"', text))) <= len(ROUTES)


async def test_open_mode_takes_any_key(settings: ApiSettings, engine: FakeEngine) -> None:
    async with front_door(settings.model_copy(update={"open": True}), engine) as door, door.client("dummy") as client:
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200


def test_open_mode_is_refused_on_a_public_address() -> None:
    with pytest.raises(SettingsError):
        ApiSettings(open=True, host="0.0.0.0")
    ApiSettings(open=True, host="0.0.0.0", open_public=True)


async def test_a_bootstrap_key_is_adopted_at_start(settings: ApiSettings, engine: FakeEngine) -> None:
    file = settings.data_dir / "first-key"
    with_file = settings.model_copy(update={"bootstrap_key_file": file})
    text = new_text()[1]
    file.write_text(text + "\n")
    for _ in range(2):  # a restart changes nothing
        async with front_door(with_file, engine) as door, door.client(text) as client:
            assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.parametrize("content", ["", "vk_nonsense", None])
async def test_an_unusable_bootstrap_key_is_refused(
    settings: ApiSettings, engine: FakeEngine, content: str | None
) -> None:
    file = settings.data_dir / "first-key"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError, match="first-key"):
        async with front_door(settings.model_copy(update={"bootstrap_key_file": file}), engine):
            pass


async def test_a_key_that_redis_did_not_take_is_not_made(settings: ApiSettings) -> None:
    dead = FastRedis(f"redis://127.0.0.1:{free_port()}/0", 1, Metrics())
    with pytest.raises(LedgerUnavailable):
        await Keys(dead, settings.data_dir).create(Terms(name="x"))
    await dead.aclose()
    assert not (settings.data_dir / "keys").exists()
