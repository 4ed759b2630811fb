"""What the api knows of its engine: whether it serves, what protects people in there, and whether bulk work runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from api import engine_watch
from api.cli.main import app
from api.engine_watch import EngineWatch
from engine.client import EngineClient
from engine.ports import free_port
from engine.protection import Protection
from tests.api.conftest import Door
from tests.engine.test_scheduler_report import status, worked
from tests.fake_engine import Connection, FakeEngine, fake_engine, serving
from workers.window import Tally

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "tokens 5"}], "stream": True}


def told(seated: int = 0, **changes: Any) -> dict[str, Any]:
    """What the door in an engine says."""
    report = status(worked()) | {"batch": {"seated": seated, "parked": 0, "room": 3}}
    return {"scheduler": "velocity", "policy": "priority", "batch_seats": 56, "report": report} | changes


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask at every refresh."""
    monkeypatch.setattr(engine_watch, "_FRESH_SECONDS", 0)
    monkeypatch.setattr(engine_watch, "_PROTECTION_SECONDS", 0)


def protection(watch: EngineWatch) -> Protection | None:
    return watch.protection.protection if watch.protection else None


@pytest.mark.usefixtures("impatient")
async def test_a_change_of_protection_is_logged_once_and_none_is_a_warning() -> None:
    async with fake_engine() as engine, EngineClient(engine.url) as client:
        watch = EngineWatch(client)
        assert watch.protection is None
        seen: list[tuple[str, str]] = []
        for said in (None, None, told(), told(1), told(scheduler="vllm"), None):
            engine.scheduler = said
            with structlog.testing.capture_logs() as logs:
                await watch.refresh()
            seen += [(e["log_level"], e["protection"]) for e in logs if e["event"] == "engine_protection"]
        assert seen == [("warning", "none"), ("info", "scheduler"), ("info", "priority"), ("warning", "none")]
        engine.healthy = False
        await watch.refresh()
        assert watch.protection is None
        engine.healthy = True
        with structlog.testing.capture_logs() as logs:
            await watch.refresh()
        assert [e["log_level"] for e in logs if e["event"] == "engine_protection"] == ["warning"]
        assert "VELOCITY_ENGINE_POLICY" in logs[-1]["meaning"]


async def test_it_asks_seldom_but_at_once_when_the_engine_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_watch, "_FRESH_SECONDS", 0)
    monkeypatch.setattr(engine_watch, "_PROTECTION_SECONDS", 3600)
    async with fake_engine() as engine, EngineClient(engine.url) as client:
        watch = EngineWatch(client)
        for said, known in ((told(), "scheduler"), (None, "scheduler")):
            engine.scheduler = said
            await watch.refresh()
            assert protection(watch) == known
        for healthy in (False, True):
            engine.healthy = healthy
            await watch.refresh()
        assert protection(watch) is Protection.NONE


class _Breaking(Connection):
    """Breaks off when it is asked for its scheduler and has none to tell of."""

    def on_message_complete(self) -> None:
        if self.url == b"/velocity/scheduler" and self.engine.scheduler is None:
            self.transport.abort()
        else:
            super().on_message_complete()


@pytest.mark.usefixtures("impatient")
async def test_one_that_does_not_answer_this_keeps_what_it_had() -> None:
    async with serving(FakeEngine(), _Breaking) as engine, EngineClient(engine.url) as client:
        watch = EngineWatch(client)
        for said, known in ((None, None), (told(), "scheduler"), (None, "scheduler")):
            engine.scheduler = said
            await watch.refresh()
            assert watch.up
            assert protection(watch) == known


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await holds():
            await asyncio.sleep(0.01)


@pytest.mark.usefixtures("impatient")
async def test_health_and_metrics_tell_it(door: Door) -> None:
    def values() -> dict[str, float]:
        text = door.gateway.metrics.render()[0].decode()
        families = {family.name: family for family in text_string_to_metric_families(text)}
        return {s.labels["protection"]: s.value for s in families["velocity_engine_protection"].samples}

    async with door.client() as client:
        for said, healthy, known in (
            (told(), True, "scheduler"), (told(scheduler="vllm"), True, "priority"), (None, True, "none"),
            (None, False, None),
        ):  # fmt: skip
            door.engine.scheduler, door.engine.healthy = said, healthy
            assert (await client.get("/health")).json()["protection"] == known
            assert values() == {each: float(each == known) for each in Protection}


@pytest.mark.usefixtures("impatient")
async def test_latencies_with_bulk_at_the_engine_are_counted_apart(door: Door) -> None:
    def counts() -> dict[tuple[str, str], float]:
        text = door.gateway.metrics.render()[0].decode()
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        wanted = {"velocity_ttft_seconds_count": "ttft", "velocity_itl_seconds_count": "itl"}
        return {(wanted[s.name], s.labels["bulk"]): s.value for s in samples if s.name in wanted}

    async with door.client() as client:
        for in_flight, requests in ((0, 2), (5, 3)):
            await door.gateway.ledger.beat("worker", 15, tally=Tally(in_flight=in_flight))
            await door.gateway.bulk.refresh()
            for _ in range(requests):
                assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200

    async def accounted() -> bool:  # a stream is counted when it has left
        return counts()["ttft", "no"] == 2 and counts().get(("ttft", "yes")) == 3

    await until(accounted)
    assert counts()["itl", "yes"] > 0
    assert counts()["itl", "no"] > 0


async def test_the_command_line_shows_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VELOCITY_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")

    async def shown(url: str, code: int) -> str:
        monkeypatch.setenv("VELOCITY_ENGINE_URL", url)
        result = await asyncio.to_thread(CliRunner().invoke, app, ["engine", "status"])
        assert result.exit_code == code, result.output
        return " ".join(result.output.split())

    async with fake_engine() as engine:
        assert "protection none that is known bulk at a time not known" in await shown(engine.url, 0)
        engine.scheduler = told(2)
        text = await shown(engine.url, 0)
        for words in (
            "protection scheduler", "bulk at a time 56 requests", "interactive_ratio 1.2", "2 bulk, 0 of them parked",
            "steps 1 with interactive requests, 2 without", "preemptions 1, 30 tokens", "33 in interactive steps",
        ):  # fmt: skip
            assert words in text
    assert "error:" in await shown(f"http://127.0.0.1:{free_port()}", 1)
