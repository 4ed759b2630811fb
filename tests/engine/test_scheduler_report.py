"""The scheduler's report: what is counted, how ranks are put together, and whose file counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.scheduler.clock import Step, TimedStep
from engine.scheduler.model import StepModel
from engine.scheduler.policy import Grant, Policy
from engine.scheduler.report import DURATIONS, Report, at_rest, together
from engine.scheduler.settings import ControlFolder, Dial


def request(*, priority: int, prompt: int, computed: int) -> Any:
    """A request with so many tokens computed at the end of the step."""
    return SimpleNamespace(priority=priority, num_prompt_tokens=prompt, num_computed_tokens=computed)


def worked() -> Report:
    """A report after one step with people and two without."""
    report = Report()
    requests = {
        "person": request(priority=0, prompt=100, computed=100),
        "decoding": request(priority=10, prompt=10, computed=12),
        "prefilling": request(priority=10, prompt=50, computed=32),
    }
    crowd = SimpleNamespace(people=[1], arriving=[2], decoding=[3, 4, 5], prefilling=[6])
    for seconds, interactive, tokens in (
        (0.004, True, {"person": 100, "decoding": 1, "prefilling": 32}),
        (0.06, False, {"decoding": 1, "prefilling": 16}),
        (99.0, False, {"decoding": 1}),
    ):
        step = Step(decodes=1, prefill=32, interactive=interactive)
        report.scheduled(crowd, Grant(2, 32, 7, floor=interactive), 1, step)
        report.computed(tokens, requests)
        report.timed(TimedStep(step, seconds))
    report.preempted(30)
    return report


def status(report: Report) -> dict[str, Any]:
    """As a reader of the file gets it."""
    policy = Policy(StepModel(), Dial(seat_reserve=0.25))
    found: dict[str, Any] = json.loads(json.dumps(report.status(policy, 3.0, 1000.0)))
    return found


def test_counts_the_harvest_by_kind_of_step_and_by_phase() -> None:
    found = status(worked())
    assert found["steps"] == {"interactive": 1, "batch": 2}
    assert found["batch_tokens"] == {
        "interactive": {"prefill": 32, "decode": 1},
        "batch": {"prefill": 16, "decode": 2},
    }
    assert (found["floor_steps"], found["preemptions"], found["wasted_tokens"]) == (1, 1, 30)
    assert (found["interactive"], found["batch"]) == (2, {"seated": 4, "parked": 1, "room": 7})


def test_a_step_falls_into_the_bucket_that_holds_it() -> None:
    durations = status(worked())["step_durations"]
    assert {kind: sum(counts) for kind, counts in durations.items()} == {"interactive": 1, "batch": 2}
    assert durations["interactive"][DURATIONS.index(0.005)] == 1
    assert durations["batch"][DURATIONS.index(0.075)] == durations["batch"][-1] == 1
    report = Report()
    report.timed(TimedStep(Step(1, 0, interactive=False), DURATIONS[3]))
    assert report.durations["batch"][3] == 1  # a bound belongs to its bucket, as Prometheus counts


def test_ranks_are_summed_and_of_times_the_longest_counts() -> None:
    one = status(worked())
    other = one | {"at": 1001.0, "longest_parked_seconds": 5.0, "longest_batch_step_seconds": 0.2, "pid": 1}
    both = together([one, other])
    assert both["steps"] == {"interactive": 2, "batch": 4}
    assert both["batch"] == {"seated": 8, "parked": 2, "room": 14}
    assert both["batch_tokens"]["interactive"] == {"prefill": 64, "decode": 2}
    assert both["step_durations"]["batch"][-1] == 2
    assert (both["at"], both["longest_parked_seconds"], both["longest_batch_step_seconds"]) == (1001.0, 5.0, 0.2)
    assert (both["dial"], both["model"], both["pid"]) == (one["dial"], one["model"], one["pid"])
    assert together([one]) == one


def test_an_idle_engine_serves_nobody_but_has_counted() -> None:
    before = status(worked())
    after = at_rest(before)
    assert (after["interactive"], after["longest_parked_seconds"]) == (0, 0.0)
    assert after["batch"] == {"seated": 0, "parked": 0, "room": 7}
    assert after["steps"] == before["steps"]


class TestControlFolder:
    def test_every_rank_has_a_file_and_the_first_keeps_its_name(self, tmp_path: Path) -> None:
        for rank in (None, "0", "1", "12"):
            environment = {"VELOCITY_SCHEDULER_DIR": str(tmp_path)}
            folder = ControlFolder.from_environment(
                environment | ({"VELOCITY_SCHEDULER_RANK": rank} if rank is not None else {})
            )
            assert folder is not None
            folder.report({"pid": os.getpid(), "rank": rank})
        assert sorted(p.name for p in tmp_path.iterdir()) == ["status-1.json", "status-12.json", "status.json"]
        found = ControlFolder.reports(tmp_path)
        assert {rank: report["rank"] for rank, report in found.items()} == {0: "0", 1: "1", 12: "12"}

    def test_the_report_of_an_engine_that_has_ended_does_not_count(self, tmp_path: Path) -> None:
        with subprocess.Popen([sys.executable, "-c", ""]) as ended:
            pass
        ControlFolder(tmp_path).report({"pid": ended.pid})
        assert ControlFolder.reports(tmp_path) == {}

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"pid": "x"}'])
    def test_what_is_no_report_is_left_out(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "status-1.json").write_text(text)
        (tmp_path / "status-x.json").write_text(f'{{"pid": {os.getpid()}}}')
        ControlFolder(tmp_path).report({"pid": os.getpid()})
        assert list(ControlFolder.reports(tmp_path)) == [0]

    def test_a_folder_that_is_not_there_holds_no_report(self, tmp_path: Path) -> None:
        assert ControlFolder.reports(tmp_path / "none") == {}
