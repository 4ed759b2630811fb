"""velocity's addresses on the engine's port: over real HTTP, as middleware of an app as vLLM has one."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from engine.client import EngineClient
from engine.ports import listen
from engine.protection import Protection
from engine.scheduler.door import SchedulerDoor, described
from engine.scheduler.settings import ControlFolder
from tests.engine.test_scheduler_report import status, worked


def config(scheduler: object = "engine.scheduler.CoServingScheduler", **changes: Any) -> Any:
    """vLLM's configuration, as far as it is looked at."""
    values = {"policy": "priority", "max_num_seqs": 64, "max_num_active_seqs": None, "scheduler_cls": scheduler}
    parallel = {"data_parallel_size": 1, "data_parallel_size_local": 1}
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(**values | {k: v for k, v in changes.items() if k in values}),
        parallel_config=SimpleNamespace(**parallel | {k: v for k, v in changes.items() if k not in values}),
    )


def report(folder: Path, rank: int = 0, *, age: float = 0.0, **changes: Any) -> None:
    """Leaves a scheduler's report, `age` seconds old."""
    now = {"at": time.time() - age, "last_step_seconds": 0.01}
    ControlFolder(folder, rank).report(status(worked()) | now | changes)


@pytest.fixture
async def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[str, FastAPI]]:
    """An app behind the door; its own address answers with what it was asked."""
    monkeypatch.setenv("VELOCITY_SCHEDULER_DIR", str(tmp_path))
    app = FastAPI()
    app.state.vllm_config = config()
    app.add_api_route("/velocity/other", lambda: "the app's own")
    app.add_middleware(SchedulerDoor)
    with listen("127.0.0.1", 0, "a test") as bound:
        server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_config=None, ws="none"))
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", app
        server.should_exit = True
        await serving


async def ask(url: str) -> dict[str, Any]:
    async with httpx.AsyncClient() as client:
        answer = await client.get(f"{url}/velocity/scheduler")
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


async def test_tells_the_scheduler_of_all_ranks(engine: tuple[str, FastAPI], tmp_path: Path) -> None:
    url, app = engine
    app.state.vllm_config = config(data_parallel_size=2)
    for rank in (0, 1):
        report(tmp_path, rank)
    found = await ask(url)
    assert (found["scheduler"], found["policy"], found["max_num_seqs"]) == ("velocity", "priority", 64)
    assert (found["data_parallel_ranks"], found["batch_seats"]) == (2, 96)  # the dial reserves a quarter for people
    assert found["report"]["batch"] == {"seated": 8, "parked": 2, "room": 14}
    assert [each["rank"] for each in found["ranks"]] == [0, 1]
    assert 0 <= found["report"]["age_seconds"] < 60

    async with EngineClient(url) as client:
        protection = await client.protection()
    assert (protection.protection, protection.batch_seats) == (Protection.SCHEDULER, 96)
    assert protection.status["batch"]["seated"] == 8


async def test_an_idle_engine_is_not_taken_for_a_dead_one(engine: tuple[str, FastAPI], tmp_path: Path) -> None:
    url, _ = engine
    report(tmp_path, age=3600)
    found = await ask(url)
    assert found["scheduler"] == "velocity"
    assert (found["report"]["interactive"], found["report"]["batch"]["seated"]) == (0, 0)
    assert found["report"]["steps"] == {"interactive": 1, "batch": 2}
    report(tmp_path, age=20, last_step_seconds=10.0)  # steps that long are no rest
    assert (await ask(url))["report"]["batch"]["seated"] == 4


@pytest.mark.parametrize(("policy", "protection"), [("priority", Protection.PRIORITY), ("fcfs", Protection.NONE)])
async def test_without_velocitys_scheduler_it_tells_the_policy(
    engine: tuple[str, FastAPI], policy: str, protection: Protection
) -> None:
    url, app = engine
    app.state.vllm_config = config(scheduler=None, policy=policy)
    async with EngineClient(url) as client:
        found = await client.protection()
    assert (found.protection, found.batch_seats, found.status) == (protection, 56, {})


async def test_before_vllm_is_ready_nothing_is_known(engine: tuple[str, FastAPI]) -> None:
    url, app = engine
    del app.state.vllm_config
    assert (await ask(url))["scheduler"] is None
    async with EngineClient(url) as client:
        assert (await client.protection()).protection is Protection.NONE


async def test_everything_else_passes(engine: tuple[str, FastAPI]) -> None:
    url, _ = engine
    async with httpx.AsyncClient(base_url=url) as client:
        assert (await client.get("/velocity/other")).json() == "the app's own"
        for path in ("/velocity", "/velocity/scheduler/", "/x"):
            assert (await client.get(path)).status_code == 404
        for path in ("/velocity/scheduler", "/velocity/metrics"):
            assert (await client.post(path)).status_code == 405
            head = await client.head(path)
            assert (head.status_code, head.content) == (200, b"")


async def test_metrics_say_what_the_reports_say(engine: tuple[str, FastAPI], tmp_path: Path) -> None:
    url, _ = engine
    for rank in (0, 1):
        report(tmp_path, rank)
    async with httpx.AsyncClient() as client:
        answer = await client.get(f"{url}/velocity/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert all(name.startswith("velocity_scheduler_") and family.documentation for name, family in families.items())
    values = {
        (s.name.removeprefix("velocity_scheduler_"), *(f"{k}={v}" for k, v in sorted(s.labels.items()))): s.value
        for family in families.values()
        for s in family.samples
    }
    assert values["steps_total", "kind=batch", "rank=1"] == 2
    assert values["batch_tokens_total", "kind=interactive", "phase=prefill", "rank=0"] == 32
    assert values["batch_sequences_parked", "rank=0"] == 1
    assert values["floor_steps_total", "rank=0"] == 1
    assert values["dial", "field=interactive_ratio", "rank=0"] == 1.2
    assert values["predicted_step_seconds", "decoding_sequences=8", "prompt_tokens=0", "rank=0"] == 0
    assert values["step_seconds_bucket", "kind=batch", "le=0.075", "rank=0"] == 1
    assert values["step_seconds_bucket", "kind=batch", "le=+Inf", "rank=0"] == 2
    assert values["step_seconds_sum", "kind=batch", "rank=0"] == pytest.approx(99.06)
    assert not any(name == "longest_batch_step_seconds" for name, *_ in values)  # nothing is learned yet


async def test_without_reports_the_metrics_have_no_series(engine: tuple[str, FastAPI]) -> None:
    url, _ = engine
    async with httpx.AsyncClient() as client:
        text = (await client.get(f"{url}/velocity/metrics")).text
    assert all(line.startswith("#") for line in text.splitlines())


@pytest.mark.parametrize(
    ("changes", "seats"),
    [
        ({}, 56),
        ({"max_num_active_seqs": 16}, 14),
        ({"max_num_seqs": 1}, 1),
        ({"data_parallel_size": 4}, 224),
        ({"data_parallel_size": 4, "data_parallel_external_lb": True}, 56),
        ({"data_parallel_size": 4, "data_parallel_size_local": 2, "data_parallel_hybrid_lb": True}, 112),
    ],
)
def test_the_seats_of_bulk(changes: dict[str, Any], seats: int) -> None:
    assert described(config(**changes), {}, 0.0)["batch_seats"] == seats


def test_the_reserve_is_the_environments_until_there_is_a_report() -> None:
    assert described(config(), {"VELOCITY_SEAT_RESERVE": "0.5"}, 0.0)["batch_seats"] == 32


@pytest.mark.parametrize(
    ("scheduler", "whose"),
    [
        ("engine.scheduler.CoServingScheduler", "velocity"),
        (type("CoServingScheduler", (), {"__module__": "engine.scheduler.scheduler"}), "velocity"),
        (type("Scheduler", (), {"__module__": "vllm.v1.core.sched.scheduler"}), "vllm"),
        ("other.CoServingScheduler", "vllm"),
        (None, "vllm"),
    ],
)
def test_whose_scheduler_it_is(scheduler: object, whose: str) -> None:
    assert described(config(scheduler), dict(os.environ), 0.0)["scheduler"] == whose
