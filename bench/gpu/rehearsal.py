"""`python -m bench.gpu.rehearsal`: the co-serving arms on a virtual machine, in a minute, wherever vLLM is installed.

vLLM's real scheduler runs; the worker is a cost model (see `h100` and `laptop`). So the figures are ESTIMATES: they
show what the policy does with steps of that shape, and that no token is lost or changed; not what a real machine does.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from api.bench.figures import covered, percentile
from bench.gpu.blocks import BULK as BULK_PRIORITY
from bench.gpu.blocks import INTERACTIVE
from bench.gpu.load import OpenLoad, Sizes
from bench.gpu.model import make_model
from bench.gpu.plan import ALWAYS, BULK, DEFAULT, HALF, RARE, STRICT, WIDE
from bench.gpu.virtual import DEPTH, Cost, Size, VirtualEngine, make_scheduler

UNTOUCHED = 1 - 8 / 128
"""Share of the experts that one token leaves unread."""


def h100(decodes: int, prefill: int) -> float:
    """Seconds of a step of Qwen3-Coder-30B-A3B in FP8 on an H100, from its bytes and operations; not a measurement.

    3.5 ms for launches, attention weights and the output layer (1.5 GB); the experts' 29 GB at 3 TB/s, as far as the
    step's tokens touch them (evenly); 6.6 GFLOP per token at 400 TFLOP/s; 49 MB of KV cache per decoding sequence of
    500 tokens; and 2 ms for leaving the captured graph when there is prefill.
    """
    tokens = decodes + prefill
    experts = 0.0097 * (1 - UNTOUCHED**tokens)
    return 0.0035 + experts + 1.65e-5 * tokens + 1.6e-5 * decodes + (0.002 if prefill else 0.0)


def laptop(decodes: int, prefill: int) -> float:
    """Seconds of a step of SmolLM2-135M in vLLM for CPUs on two cores, fitted to measured steps by eye."""
    return 0.020 + 0.0019 * max(0, decodes - 1) + 0.0007 * prefill


@dataclass(frozen=True)
class Machine:
    """A virtual machine, and the load that suits it."""

    cost: Cost
    size: Size
    depth: int
    bulk: Sizes
    window: int
    caps: tuple[int, ...]
    people: dict[str, OpenLoad]
    """By presence."""
    warm: float = 6.0
    """Virtual seconds of bulk before people come and before anything counts."""
    dials: dict[str, dict[str, float]] = field(default_factory=lambda: {"V": DEFAULT, "V strict": STRICT})


_LAPTOP_CHAT = Sizes(prompt=(150, 400), output=(48, 80))
MACHINES = {
    "h100": Machine(
        h100, Size(), DEPTH, BULK, 256, (4, 16, 32, 64, 128),
        {"in bursts": HALF, "rarely": RARE, "always": ALWAYS},
        dials={"V": DEFAULT, "V strict": STRICT, "V wide": WIDE},
    ),
    "laptop": Machine(
        laptop, Size(seats=64, blocks=5800, tokens=256), 1, Sizes((150, 400), (24, 72)), 64, (1, 2, 4, 8),
        {
            name: OpenLoad(_LAPTOP_CHAT, rate, on=1.0, period=1.0)
            for name, rate in (("about half of the time", 0.43), ("rarely", 0.07), ("always", 1.2))
        },
        warm=20.0,
    ),
}  # fmt: skip
HEADER = "| arm | busy | TTFT ms p50/p95/p99 | × A | ITL ms p50/p95/p99/mean | × A | bulk tok/s | × B |"


class Arm:
    """One arm: people, a window of bulk, a scheduler, and what they see of each other."""

    def __init__(
        self, model: Path, machine: Machine, seconds: float, *, velocity: bool, dial: dict[str, float], seed: int = 7
    ) -> None:
        self._rng = random.Random(seed)
        self._names = (f"b{n}" for n in itertools.count())
        self._velocity = velocity
        self._machine = machine
        self._end = machine.warm + seconds
        self._seconds = seconds
        self.tokens = 0
        scheduler = make_scheduler(model, machine.size, velocity=velocity)
        self.engine = VirtualEngine(scheduler, machine.cost, self._finished, dial, machine.depth)

    def run(self, people: OpenLoad | None, window: int) -> dict[str, list[float]]:
        """Returns the first-token times and the gaps of people in seconds, and the share of the time they were there.

        Raises AssertionError if any answer was wrong.
        """
        events: list[tuple[float, Callable[[], None]]] = [(0.0, self._bulk)] * window
        warm = self._machine.warm
        for number, due in enumerate(people.arrivals(self._seconds, seed=1) if people else []):
            events.append((warm + due, partial(self._person, people, f"p{number}", warm + due)))
        self.engine.run(events, self._end + 3.0)
        answers = self.engine.answers
        wrong = [name for name, answer in answers.items() if not answer.correct(name)]
        if wrong:
            raise AssertionError(f"Wrong tokens: {wrong[:5]}")
        mine = [answer for name, answer in answers.items() if name[0] == "p" and answer.times]
        gaps = [b - a for answer in mine for a, b in itertools.pairwise(answer.times)]
        there = covered((answer.due - warm, min(answer.times[-1] - warm, self._seconds)) for answer in mine)
        return {
            "ttft": [answer.times[0] - answer.due for answer in mine],
            "itl": gaps,
            "busy": [there / self._seconds],
        }

    def _finished(self, name: str) -> None:
        if name[0] != "b":
            return
        if self._machine.warm <= self.engine.now <= self._end:
            self.tokens += len(self.engine.answers[name].tokens)
        self._bulk()

    def _prompt(self, length: int) -> list[int]:
        return [self._rng.randint(4, 4000) for _ in range(length)]

    def _bulk(self) -> None:
        sizes = self._machine.bulk
        prompt = self._prompt(self._rng.randint(*sizes.prompt))
        priority = BULK_PRIORITY if self._velocity else INTERACTIVE
        self.engine.add(next(self._names), prompt, self._rng.randint(*sizes.output), priority, self.engine.now)

    def _person(self, load: OpenLoad | None, name: str, due: float) -> None:
        if load is None:
            return
        prompt = self._prompt(self._rng.randint(*load.sizes.prompt))
        self.engine.add(name, prompt, self._rng.randint(*load.sizes.output), INTERACTIVE, due)


def arms(machine: Machine, load: OpenLoad) -> list[tuple[str, OpenLoad | None, int, bool, dict[str, float]]]:
    """(name, people, bulk window, velocity, dial) of every arm for one kind of presence."""
    window = machine.window
    return [
        ("A", load, 0, False, {}),
        ("B", None, window, False, {}),
        ("B velocity", None, window, True, dict(DEFAULT)),
        ("C", load, window, False, {}),
        *((f"S{n}", load, n, False, {}) for n in machine.caps),
        *((name, load, window, True, dict(dial)) for name, dial in machine.dials.items()),
    ]


def squeeze(model: Path, machine: Machine, seconds: float) -> str:
    """So few seats and KV blocks that batch requests are parked and preempted all the time; says how often."""
    tight = replace(machine, size=Size(seats=8, blocks=160, tokens=512))
    arm = Arm(model, tight, seconds, velocity=True, dial=dict(DEFAULT))
    arm.run(next(iter(machine.people.values())), 16)
    report = arm.engine.scheduler.velocity.report
    return (
        f"With 8 seats and 160 KV blocks: {report.preemptions} preemptions by people, {report.wasted_tokens} tokens "
        f"computed again, {arm.tokens} bulk tokens completed."
    )


def main() -> int:
    """Prints one table per kind of presence; returns 0 when every token of every arm was right."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.rehearsal", description=__doc__)
    parser.add_argument("--machine", choices=sorted(MACHINES), default="h100")
    parser.add_argument("--seconds", type=float, default=45.0, help="virtual seconds per arm")
    parser.add_argument("--out", default="build/bench-gpu")
    args = parser.parse_args()
    machine = MACHINES[args.machine]
    model = make_model(Path(args.out) / "model", "tiny")
    began = time.monotonic()
    print(squeeze(model, machine, args.seconds))
    for title, load in machine.people.items():
        print(f"\nPeople come {title}:\n\n{HEADER}")
        print("|---|---|---|---|---|---|---|---|")
        alone: dict[str, list[float]] = {}
        most = 0.0
        for name, people, window, velocity, dial in arms(machine, load):
            arm = Arm(model, machine, args.seconds, velocity=velocity, dial=dial)
            seen = arm.run(people, window)
            alone = alone or seen
            rate = arm.tokens / args.seconds
            most = rate if name == "B" else most
            print(_row(name, seen, alone, rate, most), flush=True)
    print(f"\n{time.monotonic() - began:.0f} s; every token of every answer was the right one.")
    return 0


def _figures(values: list[float], *, mean: bool) -> list[float]:
    found = [percentile(values, share) for share in (0.5, 0.95, 0.99)]
    return [*found, sum(values) / len(values)] if mean and values else found


def _row(name: str, seen: dict[str, list[float]], alone: dict[str, list[float]], rate: float, most: float) -> str:
    cells: list[Any] = [name, f"{seen['busy'][0]:.2f}"]
    for kind in ("ttft", "itl"):
        mine, base = (_figures(values[kind], mean=kind == "itl") for values in (seen, alone))
        cells.append(" / ".join(f"{m * 1000:.1f}" for m in mine) if seen[kind] else "–")
        cells.append(" / ".join(f"{m / b:.2f}" for m, b in zip(mine, base, strict=True)) if seen[kind] else "–")
    cells += [f"{rate:.0f}", f"{rate / most:.2f}" if most else "–"]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
