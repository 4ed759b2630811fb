"""Makes the ledger agree with the data directory, which is the truth: after Redis was lost, or came back older.

A job that the ledger does not know is entered again with the results on the disk. What the disk knows as over is over.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from engine import log
from workers.draft import OUTCOME
from workers.errors import NoSuchJob, StorageError
from workers.job import JobSpec, is_id
from workers.ledger import Ledger
from workers.outbox import webhook_outcome
from workers.store import JobFiles

_EVERY = 60.0
_SETTLED = 10.0
"""Seconds after which whoever wrote a job's files must have entered it."""
_DRAFT_SECONDS = 24 * 3600
_CHUNK = 200

logger = log.get(__name__)


class Reconciler:
    """Compares both every minute, and at once when Redis has lost its memory."""

    def __init__(self, ledger: Ledger, data_dir: Path) -> None:
        self._ledger = ledger
        self._data_dir = data_dir
        self._next = 0.0

    async def step(self) -> None:
        """Do what is due."""
        emptied = not await self._ledger.remembers()
        if emptied or time.monotonic() >= self._next:
            entered, young = await self.reconcile()
            if entered:
                logger.warning("ledger_rebuilt", jobs=entered, redis_was_empty=emptied)
            self._next = time.monotonic() + (_SETTLED if young else _EVERY)
            await self._ledger.remember()

    async def reconcile(self) -> tuple[int, int]:
        """Enter what is missing. Returns how many jobs were, and how many were too young to tell."""
        found = self._found()
        missing: list[tuple[JobSpec, JobFiles]] = []
        young = 0
        while chunk := await asyncio.to_thread(_take, found):
            statuses = await self._ledger.statuses([on_disk.path.name for on_disk in chunk])
            for on_disk, status in zip(chunk, statuses, strict=True):
                files = JobFiles(self._data_dir, on_disk.path.parent.name, on_disk.path.name)
                if status is not None and (status.terminal or not on_disk.over):
                    if status.terminal and on_disk.segments:  # its finalizer died before it removed them
                        await asyncio.to_thread(_tidy, files)
                elif status is None and on_disk.young:
                    young += 1
                else:
                    with _reported(on_disk.path.name):
                        missing.append((await asyncio.to_thread(files.spec), files))
        entered: set[str] = set()
        for spec, files in sorted(missing, key=lambda job: job[0].created):
            with _reported(spec.id):
                await self._enter(spec, files, entered)
        return len(missing), young

    async def _enter(self, spec: JobSpec, files: JobFiles, entered: set[str]) -> None:
        outcome = await asyncio.to_thread(files.outcome)
        if outcome is not None:
            told = await asyncio.to_thread(webhook_outcome, files.path)
            due = spec.webhook is not None and not told
            await self._ledger.enter_over(spec, outcome, webhook_due=due, fields=told)
            await asyncio.to_thread(_tidy, files)
            if not await asyncio.to_thread(files.path.exists):  # deleted meanwhile
                await self._ledger.forget(spec.tenant, spec.id)
            return
        winner = await self._ledger.hold(spec)
        if winner != spec.id:  # without an answer its client asked again, and was given another job
            began = await asyncio.to_thread(next, files.surviving(), None)
            if began is None and winner not in entered:
                await asyncio.to_thread(files.remove)
                return
            await self._ledger.hold(spec.model_copy(update={"idempotency": None}))
        if not await asyncio.to_thread(files.path.exists):  # deleted before it was held
            await self._ledger.drop(spec.tenant, spec.id)
            return
        entered.add(spec.id)
        segments = files.surviving()
        while segment := await asyncio.to_thread(next, segments, None):
            unit, name, records, length = segment
            await self._ledger.restore(spec.id, unit, name, records, length)
        await self._ledger.open(spec.id, cancelled=await asyncio.to_thread(files.is_cancelled))

    def _found(self) -> Iterator[_OnDisk]:
        """Every job's directory. Drafts that nobody finished are removed, and what is no job's is passed over."""
        for tenant in (self._data_dir / "jobs").glob("*"):
            for path in tenant.iterdir() if is_id(tenant.name) and tenant.is_dir() else ():
                age = time.time() - _mtime(path)
                if is_id(path.name) and path.is_dir():
                    young = time.time() - _mtime(path / "job.json") < _SETTLED
                    yield _OnDisk(path, (path / OUTCOME).exists(), (path / "seg").exists(), young)
                elif path.suffix == ".draft" and age > _DRAFT_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _OnDisk:
    """A job's directory."""

    path: Path
    over: bool
    segments: bool
    young: bool
    """It may just be being entered."""


@contextmanager
def _reported(job: str) -> Iterator[None]:
    """One job that can't be read keeps no other from being entered."""
    try:
        yield
    except (StorageError, NoSuchJob) as error:
        logger.warning("job_unreadable", job=job, reason=str(error))


def _tidy(files: JobFiles) -> None:
    files.drop_segments()
    files.drop_drafts()


def _take(found: Iterator[_OnDisk]) -> list[_OnDisk]:
    return list(islice(found, _CHUNK))


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return time.time()
