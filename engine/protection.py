"""What keeps bulk work from slowing people down inside the engine, as far as it can be known from outside."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

Policy = Literal["auto", "priority", "fcfs"]
"""What an operator may say of an engine that does not tell: its --scheduling-policy, or nothing (auto)."""


class Protection(StrEnum):
    """Who decides, inside the engine, between people and bulk work."""

    SCHEDULER = "scheduler"
    """velocity's co-serving scheduler."""
    PRIORITY = "priority"
    """vLLM's own --scheduling-policy priority: it orders only the requests that wait."""
    NONE = "none"
    """Nobody (first come, first served), or it is not known."""


@dataclass(frozen=True, slots=True)
class EngineProtection:
    """One engine's protection, and what follows from it for bulk work."""

    protection: Protection
    batch_seats: int = 0
    """Requests that bulk may have in flight to use the engine fully: its seats without the interactive reserve, of all
    data-parallel ranks together; 0: not known."""
    status: dict[str, Any] = field(default_factory=dict)
    """The scheduler's report (engine/scheduler/report.py), all ranks together; empty without one."""


def told(answer: object) -> EngineProtection | None:
    """What velocity's door in the engine says of it (engine/scheduler/door.py); None for anything else."""
    if not isinstance(answer, dict) or "scheduler" not in answer:
        return None
    seats, report = answer.get("batch_seats"), answer.get("report")
    if answer["scheduler"] == "velocity":
        protection = Protection.SCHEDULER
    else:
        protection = Protection.PRIORITY if answer.get("policy") == "priority" else Protection.NONE
    return EngineProtection(
        protection, seats if isinstance(seats, int) else 0, report if isinstance(report, dict) else {}
    )


def assumed(policy: Policy) -> EngineProtection:
    """That of an engine which does not tell, from what the operator says of it."""
    return EngineProtection(Protection.PRIORITY if policy == "priority" else Protection.NONE)
