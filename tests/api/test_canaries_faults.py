"""When velocity itself fails at a request, the log says where and of which class; not what the request said."""

from __future__ import annotations

import asyncio
import gc
import io
from collections.abc import AsyncIterator, Iterator
from typing import Any, NoReturn

import httpx
import pytest

from api import app, passthrough, shape
from api.errors import ApiError
from api.gate import Gate
from api.key_store import Keys
from api.limits.limiter import Limiter
from api.passthrough import Passthrough
from api.relay import Relay
from api.routes import admin, submit
from api.settings import ApiSettings
from api.usage import UsageFilter
from tests.api.conftest import Door, front_door
from tests.api.test_canaries import WORD, chat, heard, parrot, require_silence
from tests.fake_engine import FakeEngine
from workers.errors import InputError, NoSuchJob
from workers.store import JobFiles

JOB: dict[str, Any] = {"model": "tiny", "name": WORD, "items": [{"id": WORD, "messages": [{"content": WORD}]}]}


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with parrot() as running:
        yield running


@pytest.fixture(params=[True, False], ids=["json", "console"])
def logs(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    with heard(request.param) as stream:
        yield stream


@pytest.fixture
async def door(settings: ApiSettings, engine: FakeEngine, logs: io.StringIO) -> AsyncIterator[Door]:  # noqa: ARG001
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
    (Passthrough, "_account", fail, "/v1/chat/completions"), (Limiter, "settle", fail_later, "/v1/responses"),
    (submit, "split_job", fail, "/jobs"), (JobFiles, "draft", fail, "/jobs"), (submit, "current_view", fail_later, "/jobs"),
    (Keys, "create", fail_later, "/admin/keys"), (admin, "key_view", fail, "/admin/keys"),
    (Keys, "authenticate", fail_later, "/jobs"), (Gate, "add_headers", fail_later, "/jobs"),
    (Gate, "account", fail, "/jobs"),
]  # fmt: skip


async def test_a_fault_says_where_and_not_what(door: Door, logs: io.StringIO) -> None:
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


async def ask(door: Door, key: str, path: str, body: dict[str, Any]) -> str:
    """What it is answered; nothing if the connection is broken off."""
    async with door.client(key) as client:
        try:
            return (await client.post(f"{path}?{WORD}", json=body, headers={"x-a": WORD})).text
        except httpx.RemoteProtocolError:
            return ""


async def test_a_background_tasks_fault(door: Door, logs: io.StringIO) -> None:
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


async def test_a_fault_while_a_refusal_is_told(door: Door, logs: io.StringIO) -> None:
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
