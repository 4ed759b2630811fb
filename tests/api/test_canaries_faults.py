"""When velocity itself fails at a request, the log says where and of which class; not what the request said."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any, NoReturn

import httpx
import orjson
import pytest

from api import app, job_events, passthrough, shape, upload
from api.errors import ApiError
from api.gate import Gate
from api.key_store import Keys
from api.limits.limiter import Limiter
from api.passthrough import Passthrough
from api.relay import Relay
from api.routes import admin, batches, files, jobs, submit, webhooks
from api.settings import ApiSettings
from api.usage import UsageFilter
from tests.api.conftest import Door, front_door
from tests.api.test_canaries import WORD, Heard, chat, heard, parrot, require_silence
from tests.fake_engine import FakeEngine
from workers.errors import InputError, NoSuchJob
from workers.files import Files
from workers.store import JobFiles
from workers.webhooks import Webhooks

JOB: dict[str, Any] = {"model": "tiny", "name": WORD, "items": [{"id": WORD, "messages": [{"content": WORD}]}]}


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with parrot() as running:
        yield running


@pytest.fixture(params=[True, False], ids=["json", "console"])
def logs(request: pytest.FixtureRequest) -> Iterator[Heard]:
    with heard(request.param) as stream:
        yield stream


@pytest.fixture
async def door(settings: ApiSettings, engine: FakeEngine, logs: Heard) -> AsyncIterator[Door]:  # noqa: ARG001
    async with front_door(settings, engine) as running:
        await running.gateway.watch.refresh()
        yield running


class Quoting(Exception):
    """An error that says what it was about, as most do."""

    def __init__(self, about: object) -> None:
        super().__init__(f"can't do this: {about!r}")
        self.about = about
        self.add_note(str(about))


def stumble(*_: object) -> NoReturn:
    """Fails while something else is being handled."""
    raise Quoting(WORD)


def fail(*args: Any, **options: Any) -> NoReturn:
    """Fails while it has the content in its hands, at the end of a chain and in a group."""
    held = [WORD, args, options]
    try:
        try:
            int(WORD)
        except ValueError as error:
            raise LookupError(WORD, held) from error
    except LookupError as error:
        raise Quoting(held) from ExceptionGroup(WORD, [error, OSError(28, WORD, WORD), UnicodeError(WORD)])
    raise AssertionError


async def fail_later(*args: Any, **options: Any) -> NoReturn:
    await asyncio.sleep(0)
    fail(*args, **options)


PLACES: list[tuple[object, str, Any, str]] = [
    (shape, "interactive", fail, "/v1/chat/completions"), (shape, "parse", fail, "/v1/chat/completions"),
    (passthrough, "read_body", fail_later, "/v1/chat/completions"), (Limiter, "admit", fail_later, "/v1/completions"),
    (Passthrough, "_relay", fail_later, "/v1/chat/completions"), (Relay, "start", fail_later, "/v1/chat/completions"),
    (Passthrough, "_whole", fail_later, "/v1/embeddings"), (UsageFilter, "feed", fail, "/v1/chat/completions"),
    (Passthrough, "_account", fail, "/v1/chat/completions"), (Limiter, "settle", fail, "/v1/responses"),
    (submit, "split_job", fail, "/jobs"), (JobFiles, "draft", fail, "/jobs"),
    (submit, "current_view", fail_later, "/jobs"),
    (Keys, "create", fail_later, "/admin/keys"), (admin, "key_view", fail, "/admin/keys"),
    (Keys, "authenticate", fail_later, "/jobs"), (Gate, "add_headers", fail_later, "/jobs"),
    (Gate, "account", fail, "/jobs"),
]  # fmt: skip


async def test_a_fault_says_where_and_not_what(door: Door, logs: Heard) -> None:
    key = await door.new_key(scopes=("chat", "jobs", "admin"))
    bodies: dict[str, dict[str, Any]] = {"/jobs": JOB, "/admin/keys": {"name": WORD}}
    for place, name, failing, path in PLACES:
        before = logs.tell()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, failing)
            body = chat("hi", stream=path != "/v1/embeddings", input=WORD)
            answer = await ask(door, key, path, bodies.get(path, body))
            async with asyncio.timeout(30):
                while "Quoting" not in logs.getvalue()[before:]:  # the class is told
                    await asyncio.sleep(0.001)
        assert "in fail" in logs.getvalue()[before:], name  # and the place
        assert "can't do this" not in answer, name
        require_silence(logs, door, key)


BULK_PLACES: list[tuple[object, str, Any, str]] = [
    (submit, "read_head", fail, "POST /jobs lines"), (submit, "write_job", fail, "POST /jobs large"),
    (submit, "idempotency_of", fail, "POST /jobs lines"), (jobs, "current_view", fail_later, "GET /jobs/{job}"),
    (jobs, "retry", fail_later, "POST /jobs/{job}/retry"), (JobFiles, "completed", fail, "POST /jobs/{job}/retry"),
    (jobs, "delete", fail_later, "DELETE /jobs/{job}"), (jobs, "record_line", fail, "GET /jobs/{job}/results"),
    (job_events, "record_line", fail, "GET /jobs/{job}/events"), (files, "check_file", fail, "POST /v1/files"),
    (upload, "parse_options_header", fail, "POST /v1/files"), (files, "file_view", fail, "POST /v1/files"),
    (Files, "publish", fail, "POST /v1/files"), (Files, "content", fail, "GET /v1/files/{file}/content"),
    (Files, "delete", fail, "DELETE /v1/files/{file}"), (batches, "first_model", fail, "POST /v1/batches"),
    (batches, "write_batch", fail, "POST /v1/batches"), (batches, "batch_view", fail, "GET /v1/batches/{batch}"),
    (webhooks, "event_body", fail, "POST /webhooks/test"), (Webhooks, "send", fail_later, "POST /webhooks/test"),
    (Webhooks, "secret", fail_later, "GET /webhooks/secret"),
]  # fmt: skip
CHAT_LINE = {"custom_id": WORD, "method": "POST", "url": "/v1/chat/completions"}


async def test_a_fault_of_bulk_says_where_and_not_what(door: Door, logs: Heard) -> None:
    """Also where a thread, another process or a task of its own is at it."""
    item = {"messages": [{"role": "user", "content": f"hi {WORD}"}]}
    line = orjson.dumps({**CHAT_LINE, "body": {"model": "tiny", **item}})
    bodies: dict[str, dict[str, Any]] = {
        "lines": {"content": orjson.dumps({"model": "tiny", "name": WORD}) + b"\n" + orjson.dumps({"id": WORD, **item}),
                  "headers": {"content-type": "application/x-ndjson", "idempotency-key": WORD}},
        "large": {"json": {"model": "tiny", "items": [{"id": "a", **item, "user": WORD * 250_000}]}},
        "/v1/files": {"data": {"purpose": "batch"}, "files": {"file": (WORD, line)}},
        "/webhooks/test": {"json": {"url": f"https://{WORD}.invalid/"}},
    }  # fmt: skip
    async with door.client() as client:
        client.timeout = httpx.Timeout(60)  # another process has to begin
        file = (await client.post("/v1/files", **bodies["/v1/files"])).json()["id"]
        asked = {"input_file_id": file, "endpoint": CHAT_LINE["url"], "completion_window": "24h"}
        bodies["/v1/batches"] = {"json": {**asked, "metadata": {WORD: WORD}}}
        batch = (await client.post("/v1/batches", **bodies["/v1/batches"])).json()["id"]
        said = [{"role": "user", "content": f"{script} {WORD}"} for script in ("hi", "status 400")]
        made = {"model": "tiny", "items": [{"id": f"{WORD}{n}", "messages": [one]} for n, one in enumerate(said)]}
        job = (await client.post("/jobs", json=made)).json()["id"]
        await asyncio.wait_for(door.drain(), 60)
        for place, name, failing, request in BULK_PLACES:
            method, path, *kind = request.format(job=job, file=file, batch=batch).split()
            before = logs.tell()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(place, name, failing)
                answer = ""
                with suppress(httpx.RemoteProtocolError):
                    answer = (await client.request(method, path, **bodies.get("".join(kind) or path, {}))).text
                async with asyncio.timeout(30):
                    while "Quoting" not in logs.getvalue()[before:]:
                        await asyncio.sleep(0.001)
            assert "in fail" in logs.getvalue()[before:] or kind == ["large"], name  # another process keeps the place
            assert "can't do this" not in answer, name
            require_silence(logs, door)


async def test_a_fault_in_sending_an_event(door: Door, logs: Heard) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Webhooks, "send", fail_later)
        await ask(door, door.key, "/jobs", {**JOB, "webhook": f"https://{WORD}.invalid/{WORD}"})
        await asyncio.wait_for(door.drain(), 60)
        async with asyncio.timeout(30):
            while "webhook_sender_failed" not in logs.getvalue():
                await asyncio.sleep(0.05)
    require_silence(logs, door)


async def ask(door: Door, key: str, path: str, body: dict[str, Any]) -> str:
    """What it is answered; nothing if the connection is broken off."""
    async with door.client(key) as client:
        try:
            return (await client.post(f"{path}?{WORD}", json=body, headers={"x-a": WORD})).text
        except httpx.RemoteProtocolError:
            return ""


async def test_a_background_tasks_fault(door: Door, logs: Heard) -> None:
    """asyncio reports what nobody waited for, and shows objects as Python writes them."""
    task = asyncio.create_task(fail_later(WORD))
    await asyncio.wait({task})
    del task
    gc.collect()
    asyncio.get_running_loop().call_soon(fail, WORD)
    await asyncio.sleep(0.01)
    assert "never retrieved" in logs.getvalue()
    require_silence(logs, door)


REFUSALS = [ApiError(404, f"The model {WORD!r} does not exist."), NoSuchJob(f"There is no job {WORD!r}."),
            InputError(f"items[0].id: {WORD!r} is taken.", WORD)]  # fmt: skip


async def test_a_fault_while_a_refusal_is_told(door: Door, logs: Heard) -> None:
    """What is refused is quoted to the client, and then the refusal is what the fault came of: not for the log."""
    for refusal in REFUSALS:
        with pytest.MonkeyPatch.context() as patch:

            async def refuse(*_: Any, refusal: Exception = refusal) -> NoReturn:
                raise refusal

            patch.setattr(submit, "require_room", refuse)
            patch.setattr(app, "_response", stumble)
            await ask(door, door.key, "/jobs", JOB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gate, "add_headers", stumble)
        await ask(door, door.key, "/v1/chat/completions", {"model": WORD})
        await ask(door, door.key, f"/{WORD}", {})
    assert "Quoting" in logs.getvalue()
    require_silence(logs, door)
