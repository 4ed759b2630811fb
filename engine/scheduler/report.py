"""What the scheduler did, for people and for metrics: counters since the engine started, and the present state."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from engine.scheduler.clock import Step, TimedStep
from engine.scheduler.policy import Grant, Policy

DURATIONS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Upper bounds, in seconds, of the buckets that steps are counted in; there is one more for what is longer."""
KINDS = ("interactive", "batch")
"""Kinds of steps: those in which an interactive request took part, and the others."""
PHASES = ("prefill", "decode")

_LARGEST = frozenset({"at", "longest_parked_seconds", "last_step_seconds", "longest_batch_step_seconds"})
_FIRST = frozenset({"scheduler", "pid", "dial", "model"})


class Crowd(Protocol):
    """The part of a step's scene that is counted."""

    people: list[Any]
    arriving: list[Any]
    decoding: list[Any]
    prefilling: list[Any]


def _by_kind() -> dict[str, int]:
    return dict.fromkeys(KINDS, 0)


@dataclass
class Report:
    """Counts; `status` turns them into plain data for status.json."""

    steps: dict[str, int] = field(default_factory=_by_kind)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    durations: dict[str, list[int]] = field(default_factory=lambda: {k: [0] * (len(DURATIONS) + 1) for k in KINDS})
    """Steps by bucket of DURATIONS, not cumulative."""
    batch_sequence_steps: dict[str, int] = field(default_factory=_by_kind)
    batch_tokens: dict[str, dict[str, int]] = field(
        default_factory=lambda: {kind: dict.fromkeys(PHASES, 0) for kind in KINDS}
    )
    """The harvest: tokens computed for batch requests, by kind of step and by phase."""
    floor_steps: int = 0
    preemptions: int = 0
    wasted_tokens: int = 0
    interactive_now: int = 0
    batch_now: int = 0
    parked_now: int = 0
    room: int = 0
    last_seconds: float = 0.0

    def scheduled(self, crowd: Crowd, grant: Grant, parked: int, step: Step) -> None:
        """A step was scheduled: who was there, what batch was granted, how many were left out."""
        kind = "interactive" if step.interactive else "batch"
        self.steps[kind] += 1
        self.batch_sequence_steps[kind] += min(grant.decodes, len(crowd.decoding))
        self.floor_steps += grant.floor
        self.interactive_now = len(crowd.people) + len(crowd.arriving)
        self.batch_now = len(crowd.decoding) + len(crowd.prefilling)
        self.parked_now = parked
        self.room = grant.room

    def computed(self, scheduled: Mapping[str, int], requests: Mapping[str, Any]) -> None:
        """A step computes so many tokens for each of these requests, which have been moved on by that many already."""
        total = prefill = 0
        kind = "batch"
        for name, tokens in scheduled.items():
            request = requests[name]
            if request.priority <= 0:
                kind = "interactive"
                continue
            total += tokens
            if request.num_computed_tokens - tokens < request.num_prompt_tokens - 1:
                prefill += tokens
        harvest = self.batch_tokens[kind]
        harvest["prefill"] += prefill
        harvest["decode"] += total - prefill

    def timed(self, timed: TimedStep) -> None:
        """A step's duration became known."""
        kind = "interactive" if timed.step.interactive else "batch"
        self.seconds[kind] += timed.seconds
        self.durations[kind][bisect_left(DURATIONS, timed.seconds)] += 1
        self.last_seconds = timed.seconds

    def rested(self) -> None:
        """Nobody is there any more."""
        self.interactive_now = self.batch_now = self.parked_now = 0

    def preempted(self, computed_tokens: int) -> None:
        """A batch request lost its KV cache to an interactive one: these tokens are computed again."""
        self.preemptions += 1
        self.wasted_tokens += computed_tokens

    def status(self, policy: Policy, longest_parked: float, at: float) -> dict[str, object]:
        """Everything, in seconds and counts. `at` is the time of day, so that a reader can tell a stale report."""
        dial = policy.dial
        return {
            "at": at,
            "pid": os.getpid(),
            "scheduler": "velocity",
            "dial": asdict(dial),
            "interactive": self.interactive_now,
            "batch": {"seated": self.batch_now, "parked": self.parked_now, "room": self.room},
            "longest_parked_seconds": longest_parked,
            "steps": dict(self.steps),
            "step_seconds": dict(self.seconds),
            "step_durations": self.durations,
            "batch_sequence_steps": dict(self.batch_sequence_steps),
            "batch_tokens": self.batch_tokens,
            "floor_steps": self.floor_steps,
            "preemptions": self.preemptions,
            "wasted_tokens": self.wasted_tokens,
            "last_step_seconds": self.last_seconds,
            "longest_batch_step_seconds": policy.longest_alone() if policy.model.known else None,
            "model": {
                "decode_seconds": {n: policy.model.seconds(n, 0) for n in (1, 8, 64, 256)},
                "prefill_seconds": {n: policy.model.seconds(1, n) for n in (64, 256, 1024)},
            },
        }


def at_rest(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report of an engine that computes nothing any more: vLLM does not call the scheduler of an idle engine."""
    nobody = {"seated": 0, "parked": 0, "room": report["batch"]["room"]}
    return {**report, "interactive": 0, "batch": nobody, "longest_parked_seconds": 0.0}


def together(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One report for several data-parallel ranks: counts are summed, of times the longest counts.

    The dial and the model are those of the first.
    """
    first = reports[0]
    return {name: _merged(name, [r[name] for r in reports]) for name in first if all(name in r for r in reports)}


def _merged(name: str, values: Sequence[Any]) -> Any:
    if name in _FIRST:
        return values[0]
    if name in _LARGEST:
        return max((value for value in values if value is not None), default=None)
    if isinstance(values[0], Mapping):
        return {key: _merged(key, [value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], list):
        return [sum(column) for column in zip(*values, strict=True)]
    return sum(values) if isinstance(values[0], int | float) else values[0]
