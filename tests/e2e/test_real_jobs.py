"""Bulk jobs on the real vLLM through a real `velocity up`: drained, cancelled, and finished whoever dies meanwhile."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from tests.e2e.conftest import Up

pytestmark = pytest.mark.vllm


def body(items: int, max_tokens: int) -> dict[str, Any]:
    return {
        "model": "velocity-30b",
        "defaults": {"max_tokens": max_tokens, "ignore_eos": True},
        "items": [
            {"id": f"item-{n}", "messages": [{"role": "user", "content": f"Describe component number {n}."}]}
            for n in range(items)
        ],
    }


def first_short(items: int, max_tokens: int) -> dict[str, Any]:
    """A job whose first item is finished long before the others: what is done meanwhile happens in its middle."""
    job = body(items, max_tokens)
    job["items"][0]["max_tokens"] = 2
    return job


def submit(http: httpx.Client, job: dict[str, Any]) -> str:
    response = http.post("/jobs", json=job)
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def wait(http: httpx.Client, job: str, seconds: float) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state = dict(http.get(f"/jobs/{job}").json())
        if state["status"] in {"completed", "cancelled", "expired"}:
            return state
        time.sleep(0.2)
    return pytest.fail(f"the job is not over after {seconds} s: {state}")


def reached(http: httpx.Client, job: str, items: int) -> None:
    """Once so many items are completed, and the job is still in its middle."""
    while (state := http.get(f"/jobs/{job}").json())["counts"]["completed"] < items:
        time.sleep(0.05)
    assert state["status"] == "in_progress", state


def finished(http: httpx.Client, job: str) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in http.get(f"/jobs/{job}/results").text.splitlines()]


def test_forty_items_on_the_command_line(real: Up, tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_bytes(orjson.dumps({"name": "forty", **body(40, 16)}))
    submitted = real.velocity("jobs", "submit", str(file), "--watch")
    job = submitted.stdout.split()[0]
    shown = orjson.loads(real.velocity("jobs", "show", job).stdout)
    assert (shown["status"], shown["counts"]) == ("completed", {"total": 40, "completed": 40, "failed": 0})
    assert shown["usage"]["output_tokens"] == 40 * 16
    lines = [orjson.loads(line) for line in real.velocity("jobs", "results", job).stdout.splitlines()]
    assert [line["id"] for line in lines] == [f"item-{n}" for n in range(40)]
    assert all(line["response"]["choices"][0]["message"]["content"] for line in lines)
    assert "forty" in real.velocity("jobs", "list").stdout


def test_a_killed_worker_loses_nothing(real: Up) -> None:
    with real.client() as http:
        job = submit(http, first_short(40, 48))
        while not http.get(f"/jobs/{job}").json()["counts"]["completed"]:
            time.sleep(0.05)
        killed = real.pid_of("worker")
        os.kill(killed, signal.SIGKILL)
        state = wait(http, job, 120)
        assert (state["status"], state["counts"]["completed"]) == ("completed", 40)
        lines = finished(http, job)
    assert [line["index"] for line in lines] == list(range(40))
    assert real.pid_of("worker") != killed


def test_cancel_stops_the_engines_work_and_keeps_what_is_finished(real: Up) -> None:
    with real.client() as http:
        job = submit(http, first_short(400, 500))
        while not http.get(f"/jobs/{job}").json()["counts"]["completed"]:
            time.sleep(0.05)
        cancelled = real.velocity("jobs", "cancel", job)
        assert "cancelling" in cancelled.stdout, http.get(f"/jobs/{job}").text
        state = wait(http, job, 35)
        assert state["status"] == "cancelled"
        assert 0 < state["counts"]["completed"] < 400
        assert len(finished(http, job)) == state["counts"]["completed"]


def test_chat_streams_while_a_job_runs(real: Up) -> None:
    chat = {"model": "velocity-30b", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "stream": True}
    with real.client() as http:
        job = submit(http, first_short(400, 500))
        while http.get(f"/jobs/{job}").json()["status"] == "queued":
            time.sleep(0.05)
        with http.stream("POST", "/v1/chat/completions", json=chat) as response:
            assert response.read().endswith(b"data: [DONE]\n\n")
        assert http.get(f"/jobs/{job}").json()["status"] == "in_progress"
        http.post(f"/jobs/{job}/cancel")
        wait(http, job, 35)


def test_two_hundred_items_outlive_a_killed_worker_and_a_killed_engine(real: Up) -> None:
    with real.client() as http:
        job = submit(http, first_short(200, 24))
        reached(http, job, 20)
        os.kill(real.pid_of("worker"), signal.SIGKILL)
        reached(http, job, 60)
        (vllm,) = children(real.pid_of("engine serve"))
        os.kill(vllm, signal.SIGKILL)
        real.wait_for("vLLM died", 30)
        chat = {"model": "velocity-30b", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
        refused = http.post("/v1/chat/completions", json=chat)
        assert refused.status_code in {502, 503}
        again = http.post("/v1/chat/completions", json=chat)
        assert again.status_code == 503
        assert again.headers["retry-after"]
        real.wait_for("vLLM is back", 400)
        state = wait(http, job, 120)
        assert (state["status"], state["counts"]) == ("completed", {"total": 200, "completed": 200, "failed": 0})
        assert [(line["index"], line["id"]) for line in finished(http, job)] == [(n, f"item-{n}") for n in range(200)]
        assert http.post("/v1/chat/completions", json=chat).status_code == 200


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
