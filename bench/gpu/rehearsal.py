"""`python -m bench.gpu.rehearsal`: the co-serving arms on a virtual GPU, in a minute, on any machine with vLLM.

vLLM's real scheduler runs; the GPU is a cost model (see `h100`). So the figures are ESTIMATES: they show what the
policy does with steps of that shape, and that no token is lost or changed; they do not show what a GPU does.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu.blocks import BULK as BULK_PRIORITY
from bench.gpu.blocks import INTERACTIVE
from bench.gpu.figures import covered, percentile
from bench.gpu.load import OpenLoad
from bench.gpu.model import make_model
from bench.gpu.plan import ALWAYS, BULK, DEFAULT, HALF, RARE, STRICT, WIDE
from bench.gpu.virtual import Cost, Size, VirtualEngine, make_scheduler

WARM = 6.0
"""Virtual seconds of bulk before people come and before anything counts."""
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


HEADER = "| arm | busy | TTFT ms p50/p95/p99 | × A | ITL ms p50/p95/p99/mean | × A | bulk tok/s | × B |"


class Arm:
    """One arm: people, a window of bulk, a scheduler, and what they see of each other."""

    def __init__(
        self,
        model: Path,
        cost: Cost,
        seconds: float,
        *,
        velocity: bool,
        dial: dict[str, float],
        size: Size | None = None,
    ) -> None:
        self._rng = random.Random(7)
        self._names = (f"b{n}" for n in itertools.count())
        self._velocity = velocity
        self._end = WARM + seconds
        self._seconds = seconds
        self.tokens = 0
        self.engine = VirtualEngine(
            make_scheduler(model, size or Size(), velocity=velocity), cost, self._finished, dial
        )

    def run(self, people: OpenLoad | None, window: int) -> dict[str, list[float]]:
        """Returns the first-token times and the gaps of people in seconds, and the share of the time they were there.

        Raises AssertionError if any answer was wrong.
        """
        events: list[tuple[float, Callable[[], None]]] = [(0.0, self._bulk)] * window
        for number, due in enumerate(people.arrivals(self._seconds, seed=1) if people else []):
            events.append((WARM + due, partial(self._person, people, f"p{number}", WARM + due)))
        self.engine.run(events, self._end + 3.0)
        answers = self.engine.answers
        wrong = [name for name, answer in answers.items() if not answer.correct(name)]
        if wrong:
            raise AssertionError(f"Wrong tokens: {wrong[:5]}")
        mine = [answer for name, answer in answers.items() if name[0] == "p" and answer.times]
        gaps = [b - a for answer in mine for a, b in itertools.pairwise(answer.times)]
        there = covered((answer.due - WARM, min(answer.times[-1] - WARM, self._seconds)) for answer in mine)
        return {
            "ttft": [answer.times[0] - answer.due for answer in mine],
            "itl": gaps,
            "busy": [there / self._seconds],
        }

    def _finished(self, name: str) -> None:
        if name[0] != "b":
            return
        if WARM <= self.engine.now <= self._end:
            self.tokens += len(self.engine.answers[name].tokens)
        self._bulk()

    def _prompt(self, length: int) -> list[int]:
        return [self._rng.randint(4, 4000) for _ in range(length)]

    def _bulk(self) -> None:
        prompt = self._prompt(self._rng.randint(*BULK.prompt))
        priority = BULK_PRIORITY if self._velocity else INTERACTIVE
        self.engine.add(next(self._names), prompt, self._rng.randint(*BULK.output), priority, self.engine.now)

    def _person(self, load: OpenLoad | None, name: str, due: float) -> None:
        if load is None:
            return
        prompt = self._prompt(self._rng.randint(*load.sizes.prompt))
        self.engine.add(name, prompt, self._rng.randint(*load.sizes.output), INTERACTIVE, due)


def arms(load: OpenLoad) -> list[tuple[str, OpenLoad | None, int, bool, dict[str, float]]]:
    """(name, people, bulk window, velocity, dial) of every arm for one kind of presence."""
    return [
        ("A", load, 0, False, {}),
        ("B", None, 256, False, {}),
        ("B velocity", None, 256, True, dict(DEFAULT)),
        ("C", load, 256, False, {}),
        *((f"S{n}", load, n, False, {}) for n in (4, 16, 32, 64, 128)),
        ("V", load, 256, True, dict(DEFAULT)),
        ("V strict", load, 256, True, dict(STRICT)),
        ("V wide", load, 256, True, dict(WIDE)),
    ]


def squeeze(model: Path, seconds: float) -> None:
    """So few seats and KV blocks that batch requests are parked and preempted all the time; prints how often."""
    arm = Arm(model, h100, seconds, velocity=True, dial=dict(DEFAULT), size=Size(seats=8, blocks=160, tokens=512))
    arm.run(HALF, 16)
    report = arm.engine.scheduler.velocity.report
    print(
        f"With 8 seats and 160 KV blocks: {report.preemptions} preemptions by people, {report.wasted_tokens} tokens "
        f"computed again, {arm.tokens} bulk tokens completed."
    )


def main() -> int:
    """Prints one table per kind of presence; returns 0 when every token of every arm was right."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.rehearsal", description=__doc__)
    parser.add_argument("--seconds", type=float, default=45.0, help="virtual seconds per arm")
    parser.add_argument("--out", default="build/bench-gpu")
    args = parser.parse_args()
    model = make_model(Path(args.out) / "model", "tiny")
    began = time.monotonic()
    squeeze(model, args.seconds)
    for title, load in (("in bursts", HALF), ("rarely", RARE), ("always", ALWAYS)):
        print(f"\nPeople come {title}:\n\n{HEADER}")
        print("|---|---|---|---|---|---|---|---|")
        alone: dict[str, list[float]] = {}
        most = 0.0
        for name, people, window, velocity, dial in arms(load):
            arm = Arm(model, h100, args.seconds, velocity=velocity, dial=dial)
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
