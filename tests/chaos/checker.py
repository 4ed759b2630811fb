"""Compares what was asked for with what there is: every item once, in its place, with the answer to its own prompt."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.engine import answer_to, executions
from tests.chaos.front import Submission, over
from tests.chaos.rig import Rig
from workers.job import Record
from workers.store import JobFiles

_SHOWN = 20


@dataclass
class Findings:
    """What is wrong, by kind; all zero is as it should be."""

    jobs: int = 0
    items: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    repeated_jobs: int = 0
    """Jobs that a client got twice since it could not know that the first was accepted (without idempotency)."""
    executed: int = 0
    """Requests that the engine began."""

    def found(self, what: str, where: str, count: int = 1) -> None:
        """Something is wrong."""
        if count:
            self.wrong[what] += count
            self.examples = [*self.examples, f"{what}: {where}"][:_SHOWN]

    @property
    def wasted(self) -> float:
        """Executions whose result does not count, as a share of the items."""
        return (self.executed - self.items) / self.items if self.items else 0.0


async def check(rig: Rig, submissions: Sequence[Submission], tidy_seconds: float) -> Findings:
    """Read every job back, over HTTP and from the disk.

    What the sweeper does now and then (enter jobs that only the disk knows, remove what is left) may take so long.
    """
    findings = Findings()
    wanted = {job.tag: job for job in submissions}
    known: set[str] = set()
    await _tidied(rig, tidy_seconds)
    for key in dict.fromkeys(job.key for job in submissions):
        listed = await rig.front.jobs(key)
        ids = Counter(state["id"] for state in listed)
        findings.found("listed twice", key, sum(ids.values()) - len(ids))
        known |= set(ids)
        tags = Counter(state["name"] for state in listed)
        findings.repeated_jobs += sum(tags.values()) - len(tags)
        for job in submissions:
            if job.key == key and job.job and job.job not in ids:
                findings.found("lost", f"the acknowledged {job.job}", job.items)
        for state in listed:
            await _check_job(rig, wanted[state["name"]], state, findings)
    if rig.front.idempotent:
        findings.found("doubled jobs", "", findings.repeated_jobs)
    findings.executed = executions(rig.executions)[0].total()
    await asyncio.to_thread(_check_tree, rig, known, findings)
    return findings


async def _tidied(rig: Rig, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not await asyncio.to_thread(_is_tidy, rig.data / "jobs"):
        await asyncio.sleep(0.2)


def _is_tidy(jobs: Path) -> bool:
    return all(
        (path / "output.jsonl").exists() and not (path / "seg").exists()
        for path in jobs.glob("*/*") if path.suffix != ".draft"
    )  # fmt: skip


async def _check_job(rig: Rig, job: Submission, state: dict[str, Any], findings: Findings) -> None:
    findings.jobs += 1
    findings.items += job.items
    where = f"{state['id']} ({job.tag})"
    if not over(state) or state["status"] != "completed":
        findings.found("not completed", f"{where}: {state['status']} {state['counts']}")
        return
    counts = state["counts"]
    if counts["total"] != job.items or counts["completed"] + counts["failed"] != job.items:
        findings.found("miscounted", f"{where}: {counts}")
    lines = await rig.front.results(state["id"], job.key)
    _compare(job, [(line["index"], line["id"], line["response"], line["error"]) for line in lines], where, findings)
    (directory,) = (rig.data / "jobs").glob(f"*/{state['id']}")
    files = JobFiles(rig.data, directory.parent.name, state["id"])
    records: list[Record] = await asyncio.to_thread(lambda: list(files.results(-1)))
    pairs = [(record.index, record.id, record.body, record.error) for record in records]
    _compare(job, pairs, f"{where} on the disk", findings)


def _compare(
    job: Submission, lines: list[tuple[int, str, dict[str, Any] | None, dict[str, str] | None]], where: str,
    findings: Findings,
) -> None:  # fmt: skip
    places = [line[0] for line in lines]
    findings.found("lost", where, len(set(range(job.items)) - set(places)))
    findings.found("doubled", where, len(places) - len(set(places)))
    findings.found("out of order", where, int(places != sorted(places)))
    for index, name, body, error in lines:
        if index in job.poison:
            findings.found("not blamed", f"{where} item {index}", int((error or {}).get("code") != "worker_crashed"))
            continue
        if error is not None or body is None:
            findings.found("failed", f"{where} item {index}: {error}")
            continue
        said = body["choices"][0]["message"]["content"]
        if name != f"item-{index}" or said != answer_to(job.prompt(index)):
            findings.found("foreign answer", f"{where} item {index}: {name} {said!r}")


def _check_tree(rig: Rig, known: set[str], findings: Findings) -> None:
    """Nothing half made is left, and every directory of a job belongs to one.

    A job that never appeared (<job>.draft) is swept away a day later, since someone may still be writing it.
    """
    jobs = rig.data / "jobs"
    for path in (*jobs.glob("*/*/*.draft"), *jobs.glob("*/*/seg/*")):
        findings.found("left over", str(path.relative_to(jobs)))
    for path in jobs.glob("*/*"):
        if path.suffix != ".draft" and path.name not in known:
            findings.found("orphaned", str(path.relative_to(jobs)))
