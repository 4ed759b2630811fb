"""Nothing that a client writes, and no secret, gets into logs or metrics: a mark goes in everywhere, and nowhere out.

Logs are set up as in production, at DEBUG, in both renderings. What velocity's own faults say: test_canaries_faults.py.
"""

from __future__ import annotations

import asyncio
import io
import logging
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from typing import Any

import httpx
import orjson
import pytest
import structlog

from api.keys import Scope, new_text
from api.settings import ApiSettings
from engine import log
from tests.api.conftest import Door, front_door
from tests.api.test_security_wire import HOST, bearer, statuses, talk
from tests.fake_engine import Connection, FakeEngine, serving

WORD = "tw33t"
"""The mark. It stands in no source line, since those are in tracebacks."""


class Parrot(Connection):
    """An engine that quotes what it was asked, in every way to fail that it has."""

    async def _generate(self, request: dict[str, Any]) -> None:
        messages = request.get("messages")
        said = str(messages[-1]["content"] if isinstance(messages, list) else request.get("input", "quote 400"))
        word, _, rest = said.partition(" ")
        quoted = {"error": {"message": str(request), "type": WORD, "param": WORD, "code": 400}}
        if word == "quote":
            self.answer(int(rest.split()[0]), orjson.dumps(quoted))
        elif word == "sing":  # an error in mid-stream
            self.transport.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            self.event({"choices": [{"index": 0, "delta": {"content": said}, "finish_reason": None}]})
            self.chunk(b'data: {"error":' + orjson.dumps(quoted["error"]) + b"}\n\n")
            self.transport.write(b"0\r\n\r\n")
        elif word == "croak":  # no HTTP
            self.transport.write(b"HTTP/1.1 200 OK\r\n" + WORD.encode() + b"\x00: \x00\r\n\r\n")
        elif word == "babble":  # no JSON
            self.answer(200, said.encode())
        elif word == "trail":  # and then something more
            self.answer(200, b"{}" + said.encode())
        else:
            await super()._generate(request)


def parrot() -> AbstractAsyncContextManager[FakeEngine]:
    return serving(FakeEngine(), Parrot)


class Heard(io.TextIOWrapper):
    """What was written, as text and as bytes."""

    def __init__(self) -> None:
        self._bytes = io.BytesIO()
        super().__init__(self._bytes, encoding="utf-8", write_through=True)

    def getvalue(self) -> str:
        return self._bytes.getvalue().decode()


@contextmanager
def heard(as_json: bool) -> Iterator[Heard]:
    """All that is logged or printed, with logging as a process of velocity has it."""
    stream = Heard()
    root, others = logging.getLogger(), logging.Logger.manager.loggerDict.values()
    handlers, level = root.handlers, root.level
    levels = [(logger, logger.level) for logger in others if isinstance(logger, logging.Logger)]
    configure = structlog.configure

    def uncached(**options: Any) -> None:
        configure(**{**options, "cache_logger_on_first_use": False})  # or later tests would log in here

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setattr(sys, "stdout", stream)
        patch.setattr(structlog, "configure", uncached)
        log.configure(ApiSettings(log_json=as_json, log_level="DEBUG"), "api")
        yield stream
    root.handlers = handlers
    root.setLevel(level)
    for logger, before in levels:
        logger.setLevel(before)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


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
    changed = {"total_timeout": 20.0, "max_job_bytes": 100_000, "docs": True}
    async with front_door(settings.model_copy(update=changed), engine) as running:
        await running.gateway.watch.refresh()
        yield running


def require_silence(logs: Heard, door: Door, *secrets: str, events: tuple[str, ...] = ()) -> None:
    """No mark and no secret came out, although something was written."""
    text, metrics = logs.getvalue(), door.gateway.metrics.render()[0].decode()
    for event in events:
        assert event in text, f"{event} is not in the log: the test proves nothing"
    for secret in (WORD, *(key.split("_")[2] for key in (door.key, *secrets))):
        lines = [line for line in text.splitlines() if secret in line.lower()]
        assert not lines, lines[:3]
        assert secret not in metrics.lower()


async def test_the_mark_would_be_found(door: Door, logs: Heard) -> None:
    for say in (lambda: log.get("x").info("said", what=WORD), lambda: logging.getLogger("x").debug(WORD.upper())):
        require_silence(logs, door)
        before = logs.tell()
        say()
        with pytest.raises(AssertionError, match="(?i)" + WORD):
            require_silence(logs, door)
        logs.seek(before)
        logs.truncate()


HEADERS = {
    "X-Request-Id": WORD, "User-Agent": WORD, "Cookie": f"{WORD}=1", "Referer": f"http://{WORD}/", "Traceparent": WORD,
    "X-Forwarded-For": WORD, "OpenAI-Organization": WORD, f"X-{WORD}": "1", "Tracestate": f"{WORD}=1", "Accept": WORD,
}  # fmt: skip
EXTRAS: dict[str, Any] = {
    "user": WORD, "metadata": {WORD: WORD}, "stop": [WORD], WORD: {WORD: [WORD]}, "chat_template": WORD,
    "tools": [{"type": "function", "function": {"name": WORD, "parameters": {"title": WORD}}}], "seed": 1,
    "response_format": {"type": "json_schema", "json_schema": {"name": WORD, "schema": {"title": WORD}}},
    "vllm_xargs": {WORD: WORD}, "logit_bias": {WORD: 1}, "tool_choice": WORD, "service_tier": WORD,
}  # fmt: skip


def chat(content: str, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": WORD, "name": WORD, "content": f"{content} {WORD}"}],
            **EXTRAS, **fields}  # fmt: skip


ODD: list[dict[str, Any]] = [
    {"model": WORD}, {"model": [WORD]}, {"model": {WORD: WORD}}, {"n": WORD}, {"n": f"{WORD}9"}, {"stream": WORD},
    {"stream_options": WORD}, {"stop": WORD * 1000}, {"tools": [{WORD: WORD * 9000}]}, {"guided_regex": WORD * 5000},
    {"messages": WORD}, {"max_tokens": WORD}, {"prompt": [WORD] * 99}, {WORD: [[[[[[[WORD]]]]]]]},
]  # fmt: skip
RAW = [b"{" + WORD.encode(), WORD.encode(), b'{"a": "' + WORD.encode() + b'\\ud800"}', b'["%s"]' % WORD.encode(),
       b'{"model": "tiny", "%s": NaN}' % WORD.encode()]  # fmt: skip


async def test_interactive_requests(door: Door, logs: Heard) -> None:
    scripts = ("hi", "status 400", "quote 400", "quote 401", "quote 404", "quote 422", "quote 500", "quote 503",
               "babble", "trail", "croak", "die", "sing", "break 2", "trouble 2", "stall 2")  # fmt: skip
    async with door.client() as client:
        client.headers.update(HEADERS)
        for script in scripts:
            for stream in (False, True):
                if not (script.startswith(("sing", "stall")) and not stream):
                    await ask(client, "/v1/chat/completions", chat(script, stream=stream))
        await ask(client, "/v1/completions", {"model": "tiny", "prompt": WORD, "suffix": WORD, **EXTRAS})
        await ask(client, "/v1/responses", {"model": "tiny", "input": f"quote 400 {WORD}", "instructions": WORD})
        await ask(client, "/v1/embeddings", {"model": "tiny", "input": [WORD], **EXTRAS})
        for odd in ODD:
            await ask(client, "/v1/chat/completions", chat("hi", **odd))
        for raw in RAW:
            assert (await client.post("/v1/chat/completions", content=raw)).status_code == 400
    assert any(WORD in str(request) for request in door.engine.requests)
    require_silence(logs, door, events=("engine_400", "engine_error", "EngineLost", "EngineTimeout", "invalid_json"))


async def ask(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    """A request that may end in any way."""
    with suppress(httpx.RemoteProtocolError):  # broken off on purpose
        await client.post(f"{path}?{WORD}={WORD}", json=body)


async def test_a_client_that_leaves_in_mid_stream(door: Door, logs: Heard) -> None:
    async with (
        door.client() as client,
        client.stream("POST", "/v1/chat/completions", json=chat("stall 2", stream=True), headers=HEADERS) as response,
    ):
        await anext(response.aiter_raw())
    async with asyncio.timeout(30):
        while "client_left" not in logs.getvalue():
            await asyncio.sleep(0.01)
    require_silence(logs, door)


async def test_addresses_methods_and_keys(door: Door, logs: Heard) -> None:
    everything = await door.new_key(scopes=tuple(Scope))
    unknown = new_text()[1]
    keys = [everything, unknown, WORD, f"vk_{WORD}", f"vk_{'0' * 12}_{WORD}_00000000", f"{everything}{WORD}"]
    paths = [f"/{WORD}", f"/v1/models/{WORD}", f"/v1/models/{WORD}/{WORD}", f"/jobs/{WORD}", f"/jobs/{WORD}/results",
             f"/jobs?after={WORD}", f"/jobs?limit={WORD}", f"/jobs?{WORD}", f"/admin/keys/{WORD}", f"/admin/{WORD}",
             f"/v1/usage?days={WORD}", f"/health?{WORD}", f"/health/{WORD}", f"/v1/chat/completions?{WORD}",
             f"/v1/chat/completions/{WORD}", f"/openapi.json?{WORD}", f"/jobs/{WORD}/cancel"]  # fmt: skip
    for key in keys:
        async with door.client(key) as client:
            client.headers.update(HEADERS)
            for path in paths:
                for method in ("GET", "POST", "DELETE"):
                    await client.request(method, path)
    require_silence(logs, door, everything, unknown, events=("not_found", "invalid_api_key"))


async def test_bytes_that_are_no_request(door: Door, logs: Heard) -> None:
    word = WORD.encode()
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
    for data in (
        word, word + b" / HTTP/1.1\r\n\r\n",
        b"GET /" + word + b" HTTP/" + word, b"GET / HTTP/1.1\r\n" + word + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + word + b"\n\r\n", b"GET /" + word + b"\xff HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /" + word + b" HTTP/1.1\r\n" + HOST + bearer(door.key) + upgrade + word + b"\r\n\r\n",
        b"GET /" + word + b" HTTP/1.1\r\n" + HOST + bearer(door.key) + upgrade + b"dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        b"POST /jobs HTTP/1.1\r\n" + HOST + bearer(door.key) + b"Transfer-Encoding: chunked\r\n\r\n" + word + b"\r\n",
    ):  # fmt: skip
        assert statuses(await talk(door, data + b"\r\n\r\n", until=b"error"))
    require_silence(logs, door, events=("Invalid HTTP request received.",))


SCRIPTS = ("hi", "status 400", "quote 400", "babble", "trail", "html 413", "die")
ITEMS = [{"id": f"{WORD}{n}", "messages": [{"role": "user", "content": f"{script} {WORD}"}], **EXTRAS}
         for n, script in enumerate(SCRIPTS)]  # fmt: skip
BAD_JOBS: list[dict[str, Any]] = [
    {"items": [{"id": WORD}]}, {"items": [{"id": [WORD], "messages": WORD}]}, {"items": [ITEMS[0], ITEMS[0]]},
    {"items": [{**ITEMS[0], "stream": WORD}]}, {"items": [{**ITEMS[0], "model": WORD}]}, {"items": WORD},
    {"items": [{**ITEMS[0], "n": 99}]}, {"items": ITEMS, "model": WORD}, {"items": ITEMS, WORD: WORD},
    {"items": ITEMS, "name": [WORD]}, {"items": ITEMS, "defaults": WORD}, {"items": [WORD]},
    {"items": [{**ITEMS[0], "id": WORD * 500}]}, {"items": [{**ITEMS[0], WORD: WORD * 30_000}]},
]  # fmt: skip


async def test_jobs(door: Door, logs: Heard) -> None:
    async with door.client() as client:
        client.headers.update(HEADERS)
        for bad in BAD_JOBS:
            response = await client.post("/jobs", json={"model": "tiny", **bad})
            assert 400 <= response.status_code < 500
        for raw in RAW:
            assert (await client.post("/jobs", content=raw)).status_code == 400
        body = {"model": "tiny", "name": WORD, "items": ITEMS, "defaults": {WORD: WORD}}
        job = (await client.post("/jobs", json=body)).json()["id"]
        await asyncio.wait_for(door.drain(), 60)
        results = (await client.get(f"/jobs/{job}/results")).text
        assert (await client.get(f"/jobs/{job}")).json()["counts"]["total"] == len(ITEMS)
    assert results.count(WORD) > len(ITEMS)
    require_silence(logs, door, events=("job_finished", job, "shard_over"))


async def test_keys_and_their_names(door: Door, logs: Heard) -> None:
    key = await door.new_key(scopes=tuple(Scope))
    async with door.client(key) as client:
        made = (await client.post("/admin/keys", json={"name": WORD, "models": [WORD]})).json()
        rotated = (await client.post(f"/admin/keys/{made['id']}/rotate", json={"grace_seconds": 9})).json()
        for change in ({"name": WORD * 2}, {"name": [WORD]}, {WORD: WORD}, {"scopes": [WORD]}, {"tenant": WORD}):
            await client.patch(f"/admin/keys/{made['id']}", json=change)
            await client.post("/admin/keys", json={"name": WORD, **change})
        await client.post(f"/admin/keys/{made['id']}/revoke")
        await client.get("/admin/keys")
    for text in (made["key"], rotated["key"]):
        async with door.client(text) as client:
            assert (await client.post("/v1/chat/completions", json=chat("hi"))).status_code == 401
    require_silence(logs, door, key, made["key"], rotated["key"], events=("/admin/keys/{key_id}",))
