"""What reaches the engine: these addresses, these headers, no field that reaches into it, nothing beyond the caps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson
import pytest
from pydantic import SecretStr

from api import shape
from api.keys import Scope
from api.settings import ApiSettings
from engine.client import Endpoint
from tests.api.conftest import Door, front_door
from tests.api.test_security_wire import HOST, bearer, statuses, talk
from tests.fake_engine import Connection, FakeEngine, serving

MESSAGES = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    Endpoint.CHAT: {"model": "tiny", "messages": MESSAGES},
    Endpoint.COMPLETIONS: {"model": "tiny", "prompt": "hi"},
    Endpoint.RESPONSES: {"model": "tiny", "input": "hi", "stream": True},
    Endpoint.EMBEDDINGS: {"model": "tiny", "input": "hi"},
}
ALLOWED = {"GET /health", "GET /v1/models", "GET /velocity/scheduler", *(f"POST {endpoint}" for endpoint in Endpoint)}
"""All that velocity ever asks of an engine."""


@dataclass
class Recorded(FakeEngine):
    """A fake engine that keeps every byte it was sent."""

    raw: list[bytes] = field(default_factory=list)
    """By connection."""

    def heads(self) -> list[tuple[str, dict[str, str]]]:
        """Request line (without the version) and headers of each request, connection by connection."""
        heads = []
        for data in self.raw:
            rest = data
            while rest:
                head, _, rest = rest.partition(b"\r\n\r\n")
                line, *lines = head.decode("latin-1").split("\r\n")
                pairs = [text.partition(": ")[::2] for text in lines]
                assert len(pairs) == len(dict(pairs)), "a header was sent twice"
                assert line.endswith(" HTTP/1.1")
                heads.append((line.removesuffix(" HTTP/1.1"), dict(pairs)))
                rest = rest[int(dict(pairs).get("content-length", 0)) :]
        return heads

    def asked(self) -> list[dict[str, str]]:
        """Headers of the requests to generate."""
        return [headers for line, headers in self.heads() if line.startswith("POST ")]


class _Recording(Connection):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(self.engine, Recorded)
        self.place = len(self.engine.raw)
        self.engine.raw.append(b"")
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        assert isinstance(self.engine, Recorded)
        self.engine.raw[self.place] += data
        super().data_received(data)


@pytest.fixture
async def tapped(settings: ApiSettings) -> AsyncIterator[tuple[Door, Recorded]]:
    """A front door, and all that its engine gets to see. The engine asks for a key of its own."""
    async with serving(Recorded(), _Recording) as engine:
        changed = settings.model_copy(update={"engine_url": engine.url, "engine_api_key": SecretStr("engines-own")})
        async with front_door(changed, engine) as door:
            await door.gateway.watch.refresh()
            yield door, engine


HOSTILE = {
    "Cookie": "canary=1", "X-Request-Id": "canary", "X-Vllm-Priority": "-100", "X-Forwarded-For": "canary",
    "X-Forwarded-Proto": "canary", "X-Forwarded-Host": "canary", "Forwarded": "for=canary", "X-Real-Ip": "canary",
    "Proxy-Authorization": "Basic canary", "Proxy-Connection": "canary", "Connection": "keep-alive, X-Canary",
    "X-Canary": "canary", "TE": "trailers, canary", "Keep-Alive": "timeout=5, canary", "Trailer": "X-Canary",
    "X-Api-Key": "canary", "X-Data-Parallel-Rank": "7", "X-Session-Id": "canary", "X-Flow-Conversation-Id": "canary",
    "Accept": "canary/1", "Accept-Encoding": "gzip, br, canary", "User-Agent": "canary", "Referer": "canary",
    "Origin": "canary", "OpenAI-Organization": "canary", "X-Stainless-Lang": "canary", "Via": "canary",
    "Content-Language": "canary", "Expect": "canary", "If-None-Match": "canary", "Range": "bytes=0-1",
    "Baggage": "canary=1", "Tracestate": "canary=1", "Traceparent": "canary", "X-Http-Method-Override": "DELETE",
}  # fmt: skip
OURS = {"host", "accept-encoding", "authorization", "content-type", "content-length", "x-request-id"}


async def test_no_header_of_a_client_reaches_the_engine(tapped: tuple[Door, Recorded]) -> None:
    door, engine = tapped
    ids = []
    async with door.client() as client:
        for path, body in BODIES.items():
            response = await client.post(f"{path}?canary=1", json=body, headers=HOSTILE)
            assert response.status_code == 200, response.text
            ids.append(response.headers["x-request-id"])
    raw = b"".join(engine.raw)
    assert b"canary" not in raw.lower()
    assert door.key.encode() not in raw
    assert {line for line, _ in engine.heads()} <= ALLOWED
    asked = engine.asked()
    assert len(asked) == len(BODIES)
    assert {headers["x-request-id"] for headers in asked} == set(ids)
    for headers in asked:
        assert set(headers) == OURS
        assert headers["host"] == engine.url.removeprefix("http://")
        assert headers["authorization"] == "Bearer engines-own"
        assert headers["accept-encoding"] == "identity"
        assert headers["content-type"] == "application/json"


async def test_an_upgrade_reaches_nobody(tapped: tuple[Door, Recorded]) -> None:
    door, engine = tapped
    body = orjson.dumps(BODIES[Endpoint.CHAT])
    for lines in (b"Upgrade: canary\r\n", b"Connection: close, TE, Upgrade\r\nTE: canary\r\n"):
        head = b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + bearer(door.key) + lines
        said = await talk(door, head + b"Content-Length: %d\r\n\r\n" % len(body) + body, until=b'"usage"')
        assert statuses(said) == [200]
    assert b"canary" not in b"".join(engine.raw)
    assert all(set(headers) == OURS for headers in engine.asked())


@pytest.mark.parametrize("given", ["00-" + "a" * 32 + "-" + "b" * 16 + "-01", "00-" + "a" * 32 + "-" + "b" * 16])
async def test_a_trace_goes_on_if_it_is_one(tapped: tuple[Door, Recorded], given: str) -> None:
    door, engine = tapped
    async with door.client() as client:
        await client.post(Endpoint.CHAT, json=BODIES[Endpoint.CHAT], headers={"traceparent": given})
    (headers,) = engine.asked()
    assert headers.get("traceparent") == (given if given.count("-") == 3 else None)


async def batch_of(client: httpx.AsyncClient, path: str, *bodies: dict[str, Any]) -> dict[str, Any]:
    """The batch that is made of these requests."""
    lines = [{"custom_id": f"c{n}", "method": "POST", "url": path, "body": body} for n, body in enumerate(bodies)]
    content = b"\n".join(map(orjson.dumps, lines))
    made = await client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", content)})
    asked = {"input_file_id": made.json()["id"], "endpoint": path, "completion_window": "24h"}
    return dict((await client.post("/v1/batches", json=asked)).json())


DANGEROUS = {
    "priority": -5, "cache_salt": "canary", "request_id": "canary", "chat_template": "{{ canary }}",
    "chat_template_kwargs": {"canary": 1}, "prompt_embeds": "canary", "mm_processor_kwargs": {"canary": 1},
    "media_io_kwargs": {"image": {"canary": 1}}, "kv_transfer_params": {"canary": 1}, "vllm_xargs": {"canary": 1},
    "logits_processors": ["canary"], "allowed_local_media_path": "/canary", "bad_words": ["canary"],
}  # fmt: skip


async def test_fields_that_reach_into_the_engine_are_dropped(tapped: tuple[Door, Recorded]) -> None:
    door, engine = tapped
    assert set(DANGEROUS) == shape.DROPPED
    async with door.client() as client:
        for path, body in BODIES.items():
            assert (await client.post(path, json={**body, **DANGEROUS, "unknown": "kept"})).status_code == 200
        item = {"id": "a", "messages": MESSAGES, **DANGEROUS}
        jobs = [{"model": "tiny", "items": [item]}, {"model": "tiny", "defaults": DANGEROUS, "items": [
            {"id": "b", "messages": MESSAGES}]}]  # fmt: skip
        for job in jobs:
            assert (await client.post("/jobs", json=job)).status_code == 202
        lines = orjson.dumps({"model": "tiny", "defaults": DANGEROUS}) + b"\n" + orjson.dumps(item)
        as_lines = {"content-type": "application/x-ndjson"}
        assert (await client.post("/jobs", content=lines, headers=as_lines)).status_code == 202
        body = {**BODIES[Endpoint.CHAT], **DANGEROUS}
        assert (await batch_of(client, Endpoint.CHAT, body))["errors"] is None
    await door.drain()
    assert b"canary" not in b"".join(engine.raw)
    key = await door.gateway.keys.get(door.key.split("_")[1])
    interactive, bulk = engine.requests[: len(BODIES)], engine.requests[len(BODIES) :]
    assert len(bulk) == 4
    for request in engine.requests:
        assert request["cache_salt"] == key.tenant
        assert set(request) & shape.DROPPED <= {"cache_salt", "priority"}
    assert [request.get("priority") for request in interactive] == [0, 0, 0, None]
    assert [request["priority"] for request in bulk] == [door.settings.bulk_priority] * 4
    assert all(request["unknown"] == "kept" for request in interactive)


HIDDEN = [
    "/invocations", "/tokenize", "/detokenize", "/pause", "/resume", "/sleep", "/wake_up", "/is_sleeping", "/metrics",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/update_weights", "/scale_elastic_ep", "/collective_rpc",
    "/start_profile", "/reset_prefix_cache", "/reset_mm_cache", "/server_info", "/version", "/ping", "/load", "/score",
    "/v1/score", "/rerank", "/v1/rerank", "/pooling", "/classify", "/v1/audio/transcriptions", "/inference/v1/generate",
    "/inference/v1/abort_requests", "/v1/chat/completions/render", "/v1/completions/render", "/v1/messages", "/docs",
    "/v1/responses/resp_1", "/v1/responses/resp_1/cancel", "/tokenizer_info", "/abort_requests", "/redoc", "/v1",
    "/v1/chat", "/v1/chat/completions/", "/v1/embeddings/..%2f..%2fmetrics", "/v1/chat/completions/../../../metrics",
    "//v1/chat/completions", "/V1/chat/completions", "/v1/chat/completions%00", "/v1/chat/completions%2f..%2ftokenize",
]  # fmt: skip


async def test_the_engines_other_addresses_are_not_there(tapped: tuple[Door, Recorded]) -> None:
    door, engine = tapped
    key = await door.new_key(scopes=tuple(Scope))
    for path in HIDDEN:
        for method in ("GET", "POST"):
            head = f"{method} {path} HTTP/1.1\r\n".encode() + HOST + bearer(key) + b"Connection: close\r\n"
            said = await talk(door, head + b"Content-Length: 2\r\n\r\n{}")
            assert statuses(said) == [404], (method, path)
    assert {line for line, _ in engine.heads()} <= {line for line in ALLOWED if line.startswith("GET ")}
