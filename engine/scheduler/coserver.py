"""Carries the policy out on one vLLM scheduler: who takes part in a step, and what that step may hold.

Works on vLLM's objects by their attributes alone and imports nothing of vLLM. It is a class of its own, not part of the
subclass, so that no name of it can hide one of vLLM's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.scheduler.clock import Step, StepClock, TimedStep
from engine.scheduler.model import StepModel
from engine.scheduler.parking import Parking
from engine.scheduler.policy import Absence, Demand, Grant, Policy
from engine.scheduler.report import Report
from engine.scheduler.settings import ControlFolder, Dial

NEEDED = (
    "running",
    "requests",
    "policy",
    "block_size",
    "max_num_running_reqs",
    "max_num_scheduled_tokens",
    "num_spec_tokens",
    "_pause_state",
    "_preempt_request",
    "kv_cache_manager.block_pool.get_num_free_blocks",
    "kv_cache_manager.block_pool.num_gpu_blocks",
)
"""What is used of vLLM's scheduler, beyond its methods schedule, add_request and update_from_output."""

STARTABLE = frozenset({"WAITING", "PREEMPTED"})
"""States of a request that could start now; others wait for a grammar, for remote KV, or for input."""


class UnsuitableEngine(RuntimeError):
    """This vLLM, or the way it was started, is one that the scheduler cannot work with. Says what to do."""


@dataclass
class Scene:
    """Who is there in one step. Lists are oldest first."""

    people: list[Any] = field(default_factory=list)
    """Interactive requests that run. Those that decode come first: a long prompt must not take the whole step."""
    arriving: list[Any] = field(default_factory=list)
    """Interactive requests that could start."""
    decoding: list[Any] = field(default_factory=list)
    """Batch requests whose prompt is computed."""
    prefilling: list[Any] = field(default_factory=list)
    """Batch requests in the middle of their prompt."""
    decodes: int = 0
    """Interactive sequences that decode."""
    prefill: int = 0
    """Prompt tokens of interactive requests, running or arriving."""

    @property
    def batch(self) -> list[Any]:
        """Every batch request that holds a seat."""
        return self.decoding + self.prefilling


@dataclass(frozen=True)
class Limits:
    """What the next step may hold: tokens, and requests in `running` at its end."""

    tokens: int
    seats: int


class CoServer:
    """Between `begin` and `end` of a step, the parked batch requests are not in the engine's `running`."""

    def __init__(
        self,
        engine: Any,
        environment: Mapping[str, str],
        *,
        version: str,
        synchronous: bool,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        check(engine, version)
        self._engine = engine
        self._now = now
        self._most_tokens: int = engine.max_num_scheduled_tokens
        self._most_seats: int = getattr(engine, "max_num_active_reqs", engine.max_num_running_reqs)
        self._width = 1 + int(engine.num_spec_tokens)
        self._pool = engine.kv_cache_manager.block_pool
        self._model = StepModel()
        self.policy = Policy(self._model, Dial.from_environment(environment))
        self._parking = Parking()
        self._absence = Absence()
        self._clock = StepClock(synchronous=synchronous, now=now)
        self._control = ControlFolder.from_environment(environment)
        self.report = Report()
        self._people: dict[str, Any] = {}
        self._parked: list[Any] = []
        self._scene = Scene()
        self._grant = Grant(0, 0, 0)
        self._next_look = 0.0

    def add(self, request: Any) -> None:
        """Notes a request on its way in, if it is an interactive one."""
        if request.priority <= 0 and request.request_id not in self._people:
            self._people[request.request_id] = request
            self.policy.arrived(int(request.num_prompt_tokens))

    def begin(self) -> Limits:
        """Takes the batch requests that sit this step out from `running`; says what the step may hold."""
        self._learn(self._clock.called())
        now = self._now()
        scene = self._scene = self._survey()
        evicted = self._make_room(scene)
        grant = self._grant = self.policy.grant(self._demand(scene, now))
        self._parked = self._park(scene, grant, now)
        starting = 0 if evicted or not grant.prefill else self._startable(scene, grant)
        tokens = scene.decodes * self._width + scene.prefill + grant.decodes * self._width + grant.prefill
        seats = min(self._most_seats - len(self._parked), len(self._engine.running) + len(scene.arriving) + starting)
        return Limits(tokens=max(1, min(self._most_tokens, tokens)), seats=max(1, seats))

    def end(self, output: Any | None) -> None:
        """Puts the parked requests back, and notes what was scheduled (None: scheduling failed)."""
        self._engine.running = self._engine.running + self._parked
        if output is None:
            return
        step = self._classify(output)
        self.report.scheduled(self._scene, self._grant, len(self._parked), step)
        self._clock.handed_over(id(output), step)

    def finished(self, output: Any) -> None:
        """A step's result arrived."""
        self._learn(self._clock.called())
        self._learn(self._clock.finished(id(output)))

    def look(self) -> str | None:
        """About once a second: takes a turned dial, and reports. Returns a line for the log if there is news."""
        now = self._now()
        if self._control is None or now < self._next_look:
            return None
        self._next_look = now + 1.0
        before = self.policy.dial
        try:
            self.policy.dial = self._control.dial(before)
            self._control.report(self.report.status(self.policy, self._parking.longest(now), time.time()))
        except (OSError, ValueError) as error:
            return f"The control folder could not be used: {error}"
        return None if self.policy.dial == before else f"The dial was turned: {self.policy.dial}"

    def rest(self) -> str | None:
        """The last request has gone: reports at once, since vLLM does not call the scheduler of an idle engine."""
        self.report.rested()
        self._next_look = 0.0
        return self.look()

    def _learn(self, timed: TimedStep | None) -> None:
        if timed is not None:
            self._model.observe(timed.step.decodes, timed.step.prefill, timed.seconds)
            self.report.timed(timed)

    def _survey(self) -> Scene:
        scene = Scene()
        left_of = {r.request_id: tokens_left(r) for r in self._engine.running}
        for request in sorted(
            self._engine.running, key=lambda r: (left_of[r.request_id] > self._width, r.arrival_time)
        ):
            left = left_of[request.request_id]
            decoding = left <= self._width
            if request.priority > 0:
                (scene.decoding if decoding else scene.prefilling).append(request)
                continue
            scene.people.append(request)
            scene.decodes += decoding
            scene.prefill += 0 if decoding else left
        for name, request in list(self._people.items()):
            if request.is_finished():
                del self._people[name]
            elif request.status.name in STARTABLE:
                scene.arriving.append(request)
                scene.prefill += max(1, tokens_left(request))
        return scene

    def _demand(self, scene: Scene, now: float) -> Demand:
        there = bool(scene.people or scene.arriving)
        step = self.policy.longest_alone() if self._model.known else 0.0
        return Demand(
            decodes=scene.decodes,
            prefill=scene.prefill,
            waiting=len(scene.arriving),
            batch_decodes=len(scene.decoding),
            token_budget=self._most_tokens,
            awaited=self._absence.look(there, now, step),
        )

    def _make_room(self, scene: Scene) -> int:
        """Preempts the youngest batch requests while interactive ones lack seats or KV blocks; returns how many."""
        if not scene.people and not scene.arriving:
            return 0
        evicted = 0
        blocks = sum(self._blocks_for(r) for r in scene.arriving) + len(scene.people)
        engine = self._engine
        while scene.batch and (
            len(engine.running) + len(scene.arriving) > self._most_seats or blocks > self._pool.get_num_free_blocks()
        ):
            victim = max(scene.batch, key=lambda r: r.arrival_time)
            (scene.decoding if victim in scene.decoding else scene.prefilling).remove(victim)
            engine.running.remove(victim)
            self.report.preempted(int(victim.num_computed_tokens))
            engine._preempt_request(victim, time.monotonic())  # noqa: SLF001 - vLLM has no public way
            evicted += 1
        return evicted

    def _park(self, scene: Scene, grant: Grant, now: float) -> list[Any]:
        """Leaves in `running` what takes part in the step, interactive first; returns what does not."""
        names = [r.request_id for r in scene.decoding]
        chosen = self._parking.choose(names, grant.decodes, now, self.policy.dial.max_parked)
        prefilling = scene.prefilling if grant.prefill > 0 else []
        self._engine.running = scene.people + [r for r in scene.decoding if r.request_id in chosen] + prefilling
        return [r for r in scene.decoding if r.request_id not in chosen] + ([] if prefilling else scene.prefilling)

    def _startable(self, scene: Scene, grant: Grant) -> int:
        """How many batch requests may start in this step: by seats, KV blocks, and what could ever run at once."""
        dial = self.policy.dial
        if self._pool.get_num_free_blocks() < dial.kv_reserve * self._pool.num_gpu_blocks:
            return 0
        reserve = max(1, round(dial.seat_reserve * self._most_seats))
        seats = min(self._most_seats - reserve, max(1, grant.room)) - len(scene.batch)
        return max(0, seats)

    def _blocks_for(self, request: Any) -> int:
        return -(-int(request.num_tokens) // int(self._engine.block_size)) + 1

    def _classify(self, output: Any) -> Step:
        decodes = prefill = 0
        interactive = False
        for name, tokens in output.num_scheduled_tokens.items():
            request = self._engine.requests[name]
            interactive = interactive or request.priority <= 0
            # vLLM has already moved the request on: this was prompt if it began inside the prompt
            if tokens > self._width or request.num_computed_tokens - tokens < request.num_prompt_tokens - 1:
                prefill += tokens
            else:
                decodes += 1
        return Step(decodes=decodes, prefill=prefill, interactive=interactive)


def tokens_left(request: Any) -> int:
    """Tokens that a request could compute now: 1 (and drafts) when it decodes, the rest of its prompt before that."""
    return int(request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens)


def check(engine: Any, version: str) -> None:
    """Raises UnsuitableEngine when this vLLM lacks something, or was started with a policy that ignores priorities."""
    for name in NEEDED:
        part = engine
        for step in name.split("."):
            if not hasattr(part, step):
                raise UnsuitableEngine(
                    f"velocity's scheduler cannot run in vLLM {version}: its scheduler has no `{name}`. Start vLLM "
                    "without --scheduler-cls; velocity then protects interactive requests from outside."
                )
            part = getattr(part, step)
    if getattr(engine, "connector", None) is not None:
        raise UnsuitableEngine(
            "velocity's scheduler does not work with a KV connector: it preempts requests by itself."
        )
    if engine.policy.value != "priority":
        raise UnsuitableEngine(
            "velocity's scheduler needs `--scheduling-policy priority`: a request's priority is its class."
        )
