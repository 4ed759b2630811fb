"""The same checks against the fake engine and the real one, so that the fake can't drift from what vLLM says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import orjson
import pytest

from engine.client import Endpoint, EngineClient
from engine.connection import EngineConnection
from tests.e2e.conftest import Up
from tests.fake_engine import fake_engine


@asynccontextmanager
async def engine(kind: str, request: pytest.FixtureRequest) -> AsyncIterator[EngineClient]:
    if kind == "fake":
        async with fake_engine() as fake, EngineClient(fake.url) as client:
            yield client
        return
    up: Up = request.getfixturevalue("real")
    async with EngineClient(orjson.loads((up.data / "up.json").read_bytes())["engine_url"]) as client:
        yield client


both = pytest.mark.parametrize("kind", ["fake", pytest.param("real", marks=pytest.mark.vllm)])


def chat(content: object = "Say hello.", **fields: object) -> bytes:
    body = {"model": "velocity-30b", "max_tokens": 8, "messages": [{"role": "user", "content": content}], **fields}
    return orjson.dumps(body)


async def read(connection: EngineConnection) -> bytes:
    parts = []
    while data := await connection.chunk():
        parts.append(data)
    return b"".join(parts)


@both
async def test_health_and_models(kind: str, request: pytest.FixtureRequest) -> None:
    async with engine(kind, request) as client:
        assert await client.healthy()
        models = await client.models()
        assert len(models.models) == 2
        true, alias = models.models
        assert alias.id == "velocity-30b"
        assert models.find(alias.id) == true
        assert true.max_model_len == 8192


@both
async def test_a_stream_is_events_and_its_usage_comes_last_and_alone(kind: str, request: pytest.FixtureRequest) -> None:
    async with engine(kind, request) as client:
        body = chat(stream=True, priority=0, stream_options={"include_usage": True})
        async with client.exchange(Endpoint.CHAT, body) as connection:
            head = await connection.head()
            data = await read(connection)
    assert head.status == 200
    assert (head.get(b"content-type") or b"").startswith(b"text/event-stream")
    events = data.split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    assert b'"choices":[]' in events[-3]
    usage = orjson.loads(events[-3][6:])["usage"]
    assert usage["completion_tokens"] > 0
    for event in events[:-3]:
        assert b'"choices":[]' not in event
        assert orjson.loads(event[6:])["choices"][0]["delta"] is not None


@both
async def test_without_stream_the_usage_is_in_the_answer(kind: str, request: pytest.FixtureRequest) -> None:
    async with engine(kind, request) as client:
        answer = await client.call(Endpoint.CHAT, chat(priority=10), timeout=60)
    assert answer.status == 200
    assert answer.json()["usage"]["prompt_tokens"] > 0
    assert answer.json()["choices"][0]["message"]["role"] == "assistant"
    assert b"\n" not in answer.body


@both
async def test_a_refusal_has_vllms_error_object(kind: str, request: pytest.FixtureRequest) -> None:
    content: object = "status 400" if kind == "fake" else "word " * 9000
    async with engine(kind, request) as client:
        answer = await client.call(Endpoint.CHAT, chat(content), timeout=60)
    assert answer.status == 400
    error = answer.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["code"] == 400


@both
async def test_leaving_frees_the_seat(kind: str, request: pytest.FixtureRequest) -> None:
    async with engine(kind, request) as client:
        body = chat("tokens 4", stream=True, max_tokens=4000, ignore_eos=True)
        for _ in range(3):
            async with client.exchange(Endpoint.CHAT, body) as connection:
                await connection.chunk()
        async with asyncio.timeout(60):
            assert (await client.call(Endpoint.CHAT, chat(), timeout=60)).status == 200
