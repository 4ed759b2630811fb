"""Stories of vLLM's real scheduler with velocity's on top, before a virtual worker whose tokens can be checked.

`python -m tests.engine.scheduler_stories FOLDER` prints what came of them as JSON. It is a process of its own because
importing vLLM is slow, loud, and sets global state. Time is virtual: the same on every machine.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vllm.v1.request import RequestStatus

from api.bench.figures import percentile
from bench.gpu.load import OpenLoad
from bench.gpu.model import make_model
from bench.gpu.plan import DEFAULT, STRICT
from bench.gpu.rehearsal import MACHINES, Arm, Machine
from bench.gpu.virtual import Size

SECONDS = 120.0


class Leaving(Arm):
    """Every third bulk request is aborted some time after it came: while it waits, runs, or is parked."""

    def _bulk(self) -> None:
        super()._bulk()
        name = list(self.engine.answers)[-1]
        if len(self.engine.answers) % 3 == 0:
            self.engine.later(self.engine.now + self._rng.uniform(0.1, 3.0), partial(self._leave, name))

    def _leave(self, name: str) -> None:
        if name in self.engine.scheduler.requests:
            self.engine.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
            self._finished(name)


class Asking(Arm):
    """One person, or a program, that asks again a hundredth of a second after each answer."""

    def run(self, people: OpenLoad | None, window: int) -> dict[str, list[float]]:
        """What it sees."""
        self._asking = people
        self._asked = itertools.count()
        self.engine.later(self._machine.warm, self._ask)
        return super().run(None, window)

    def _ask(self) -> None:
        self._person(self._asking, f"p{next(self._asked)}", self.engine.now)

    def _finished(self, name: str) -> None:
        super()._finished(name)
        if name[0] == "p" and self.engine.now < self._end:
            self.engine.later(self.engine.now + 0.01, self._ask)


def churn(model: Path, machine: Machine, size: Size, kind: type[Arm] = Arm) -> dict[str, Any]:
    """Few seats and KV blocks, so that batch is parked and preempted; raises AssertionError for a wrong token."""
    arm = kind(model, replace(machine, size=size), SECONDS, velocity=True, dial=dict(DEFAULT))
    parked = 0

    def count(end: Any, output: Any) -> None:
        nonlocal parked
        parked += len(arm.engine.scheduler.velocity._parked)
        end(output)

    co = arm.engine.scheduler.velocity
    co.end = partial(count, co.end)
    arm.run(next(iter(machine.people.values())), 24)
    answers = arm.engine.answers
    late = [n for n, a in answers.items() if n[0] == "p" and len(a.tokens) != a.wanted and a.due < SECONDS]
    return {
        "preemptions": co.report.preemptions, "parked": parked, "bulk": arm.tokens, "unfinished": len(late),
        "people": sum(name[0] == "p" for name in answers),
    }  # fmt: skip


def shares(model: Path, presence: str, dial: dict[str, float], kind: type[Arm] = Arm) -> dict[str, float]:
    """People's latency as multiples of the idle engine's, and bulk's throughput as a share of what it has alone."""
    machine = MACHINES["laptop"]
    load = machine.people[presence]
    run = partial(kind, model, machine, 2 * SECONDS)
    alone = run(velocity=False, dial={}).run(load, 0)
    bulk = Arm(model, machine, 2 * SECONDS, velocity=False, dial={})
    bulk.run(None, machine.window)
    both = run(velocity=True, dial=dict(dial))
    seen = both.run(load, machine.window)
    times = sorted(a.times[-1] for n, a in both.engine.answers.items() if n[0] == "b" and len(a.tokens) == a.wanted)
    return {
        **{kind: percentile(seen[kind], 0.95) / percentile(alone[kind], 0.95) for kind in ("ttft", "itl")},
        "itl50": percentile(seen["itl"], 0.5) / percentile(alone["itl"], 0.5),
        "harvest": both.tokens / bulk.tokens,
        "longest_pause": max(b - a for a, b in itertools.pairwise(times)),
    }


def main() -> None:
    """Tell all stories."""
    model = make_model(Path(sys.argv[1]), "tiny")
    tight, seats = Size(seats=8, blocks=160, tokens=512), Size(seats=6, blocks=5800, tokens=256)
    stories = {
        "no blocks, two steps deep": churn(model, MACHINES["h100"], tight),
        "no blocks, step by step": churn(model, MACHINES["laptop"], tight),
        "no seats": churn(model, MACHINES["laptop"], seats),
        "clients leave": churn(model, MACHINES["h100"], tight, Leaving),
        "half": shares(model, "about half of the time", DEFAULT),
        "strict": shares(model, "about half of the time", STRICT),
        "rarely": shares(model, "rarely", DEFAULT),
        "always": shares(model, "always", DEFAULT),
        "again": shares(model, "always", DEFAULT, Asking),
    }
    sys.stdout.write(json.dumps(stories) + "\n")


if __name__ == "__main__":
    main()
