"""What the scheduler did, for people and for metrics: counters since the engine started, and the present state."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from engine.scheduler.clock import Step, TimedStep
from engine.scheduler.policy import Grant, Policy


class Crowd(Protocol):
    """The part of a step's scene that is counted."""

    people: list[Any]
    arriving: list[Any]
    decoding: list[Any]
    prefilling: list[Any]


@dataclass
class Report:
    """Counts; `status` turns them into plain data for status.json."""

    steps: dict[str, int] = field(default_factory=lambda: {"interactive": 0, "batch": 0})
    seconds: dict[str, float] = field(default_factory=lambda: {"interactive": 0.0, "batch": 0.0})
    batch_sequence_steps: dict[str, int] = field(default_factory=lambda: {"interactive": 0, "batch": 0})
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

    def timed(self, timed: TimedStep) -> None:
        """A step's duration became known."""
        self.seconds["interactive" if timed.step.interactive else "batch"] += timed.seconds
        self.last_seconds = timed.seconds

    def preempted(self, computed_tokens: int) -> None:
        """A batch request lost its KV cache to an interactive one: these tokens are computed again."""
        self.preemptions += 1
        self.wasted_tokens += computed_tokens

    def status(self, policy: Policy, longest_parked: float, at: float) -> dict[str, object]:
        """Everything, in seconds and counts. `at` is the time of day, so that a reader can tell a stale report."""
        dial = policy.dial
        return {
            "at": at,
            "scheduler": "velocity",
            "dial": asdict(dial),
            "interactive": self.interactive_now,
            "batch": {"seated": self.batch_now, "parked": self.parked_now, "room": self.room},
            "longest_parked_seconds": longest_parked,
            "steps": dict(self.steps),
            "step_seconds": dict(self.seconds),
            "batch_sequence_steps": dict(self.batch_sequence_steps),
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
