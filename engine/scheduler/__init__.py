"""The co-serving scheduler: chat keeps the latency of an idle engine while bulk work fills what is left of each step.

vLLM loads it by name inside its engine process: `--scheduling-policy priority --scheduler-cls
engine.scheduler.CoServingScheduler`. A request's class is its priority: up to 0 interactive, above 0 batch. It changes
*when* tokens are computed, never *which*.

    model      what a step costs, learned while serving: seconds from decoding sequences and prefill tokens
    clock      how long each step really took
    policy     how much batch work a step may carry, so that people notice no more than the dial allows
    parking    which batch sequences run, and which wait with their KV cache kept
    coserver   carries the plan out on vLLM's objects: survey, preempt, park, limit
    report     what was done, for people and for metrics
    settings   the dial: environment variables, and a small file for changing it while the engine runs
    door       the reports on the engine's own port, as JSON, and through `metrics` for Prometheus
    contract   what is relied on of vLLM, looked up in the source of any version
    scheduler  the subclass of vLLM's scheduler (the only module that imports vllm)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.scheduler.scheduler import CoServingScheduler

__all__ = ["CoServingScheduler"]


def __getattr__(name: str) -> Any:
    """Imports vLLM only when the scheduler itself is asked for: the policy works and is tested without it."""
    if name == "CoServingScheduler":
        return importlib.import_module("engine.scheduler.scheduler").CoServingScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
