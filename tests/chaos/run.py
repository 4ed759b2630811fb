"""One run of chaos: jobs come in while processes die, then everything is well again and every item is looked for."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median

from rich.console import Console
from rich.table import Table

from tests.chaos.checker import Findings, check
from tests.chaos.faults import Faults, Times
from tests.chaos.front import Submission
from tests.chaos.rig import Rig, explained, rig

LEASE = 4
_UNFORESEEN = re.compile(rb'^Traceback|"event": "(unit_failed|background_task_failed)"', re.MULTILINE)
"""In a process's log; what RQ makes of its wiped registries does not count."""
_BACKLOG = 6000
"""Items that wait at most: more would hide a stall, fewer would leave workers idle."""


@dataclass(frozen=True)
class Plan:
    """How much of it."""

    seconds: float
    """Of faults."""
    seed: int
    items: int = 20_000
    """At least; more if they are done before the time is up."""
    gap: float = 0.8
    """Mean seconds between two faults."""
    workers: int = 4
    apis: int = 2
    tenants: int = 3
    quarantine: bool = True
    """Also a worker of the lane for shards that kill their workers."""
    idempotent: bool = True
    """Whether clients send an Idempotency-Key."""


@dataclass
class Report:
    """What came of it."""

    plan: Plan
    findings: Findings
    times: Times
    stale: int
    """Commits of lost leases that were refused."""
    lost: dict[str, int]
    """Redis calls that the proxy lost, before or after Redis had run them."""
    unasked: dict[str, list[int]] = field(default_factory=dict)
    """How processes ended that nobody had ended: a supervisor has started them again."""
    unforeseen: list[str] = field(default_factory=list)
    """Processes that failed in a way which nobody foresaw."""
    calm_seconds: float = 0.0
    """From the last fault until all jobs were over."""

    def table(self) -> Table:
        """For people."""
        table = Table("what", "", title=f"chaos, seed {self.plan.seed}, {self.plan.seconds:g} s of faults")
        found, times = self.findings, self.times
        rows: dict[str, object] = {
            "jobs, items": f"{found.jobs}, {found.items:,}",
            **{f"wrong: {what}": found.wrong[what] for what in ("lost", "doubled", "out of order", "foreign answer")},
            **{f"wrong: {what}": count for what, count in found.wrong.items()},
            "jobs that a client has twice": found.repeated_jobs,
            "wasted executions": f"{found.executed - found.items:,} ({found.wasted:.2%})",
            "commits of lost leases refused": self.stale,
            "Redis calls lost": self.lost,
            "worker kill -9 → its shard has a result": _spread(times.followed),
            "worker SIGTERM → shards returned": _spread(times.stopped),
            "Redis kill -9 → first commit": _spread(times.resumed),
            "last fault → all jobs over": f"{self.calm_seconds:.1f} s",
            "faults": ", ".join(f"{count} {name}" for name, count in sorted(times.faults.items())),
            "ends that nobody asked for": self.unasked or "none",
            "unforeseen failures": self.unforeseen or "none",
        }
        for what, value in rows.items():
            table.add_row(what, str(value))
        for example in found.examples:
            table.add_row("example", example)
        return table

    def show(self) -> None:
        """Print it."""
        Console(width=140).print(self.table())


async def chaos(plan: Plan, directory: Path) -> Report:
    """One run in an empty directory."""
    env = {"VELOCITY_LEASE_SECONDS": str(LEASE), "VELOCITY_SHARD_ITEMS": "64", "VELOCITY_RETRY_BACKOFF": "0.2"}
    async with (
        rig(
            directory, seed=plan.seed, apis=plan.apis, workers=plan.workers, tenants=plan.tenants,
            idempotent=plan.idempotent, quarantine=plan.quarantine, env=env,
        ) as running,
        explained(running),
    ):  # fmt: skip
        faults = Faults(running, plan.seed, LEASE, plan.gap)
        clients = Clients(running, plan)
        submitting = asyncio.create_task(clients.run())
        await faults.go_on(plan.seconds)
        await submitting
        await clients.all_over(120)
        seconds = time.monotonic() - faults.ended
        findings = await check(running, clients.submissions, tidy_seconds=75)
        stale = int(await running.direct.get("velocity:stale_commits") or 0)
        unasked = {child.name: child.unasked for child in running.children if child.unasked}
        unforeseen = [child.name for child in running.children if _UNFORESEEN.search(child.log.read_bytes())]
        lost = dict(running.proxy.lost)
        return Report(plan, findings, faults.times, stale, lost, unasked, unforeseen, seconds)


class Clients:
    """Submit jobs of all sizes as fast as they are done, until the time is up and there were enough."""

    def __init__(self, running: Rig, plan: Plan) -> None:
        self._rig = running
        self._plan = plan
        self._chance = Random(plan.seed + 1)  # noqa: S311 - sizes of jobs
        self._open: list[Submission] = []
        self.submissions: list[Submission] = []

    async def run(self) -> None:
        """Until then."""
        until = time.monotonic() + self._plan.seconds
        asked = 0
        while time.monotonic() < until or asked < self._plan.items:
            size = self._chance.choice([1, 40, 700, 1500, 2500])
            await self._room_for(size)
            key = self._chance.choice(self._rig.front.keys)
            job = Submission(f"job-{len(self.submissions)}", size, key)
            self.submissions.append(job)
            self._open.append(await self._rig.front.submit(job))
            asked += size

    async def all_over(self, seconds: float) -> None:
        """Wait until every job is over. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            for job in self._open:
                await self._rig.front.finished(job, seconds)

    async def _room_for(self, items: int) -> None:
        while self._open and sum(job.items for job in self._open) + items > _BACKLOG:
            await self._rig.front.finished(self._open.pop(0), 600)


def _spread(seconds: list[float]) -> str:
    if not seconds:
        return "not seen"
    return f"p50 {median(seconds):.1f} s, max {max(seconds):.1f} s ({len(seconds)} times)"
