"""The co-server on a scheduler's objects, without vLLM: who takes part in a step, who is parked, who is preempted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.scheduler.coserver import CoServer, UnsuitableEngine


def dense(decodes: int, prefill: int) -> float:
    """A CPU, or a dense model: every sequence costs the same."""
    return 0.034 + 0.002 * decodes + 0.0008 * prefill


class FakeEngine:
    """The attributes of vLLM's scheduler that the co-server uses."""

    def __init__(self, seats: int = 8, free_blocks: int = 100) -> None:
        pool = SimpleNamespace(num_gpu_blocks=100, free=free_blocks)
        pool.get_num_free_blocks = lambda: pool.free
        self.kv_cache_manager = SimpleNamespace(block_pool=pool)
        self.running: list[Any] = []
        self.requests: dict[str, Any] = {}
        self.policy = SimpleNamespace(value="priority")
        self.block_size = 16
        self.max_num_running_reqs = seats
        self.max_num_scheduled_tokens = 512
        self.num_spec_tokens = 0
        self.connector: object | None = None
        self._pause_state = SimpleNamespace(value=0)
        self.preempted: list[str] = []

    def _preempt_request(self, request: Any, _timestamp: float) -> None:
        request.status = SimpleNamespace(name="PREEMPTED")
        self.preempted.append(request.request_id)
        self.kv_cache_manager.block_pool.free += 10

    def request(self, name: str, *, priority: int, left: int = 1, running: bool = True, at: float = 0.0) -> Any:
        """A request with `left` tokens to compute."""
        made = SimpleNamespace(
            request_id=name,
            priority=priority,
            arrival_time=at,
            num_tokens_with_spec=100,
            num_output_placeholders=0,
            num_computed_tokens=100 - left,
            num_prompt_tokens=90,
            num_tokens=100,
            status=SimpleNamespace(name="RUNNING" if running else "WAITING"),
            is_finished=lambda: False,
        )
        self.requests[name] = made
        if running:
            self.running.append(made)
        return made


def co_server(engine: FakeEngine, **environment: str) -> CoServer:
    server = CoServer(engine, environment, version="test", synchronous=False)
    for _ in range(300):
        for decodes in (1, 2, 4, 8):
            server._model.observe(decodes, 0, dense(decodes, 0))
        for prefill in (16, 64, 256):
            server._model.observe(4, prefill, dense(4, prefill))
    return server


def names(requests: list[Any]) -> list[str]:
    return [r.request_id for r in requests]


class TestCoServer:
    def test_parks_batch_while_a_person_is_there_and_puts_it_back(self) -> None:
        engine = FakeEngine()
        server = co_server(engine, VELOCITY_INTERACTIVE_RATIO="1.07", VELOCITY_BATCH_FLOOR="0")
        for n in range(5):
            engine.request(f"b{n}", priority=10, at=float(n))
        server.add(engine.request("p", priority=0, at=9.0))
        limits = server.begin()
        assert names(engine.running) == ["p", "b0"]
        assert (limits.tokens, limits.seats) == (2, 2)
        server.end(SimpleNamespace(num_scheduled_tokens={"p": 1, "b0": 1}))
        assert sorted(names(engine.running)) == ["b0", "b1", "b2", "b3", "b4", "p"]

    def test_a_long_prompt_comes_after_those_who_read(self) -> None:
        engine = FakeEngine()
        server = co_server(engine)
        server.add(engine.request("long", priority=0, left=90, at=1.0))
        server.add(engine.request("reader", priority=0, at=2.0))
        server.begin()
        assert names(engine.running) == ["reader", "long"]

    def test_puts_them_back_when_scheduling_fails(self) -> None:
        engine = FakeEngine()
        server = co_server(engine, VELOCITY_INTERACTIVE_RATIO="1.0", VELOCITY_BATCH_FLOOR="0")
        engine.request("b", priority=10)
        server.add(engine.request("p", priority=0))
        server.begin()
        assert names(engine.running) == ["p"]
        server.end(None)
        assert names(engine.running) == ["p", "b"]

    def test_a_person_without_a_seat_gets_the_youngest_batch_request_s(self) -> None:
        engine = FakeEngine(seats=3)
        server = co_server(engine, VELOCITY_BATCH_FLOOR="0")
        for n in range(3):
            engine.request(f"b{n}", priority=10, at=float(n))
        server.add(engine.request("p", priority=0, left=100, running=False))
        limits = server.begin()
        assert engine.preempted == ["b2"]
        assert limits.seats == len(engine.running) + 1
        assert server.report.wasted_tokens == 99

    def test_a_person_without_kv_blocks_gets_them_from_parked_requests_too(self) -> None:
        engine = FakeEngine(free_blocks=0)
        server = co_server(engine, VELOCITY_INTERACTIVE_RATIO="1.0", VELOCITY_BATCH_FLOOR="0")
        for n in range(4):
            engine.request(f"b{n}", priority=10, at=float(n))
        server.add(engine.request("p", priority=0, left=100, running=False))
        server.begin()
        assert engine.preempted == ["b3"]

    def test_batch_does_not_start_on_reserved_seats_or_blocks(self) -> None:
        engine = FakeEngine(seats=8)
        server = co_server(engine, VELOCITY_SEAT_RESERVE="0.25")
        for n in range(5):
            engine.request(f"b{n}", priority=10)
        assert server.begin().seats == 6
        server.end(None)
        engine.kv_cache_manager.block_pool.free = 5
        assert server.begin().seats == 5
        server.end(None)

    def test_refuses_a_vllm_that_lacks_something_by_name(self) -> None:
        engine = FakeEngine()
        del engine.kv_cache_manager.block_pool.num_gpu_blocks
        with pytest.raises(UnsuitableEngine, match=r"vLLM 9\.9.*num_gpu_blocks"):
            CoServer(engine, {}, version="9.9", synchronous=False)

    def test_refuses_a_kv_connector(self) -> None:
        engine = FakeEngine()
        engine.connector = object()
        with pytest.raises(UnsuitableEngine, match="KV connector"):
            CoServer(engine, {}, version="9.9", synchronous=False)

    def test_refuses_a_policy_that_ignores_priorities(self) -> None:
        engine = FakeEngine()
        engine.policy = SimpleNamespace(value="fcfs")
        with pytest.raises(UnsuitableEngine, match="--scheduling-policy priority"):
            CoServer(engine, {}, version="9.9", synchronous=False)

    def test_reports_what_it_does(self, tmp_path: Path) -> None:
        engine = FakeEngine()
        server = co_server(engine, VELOCITY_SCHEDULER_DIR=str(tmp_path))
        assert server.look() is None
        (tmp_path / "dial.json").write_text('{"interactive_ratio": 3}')
        server._next_look = 0.0
        assert "interactive_ratio=3.0" in (server.look() or "")
        status = json.loads((tmp_path / "status.json").read_text())
        assert status["scheduler"] == "velocity"
        assert status["dial"]["interactive_ratio"] == 3.0

    def test_reports_at_once_when_nobody_is_left(self, tmp_path: Path) -> None:
        engine = FakeEngine()
        server = co_server(engine, VELOCITY_SCHEDULER_DIR=str(tmp_path))
        server.look()
        engine.request("b", priority=10)
        server.begin()
        server.end(SimpleNamespace(num_scheduled_tokens={"b": 1}))
        assert server.rest() is None
        status = json.loads((tmp_path / "status.json").read_text())
        assert (status["steps"]["batch"], status["batch"]["seated"]) == (1, 0)
