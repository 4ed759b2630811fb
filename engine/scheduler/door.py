"""Two addresses of velocity's own on the engine's port: what the scheduler does, as JSON and for Prometheus.

vLLM loads the class by name into its API server: `--middleware engine.scheduler.door.SchedulerDoor`. The scheduler runs
in other processes, one per data-parallel rank, which leave their reports in the control folder. No key is asked for:
vLLM's --api-key guards /v1 alone, and numbers are all that is told here.

    GET /velocity/scheduler   as `described` says
    GET /velocity/metrics     velocity_scheduler_…, in Prometheus' text format
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from engine.scheduler.metrics import rendered
from engine.scheduler.report import at_rest, together
from engine.scheduler.settings import FOLDER, ControlFolder, Dial

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

IDLE_SECONDS = 5.0
"""Age of a report (or five steps, if they take longer) from which on the engine has nothing to do."""
_SCHEDULER, _METRICS = "/velocity/scheduler", "/velocity/metrics"
_OURS = frozenset({_SCHEDULER, _METRICS})
_CLASS = ("engine.scheduler", "CoServingScheduler")


class SchedulerDoor:
    """ASGI middleware. What is not for it passes through untouched."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path")
        if path not in _OURS or scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["method"] not in {"GET", "HEAD"}:
            await _send(send, 405, "application/json", b'{"detail":"Method Not Allowed"}')
        elif path == _SCHEDULER:
            body = json.dumps(described(_config(scope), os.environ, time.time())).encode()
            await _send(send, 200, "application/json", body)
        else:
            body, content_type = rendered(_ranks(os.environ, time.time()))
            await _send(send, 200, content_type, body)


def described(config: Any, environment: Mapping[str, str], at: float) -> dict[str, Any]:
    """The answer of /velocity/scheduler, from vLLM's configuration (None: not there yet) and the reports.

    `scheduler` is "velocity" where velocity's runs, since vLLM does not start without the one it was told to use;
    `report` is null until there is one. `batch_seats` leaves out what is reserved for people.
    """
    ranks = _ranks(environment, at)
    answer: dict[str, Any] = {
        "scheduler": None,
        "policy": None,
        "max_num_seqs": None,
        "data_parallel_ranks": None,
        "batch_seats": 0,
        "report": together(list(ranks.values())) if ranks else None,
        "ranks": [{"rank": rank, **report} for rank, report in ranks.items()],
    }
    if config is None:
        return answer
    scheduler, size = config.scheduler_config, _engines(config.parallel_config)
    ours = _is_velocitys(scheduler.scheduler_cls)
    dial = answer["report"]["dial"] if ranks else {}
    reserve = float(dial.get("seat_reserve", Dial.from_environment(environment).seat_reserve))
    seats = int(getattr(scheduler, "max_num_active_seqs", None) or scheduler.max_num_seqs)
    return answer | {
        "scheduler": "velocity" if ours else "vllm",
        "policy": str(getattr(scheduler.policy, "value", scheduler.policy)),
        "max_num_seqs": int(scheduler.max_num_seqs),
        "data_parallel_ranks": size,
        "batch_seats": size * max(1, seats - max(1, round(reserve * seats))),
    }


def _ranks(environment: Mapping[str, str], at: float) -> dict[int, dict[str, Any]]:
    """The reports by rank, each with its age in seconds; where nothing has run for a while, nobody is there."""
    folder = environment.get(FOLDER)
    found = ControlFolder.reports(Path(folder)) if folder else {}
    fresh = {}
    for rank, report in found.items():
        age = max(0.0, at - report["at"])
        idle = age > max(IDLE_SECONDS, 5 * report["last_step_seconds"])
        fresh[rank] = (at_rest(report) if idle else report) | {"age_seconds": age}
    return fresh


def _engines(parallel: Any) -> int:
    """Data-parallel ranks behind this address: with a balancer outside of vLLM only those of this machine."""
    apart = getattr(parallel, "data_parallel_external_lb", False) or getattr(parallel, "data_parallel_hybrid_lb", False)
    return max(1, int(parallel.data_parallel_size_local if apart else parallel.data_parallel_size))


def _is_velocitys(scheduler: object) -> bool:
    """Whether a --scheduler-cls, a dotted name or the class itself, is velocity's."""
    if isinstance(scheduler, str):
        module, _, name = scheduler.rpartition(".")
    else:
        module, name = getattr(scheduler, "__module__", ""), getattr(scheduler, "__name__", "")
    return module.startswith(_CLASS[0]) and name == _CLASS[1]


def _config(scope: Scope) -> Any:
    return getattr(getattr(scope.get("app"), "state", None), "vllm_config", None)


async def _send(send: Send, status: int, content_type: str, body: bytes) -> None:
    headers = [(b"content-type", content_type.encode()), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
