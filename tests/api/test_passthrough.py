"""The streaming path against a fake engine: bytes, endings, people who leave."""

from __future__ import annotations

import asyncio

import httpx
import orjson
import pytest
import uvicorn

from api import connection, server
from api.gateway import Gateway
from api.settings import ApiSettings
from tests.api import conftest
from tests.api.conftest import Door, front_door
from tests.fake_engine import FakeEngine


@pytest.fixture(autouse=True, params=["of its own", "plain ASGI"])
def outlet(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways by which an answer leaves: the second is for versions of uvicorn that the first was not tried with."""
    if request.param == "plain ASGI":
        monkeypatch.setattr(connection, "_TRIED", ("none",))


def chat(content: str, **fields: object) -> dict[str, object]:
    return {"model": "velocity-30b", "messages": [{"role": "user", "content": content}], **fields}


async def test_a_stream_arrives_as_the_engine_sent_it(door: Door) -> None:
    async with door.client() as client:
        body = chat("tokens 4", stream=True, stream_options={"include_usage": True})
        response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"].startswith("req_")
    events = [line[6:] for line in response.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert orjson.loads(events[-2])["usage"]["completion_tokens"] == 4
    text = "".join(c["delta"].get("content", "") for e in events[:-1] for c in orjson.loads(e)["choices"])
    assert text == "t0 t1 t2 t3 "


async def test_the_usage_event_is_kept_from_those_who_did_not_ask(door: Door) -> None:
    async with door.client() as client:
        response = await client.post("/v1/chat/completions", json=chat("hi", stream=True))
    assert '"usage"' not in response.text
    assert response.text.endswith("data: [DONE]\n\n")
    assert door.engine.requests[-1]["stream_options"] == {"include_usage": True}


async def test_without_stream(door: Door) -> None:
    async with door.client() as client:
        response = await client.post("/v1/chat/completions", json=chat("hi"))
    assert response.json()["choices"][0]["message"]["content"] == "t0 t1 t2 "
    assert door.engine.requests[-1]["priority"] == 0
    assert door.engine.requests[-1]["model"] == "tiny"


@pytest.mark.parametrize("model", ["velocity-30b", "vllm/velocity-30b", "openai/velocity-30b", "tiny"])
async def test_every_name_of_the_model(door: Door, model: str) -> None:
    async with door.client() as client:
        response = await client.post("/v1/chat/completions", json={**chat("hi"), "model": model})
    assert response.json()["model"] == "tiny"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_the_engine(door: Door, stream: bool) -> None:
    async with door.client() as client:
        request = client.build_request("POST", "/v1/chat/completions", json=chat("hang", stream=stream))
        sending = asyncio.create_task(client.send(request, stream=True))
        async with asyncio.timeout(30):
            while not door.engine.running:
                assert not sending.done(), "the request was refused"
                await asyncio.sleep(0.01)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    async with asyncio.timeout(5):
        while door.engine.running:
            await asyncio.sleep(0.01)
    assert len(door.engine.aborted) == 1


async def test_pings_until_the_first_token_then_an_error_and_a_broken_connection(door: Door) -> None:
    received = b""
    async with door.client() as client:
        with pytest.raises(httpx.RemoteProtocolError):
            async with client.stream("POST", "/v1/chat/completions", json=chat("hang", stream=True)) as response:
                assert response.status_code == 200
                async for data in response.aiter_bytes():
                    received += data
    assert received.count(b": ping\n\n") >= 2
    assert b'"code":"engine_timeout"' in received


@pytest.mark.parametrize("script", ["break 2", "stall 2", "trouble 2"])
async def test_an_engine_that_fails_in_mid_stream_is_no_clean_end(door: Door, script: str) -> None:
    received = b""
    async with door.client() as client:
        with pytest.raises(httpx.RemoteProtocolError):
            async with client.stream("POST", "/v1/chat/completions", json=chat(script, stream=True)) as response:
                async for data in response.aiter_bytes():
                    received += data
    assert b"t1 " in received
    assert received.count(b'{"error":{') == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_an_engine_that_fails_before_the_head_is_a_status(door: Door, stream: bool) -> None:
    async with door.client() as client:
        response = await client.post("/v1/chat/completions", json=chat("die", stream=stream))
    assert response.status_code == 502
    assert response.json()["error"]["code"] == "engine_lost"


@pytest.mark.parametrize("stream", [True, False])
async def test_the_engines_refusal_comes_in_openais_shape(door: Door, stream: bool) -> None:
    async with door.client() as client:
        response = await client.post("/v1/chat/completions", json=chat("status 400", stream=stream))
    assert response.status_code == 400
    assert response.json() == {
        "error": {"message": "scripted refusal", "type": "invalid_request_error", "param": None, "code": None}
    }


async def test_no_engine_is_503_with_retry_after(settings: ApiSettings, engine: FakeEngine) -> None:
    nowhere = settings.model_copy(update={"engine_url": "http://127.0.0.1:9"})
    async with front_door(nowhere, engine) as door, door.client() as client:
        for path, body in (("/v1/chat/completions", chat("hi")), ("/jobs", {"model": "x", "items": []})):
            response = await client.post(path, json=body)
            if path == "/jobs":
                continue
            assert response.status_code == 503
            assert response.headers["retry-after"] == "5"
        assert (await client.get("/health")).status_code == 503


async def test_an_oversized_body_is_413(settings: ApiSettings, engine: FakeEngine) -> None:
    small = settings.model_copy(update={"max_body_bytes": 1000})
    async with front_door(small, engine) as door, door.client() as client:
        response = await client.post("/v1/chat/completions", json=chat("x" * 2000))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


async def test_a_client_that_stops_reading_is_given_up_and_the_engine_freed(door: Door) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(door.url.rpartition(":")[2]), limit=1024)
    door.engine.token_seconds = 0.0001
    body = orjson.dumps(chat("tokens 200000", stream=True))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {door.key}\r\n"
    writer.write(f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    await reader.read(100)
    async with asyncio.timeout(20):
        while not door.engine.aborted:
            await asyncio.sleep(0.05)
    writer.close()


async def test_responses_are_pinged_until_their_first_token(door: Door) -> None:
    door.engine.token_seconds = 1.0  # longer than the stall timeout, shorter than the one for the first token
    body = {"model": "tiny", "input": "tokens 1", "stream": True}
    async with door.client() as client:
        response = await client.post("/v1/responses", json=body, timeout=20)
    assert response.text.startswith("event: response.created")
    assert response.text.count(": ping") >= 2
    assert response.text.rstrip().endswith("}")
    assert "response.completed" in response.text


async def test_a_long_answer_without_stream_may_take_longer_than_a_first_token(door: Door) -> None:
    door.engine.token_seconds = 2.5
    async with door.client() as client:
        response = await client.post("/v1/chat/completions", json=chat("tokens 1"), timeout=20)
    assert response.status_code == 200


async def test_stream_must_be_a_boolean(door: Door) -> None:
    async with door.client() as client:
        response = await client.post("/v1/chat/completions", json=chat("hi", stream="true"))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "stream")


async def test_an_idle_connection_is_closed_in_time(
    settings: ApiSettings, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hasty(gateway: Gateway) -> uvicorn.Config:
        made = server.config(gateway)
        made.timeout_keep_alive = 1
        return made

    monkeypatch.setattr(connection, "_IDLE_TICK", 0.05)
    monkeypatch.setattr(conftest, "config", hasty)
    async with front_door(settings, engine) as door, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(door.url.rpartition(":")[2]))
        for _ in range(3):
            writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            await reader.readuntil(b"}")
            await asyncio.sleep(0.6)  # it is not the whole time that counts
        assert await reader.read() == b""
        writer.close()
