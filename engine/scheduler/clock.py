"""How long each step took, told from the calls that vLLM's engine loop makes to its scheduler."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """What a step computed: sequences that decode, prompt tokens, and whether an interactive request took part."""

    decodes: int
    prefill: int
    interactive: bool


@dataclass(frozen=True)
class TimedStep:
    """A step and its duration in seconds."""

    step: Step
    seconds: float


class StepClock:
    """Pairs scheduled steps with their durations.

    With an asynchronous worker (a GPU) the engine loop schedules one step ahead: a step runs from the moment it was
    handed over, or from the end of the one before it if that is later, until its result arrives. A synchronous worker
    (vLLM on a CPU) computes inside the very call that hands it the step: it runs until the engine loop calls the
    scheduler again.
    """

    def __init__(self, *, synchronous: bool, now: Callable[[], float] = time.monotonic) -> None:
        self._synchronous = synchronous
        self._now = now
        self._flying: deque[tuple[int, Step, float]] = deque()
        self._computing: tuple[Step, float] | None = None
        self._last_end = 0.0

    def called(self) -> TimedStep | None:
        """The engine loop is back. Returns the step that this ends, if the worker is a synchronous one."""
        if self._computing is None:
            return None
        step, began = self._computing
        self._computing = None
        return TimedStep(step, self._now() - began)

    def handed_over(self, key: int, step: Step) -> None:
        """A step was scheduled and goes to the worker now. `key` names it again when its result arrives."""
        if self._synchronous:
            self._computing = (step, self._now())
        else:
            self._flying.append((key, step, self._now()))

    def finished(self, key: int) -> TimedStep | None:
        """The result of a step arrived. Returns it with its duration, if the worker is an asynchronous one."""
        while self._flying:
            found, step, began = self._flying.popleft()
            if found == key:
                end = self._now()
                seconds = end - max(began, self._last_end)
                self._last_end = end
                return TimedStep(step, seconds)
        return None
