"""/webhooks and `velocity webhooks`: a tenant's own secret, and test events that say what came of them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from ipaddress import ip_network

import orjson
import pytest

from api.keys import Scope, Terms
from api.settings import ApiSettings
from tests.api.conftest import Door, front_door
from tests.fake_engine import FakeEngine
from tests.webhook_receiver import Receiver, answer, receiving


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as running:
        yield running


@pytest.fixture
async def allowing(settings: ApiSettings, engine: FakeEngine) -> AsyncIterator[Door]:
    """A front door whose webhooks may go to this machine."""
    allow = {"webhook_allow": (ip_network("127.0.0.0/8"),)}
    async with front_door(settings.model_copy(update=allow), engine) as running:
        yield running


async def secret_of(door: Door, key: str) -> str:
    async with door.client(key) as client:
        response = await client.get("/webhooks/secret")
    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-store"
    assert set(response.json()) == {"secret"}
    return str(response.json()["secret"])


async def test_a_secret_belongs_to_a_tenant(door: Door) -> None:
    secret = await secret_of(door, door.key)
    assert secret.startswith("whsec_")
    assert secret != await secret_of(door, await door.new_key())
    tenant = (await door.gateway.keys.get(door.key.split("_")[1])).tenant
    sister = (await door.gateway.keys.create(Terms(name="sister"), tenant))[1]
    assert secret == await secret_of(door, sister)


async def test_it_takes_the_scope_jobs(door: Door) -> None:
    async with door.client(await door.new_key(scopes=tuple(set(Scope) - {Scope.JOBS}))) as client:
        assert (await client.get("/webhooks/secret")).status_code == 403
        assert (await client.post("/webhooks/test", json={"url": "https://example.com"})).status_code == 403
    async with door.client() as client:
        assert (await client.post("/webhooks/secret")).status_code == 405
        assert (await client.get("/webhooks")).status_code == 404


async def test_a_test_event_is_sent_at_once(allowing: Door, receiver: Receiver) -> None:
    async with allowing.client() as client:
        response = await client.post("/webhooks/test", json={"url": receiver.url})
    assert response.status_code == 200
    result = response.json()
    assert result.pop("seconds") >= 0
    assert result == {"delivered": True, "status_code": 204, "error": None}
    (event,) = receiver.events
    assert orjson.loads(event.body)["type"] == "webhook.test"
    assert event.signed_with(await secret_of(allowing, allowing.key))


async def test_a_job_tells_that_it_is_over(allowing: Door, receiver: Receiver) -> None:
    items = [{"id": str(number), "messages": [{"role": "user", "content": "hi"}]} for number in range(3)]
    job = {"model": "tiny", "items": items, "webhook": receiver.url, "metadata": {"order": "7"}, "name": "n"}
    async with asyncio.timeout(60), allowing.client() as client:
        while (response := await client.post("/jobs", json=job)).status_code == 503:
            await asyncio.sleep(0.05)  # the engine has not been seen yet
        assert response.status_code == 202, response.text
        await allowing.drain()
        while not receiver.events:
            await asyncio.sleep(0.05)
    (event,) = receiver.events
    assert event.id == f"evt_{response.json()['id']}"
    assert event.signed_with(await secret_of(allowing, allowing.key))
    content = orjson.loads(event.body)
    assert content["type"] == "job.completed"
    assert content["data"]["counts"] == {"total": 3, "completed": 3, "failed": 0}
    assert content["data"]["metadata"] == {"order": "7"}


async def test_what_went_wrong_is_answered(allowing: Door, receiver: Receiver) -> None:
    receiver.reply = answer(302, "location: https://example.com")
    async with allowing.client() as client:
        result = (await client.post("/webhooks/test", json={"url": receiver.url})).json()
        assert (result["delivered"], result["status_code"]) == (False, 302)
        assert "redirects" in result["error"]
        result = (await client.post("/webhooks/test", json={"url": "http://127.0.0.1:9/"})).json()
        assert (result["delivered"], result["status_code"]) == (False, None)


@pytest.mark.parametrize(
    "body",
    [{}, {"url": 1}, {"url": "http://example.com"}, {"url": "https://127.0.0.1/"}, {"url": "https://169.254.169.254/"}],
)
async def test_addresses_that_no_event_goes_to(door: Door, body: dict[str, object]) -> None:
    async with door.client() as client:
        response = await client.post("/webhooks/test", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "url"


async def test_a_key_sends_few_tests(allowing: Door, receiver: Receiver) -> None:
    async with allowing.client() as client:
        ask = {"url": receiver.url}
        statuses = [(await client.post("/webhooks/test", json=ask)).status_code for _ in range(10)]
        refused = await client.post("/webhooks/test", json=ask)
    assert statuses == [200] * 10
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert len(receiver.events) == 10
    async with allowing.client(await allowing.new_key()) as client:
        assert (await client.post("/webhooks/test", json=ask)).status_code == 200


async def command(door: Door, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`velocity webhooks …` as a person runs it."""
    env = os.environ | {"VELOCITY_URL": door.url, "VELOCITY_API_KEY": door.key, "COLUMNS": "60"}
    return await asyncio.to_thread(
        subprocess.run, [sys.executable, "-m", "api.cli.main", "webhooks", *arguments],
        env=env, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


async def test_the_commands(allowing: Door, receiver: Receiver) -> None:
    shown = await command(allowing, "secret")
    assert (shown.returncode, shown.stdout) == (0, await secret_of(allowing, allowing.key) + "\n")
    sent = await command(allowing, "test", receiver.url)
    assert sent.returncode == 0, sent.stderr
    assert "answered 204" in sent.stdout
    receiver.reply = answer(500)
    failed = await command(allowing, "test", receiver.url)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "Not delivered" in failed.stderr
    assert "The receiver answered 500." in failed.stderr
    refused = await command(allowing, "test", "https://10.0.0.1/")
    assert refused.returncode == 1
    assert "not public" in refused.stderr
    assert len(receiver.events) == 2
