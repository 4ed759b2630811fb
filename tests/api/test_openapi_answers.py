"""What the routes answer is what the document says: each of them asked, once for each kind of answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import pytest
import schemathesis

from api.keys import Scope
from api.settings import ApiSettings
from tests.api.conftest import Door, front_door
from tests.fake_engine import FakeEngine

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = {"model": "tiny", "messages": MESSAGES}


@pytest.fixture
async def documented(settings: ApiSettings, engine: FakeEngine) -> AsyncIterator[Door]:
    """A front door that serves its document."""
    patient = {"limiter_timeout": 20.0, "api_redis_timeout": 20.0}  # a 503 of a slow machine is not what is asked for
    async with front_door(settings.model_copy(update={"docs": True, **patient}), engine) as door:
        await door.gateway.watch.refresh()
        yield door


async def served(door: Door) -> dict[str, Any]:
    async with door.client() as client:
        response = await client.get("/openapi.json")
    assert response.status_code == 200
    return dict(response.json())


class Asker:
    """Asks, and holds each answer against the document."""

    def __init__(self, client: httpx.AsyncClient, content: dict[str, Any]) -> None:
        self._client = client
        self._schema = schemathesis.openapi.from_dict(content)
        self.asked: set[tuple[str, str]] = set()
        """Method and path of what was answered well."""

    async def __call__(self, method: str, template: str, status: int, json: Any = None, **more: Any) -> Any:
        """The answer. `more` are parts of the address, or options of httpx."""
        options = {name: more.pop(name) for name in ("content", "headers", "files", "data") if name in more}
        path = template.format(**more)
        async with asyncio.timeout(30):
            response = await self._client.request(method, path, json=json, **options)
        await response.request.aread()
        assert response.status_code == status, (method, path, response.text)
        operation = self._schema[template][method]
        assert str(status) in operation.definition.raw["responses"], (method, template, status)
        operation.validate_response(response)
        if status < 400:
            self.asked.add((method, template))
        return response


@pytest.fixture
async def ask(documented: Door) -> AsyncIterator[Asker]:
    key = await documented.new_key(name="all", scopes=tuple(Scope), rpm=1000)
    async with documented.client(key) as client:
        yield Asker(client, await served(documented))


JOB = {"model": "tiny", "items": [{"id": "a", "messages": MESSAGES}]}


async def test_answers_are_as_it_says(ask: Asker) -> None:
    nobody = {"key_id": "0" * 12}
    await ask("POST", "/v1/chat/completions", 200, CHAT)
    await ask("POST", "/v1/chat/completions", 200, {**CHAT, "stream": True})
    await ask("POST", "/v1/chat/completions", 400, {})
    await ask("POST", "/v1/chat/completions", 404, {**CHAT, "model": "none"})
    assert (await ask("GET", "/v1/usage", 200)).json()["data"]
    made = {"key_id": (await ask("POST", "/admin/keys", 201, {"name": "new"})).json()["id"]}
    for method, template, change in (
        ("GET", "/admin/keys/{key_id}", None), ("PATCH", "/admin/keys/{key_id}", {"rpm": 5}),
        ("POST", "/admin/keys/{key_id}/rotate", None), ("POST", "/admin/keys/{key_id}/revoke", None),
    ):  # fmt: skip
        await ask(method, template, 200, change, **made)
        await ask(method, template, 404, change, **nobody)
    await ask("POST", "/admin/keys/{key_id}/rotate", 409, **made)
    await ask("GET", "/v1/models/{name}", 200, name="tiny")
    await ask("GET", "/v1/models/{name}", 404, name="none")
    for path in ("/jobs", "/admin/keys", "/v1/models", "/health", "/openapi.json"):
        await ask("GET", path, 200)


async def test_the_answers_about_jobs(documented: Door, ask: Asker) -> None:
    head, *items = JOB["model"], *JOB["items"]
    lines = b"\n".join(map(orjson.dumps, [{"model": head}, *items]))
    await ask("POST", "/jobs", 202, content=lines, headers={"content-type": "application/x-ndjson"})
    full = {**JOB, "name": "n", "metadata": {"a": "b"}, "completion_window": "2h", "webhook": "https://example.com/",
            "priority": 1, "max_error_rate": 0.5}  # fmt: skip
    once = {"headers": {"idempotency-key": "once"}}
    await ask("POST", "/jobs", 202, full, **once)
    await ask("POST", "/jobs", 409, JOB, **once)
    await ask("POST", "/jobs", 400, {})
    fails = {**JOB, "items": [{"id": "a", "messages": [{"role": "user", "content": "status 400"}]}]}
    job = {"job_id": (await ask("POST", "/jobs", 202, fails)).json()["id"]}
    await ask("DELETE", "/jobs/{job_id}", 409, **job)
    await ask("POST", "/jobs/{job_id}/retry", 409, **job)
    await documented.drain()
    about = [
        ("GET", "/jobs/{job_id}", 200), ("GET", "/jobs/{job_id}/results", 200), ("GET", "/jobs/{job_id}/events", 200),
        ("POST", "/jobs/{job_id}/cancel", 200), ("POST", "/jobs/{job_id}/retry", 202),
        ("GET", "/jobs/{job_id}", 200), ("DELETE", "/jobs/{job_id}", 200),
    ]  # fmt: skip
    for method, template, status in about:
        await ask(method, template, status, **job)
    for method, template, _ in about:
        await ask(method, template, 404, **job)
    assert (await ask("GET", "/jobs", 200)).json()["data"]
    assert {item for item in ask.asked if item[1].startswith("/jobs")} == {
        ("POST", "/jobs"), ("GET", "/jobs"), *((method, template) for method, template, _ in about)
    }  # fmt: skip


async def test_the_answers_about_files_and_batches(documented: Door, ask: Asker) -> None:
    def line(text: str, **body: Any) -> bytes:
        asked = {"model": "tiny", "messages": [{"role": "user", "content": text}], **body}
        return orjson.dumps({"custom_id": text, "method": "POST", "url": "/v1/chat/completions", "body": asked}) + b"\n"

    async def batch_of(content: bytes) -> dict[str, str]:
        form = {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
        file = (await ask("POST", "/v1/files", 200, data=form, files={"file": ("in", content)})).json()["id"]
        asked = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h",
                 "metadata": {"a": "b"}, "output_expires_after": {"anchor": "created_at", "seconds": 3600}}  # fmt: skip
        made = (await ask("POST", "/v1/batches", 200, asked)).json()
        assert (made["status"] == "failed") == bool(made["errors"])
        return {"file_id": file, "batch_id": made["id"]}

    ids = await batch_of(line("hi") + line("status 400"))
    await batch_of(line("hi", n=10**6))
    await documented.drain()
    over = (await ask("GET", "/v1/batches/{batch_id}", 200, **ids)).json()
    for name in ("output_file_id", "error_file_id"):
        await ask("GET", "/v1/files/{file_id}", 200, file_id=over[name])
        assert (await ask("GET", "/v1/files/{file_id}/content", 200, file_id=over[name])).json()["custom_id"]
    await ask("POST", "/v1/batches/{batch_id}/cancel", 200, **ids)
    await ask("GET", "/jobs/{job_id}", 200, job_id=ids["batch_id"])
    for path in ("/v1/files", "/v1/batches"):
        assert len((await ask("GET", path, 200)).json()["data"]) >= 2
        await ask("POST", path, 400)
    await ask("DELETE", "/v1/files/{file_id}", 200, **ids)
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        await ask(method, "/v1/files/{file_id}" + path, 404, **ids)
    await ask("DELETE", "/jobs/{job_id}", 200, job_id=ids["batch_id"])
    for method, path in (("GET", ""), ("POST", "/cancel")):
        await ask(method, "/v1/batches/{batch_id}" + path, 404, **ids)


async def test_the_answers_about_webhooks(ask: Asker) -> None:
    await ask("GET", "/webhooks/secret", 200)
    await ask("POST", "/webhooks/test", 400, {"url": "https://127.0.0.1/"})
    for _ in range(10):
        result = await ask("POST", "/webhooks/test", 200, {"url": "https://nothing.invalid/"})
        assert not result.json()["delivered"]
    await ask("POST", "/webhooks/test", 429, {"url": "https://nothing.invalid/"})
