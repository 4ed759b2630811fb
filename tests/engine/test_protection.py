"""What protects people in an engine: told by velocity's door in it, or by its operator."""

from __future__ import annotations

import asyncio

import pytest

from engine.client import EngineClient
from engine.errors import EngineError, EngineTimeout, EngineUnreachable
from engine.ports import free_port
from engine.protection import EngineProtection, Policy, Protection
from engine.settings import EngineSettings
from tests.engine.test_connection import answering, raw_server
from tests.fake_engine import fake_engine


def answer(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        *((status, b'{"scheduler": "velocity"}') for status in (401, 403, 404, 405, 500, 503, 302)),
        *((200, body) for body in (b"", b"<html>", b"[]", b"null", b"{}", b'"scheduler"', b'{"status": "ok"}')),
    ],
)
async def test_an_engine_without_the_door_is_what_its_operator_says(status: int, body: bytes) -> None:
    said: dict[Policy, Protection] = {
        "auto": Protection.NONE, "fcfs": Protection.NONE, "priority": Protection.PRIORITY,
    }  # fmt: skip
    for policy, protection in said.items():
        async with raw_server(answering(answer(status, body))) as url, EngineClient(url, policy=policy) as client:
            assert await client.protection() == EngineProtection(protection, 0, {})


@pytest.mark.parametrize("policy", ["auto", "fcfs", "priority"])
async def test_the_door_knows_better_than_the_operator(policy: Policy) -> None:
    async with fake_engine() as engine, EngineClient(engine.url, policy=policy) as client:
        engine.scheduler = {"scheduler": "velocity", "batch_seats": 7, "report": {"batch": {"seated": 2}}}
        assert await client.protection() == EngineProtection(Protection.SCHEDULER, 7, {"batch": {"seated": 2}})
        engine.scheduler = {"scheduler": "vllm", "policy": "priority", "batch_seats": 7, "report": None}
        assert await client.protection() == EngineProtection(Protection.PRIORITY, 7, {})
        engine.scheduler = {"scheduler": "vllm", "policy": "fcfs", "batch_seats": "many", "report": []}
        assert await client.protection() == EngineProtection(Protection.NONE, 0, {})


async def test_an_engine_that_is_away_or_silent_is_an_error() -> None:
    async with EngineClient(f"http://127.0.0.1:{free_port()}") as client:
        with pytest.raises(EngineUnreachable):
            await client.protection()

    async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    async with raw_server(silent) as url, EngineClient(url) as client:
        with pytest.raises(EngineTimeout):
            await client.protection(timeout=0.1)
    async with raw_server(answering(b"no http\r\n\r\n")) as url, EngineClient(url) as client:
        with pytest.raises(EngineError):
            await client.protection()


async def test_the_setting_reaches_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VELOCITY_ENGINE_POLICY", "priority")
    async with fake_engine() as engine, EngineClient.of(EngineSettings(engine_url=engine.url)) as client:
        assert (await client.protection()).protection is Protection.PRIORITY
