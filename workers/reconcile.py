"""Makes the ledger agree with the data directory, which is the truth: after Redis was lost, or came back older.

A job that the ledger does not know is entered again with the results on the disk. What the disk knows as over is over.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from engine import log
from workers.draft import OUTCOME
from workers.errors import NoSuchJob, StorageError
from workers.job import JobSpec
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
        found = self._directories()
        missing: list[tuple[JobSpec, JobFiles]] = []
        young = 0
        while chunk := await asyncio.to_thread(_take, found):
            statuses = await self._ledger.statuses([path.name for path in chunk])
            for path, status in zip(chunk, statuses, strict=True):
                if status is not None and (status.terminal or not (path / OUTCOME).exists()):
                    if status.terminal and (path / "seg").exists():  # its finalizer died before it removed them
                        await asyncio.to_thread(_tidy, JobFiles(self._data_dir, path.parent.name, path.name))
                    continue
                if time.time() - _mtime(path / "job.json") < _SETTLED and status is None:
                    young += 1
                    continue
                try:
                    files = JobFiles(self._data_dir, path.parent.name, path.name)
                    missing.append((await asyncio.to_thread(files.spec), files))
                except (StorageError, NoSuchJob) as error:
                    logger.warning("job_unreadable", job=path.name, reason=str(error))
        for spec, files in sorted(missing, key=lambda job: job[0].created):
            try:
                await self._enter(spec, files)
            except (StorageError, NoSuchJob) as error:
                logger.warning("job_unreadable", job=spec.id, reason=str(error))
        return len(missing), young

    async def _enter(self, spec: JobSpec, files: JobFiles) -> None:
        outcome = await asyncio.to_thread(files.outcome)
        if outcome is not None:
            told = await asyncio.to_thread(webhook_outcome, files.path)
            due = spec.webhook is not None and not told
            await self._ledger.enter_over(spec, outcome, webhook_due=due, fields=told)
            await asyncio.to_thread(_tidy, files)
            return
        if not await self._ledger.hold(spec):  # its client, without an answer, asked again and was given another job
            if await asyncio.to_thread(next, files.surviving(), None) is None:
                await asyncio.to_thread(files.remove)
                return
            await self._ledger.hold(spec.model_copy(update={"idempotency": None}))
        segments = files.surviving()
        while segment := await asyncio.to_thread(next, segments, None):
            unit, name, records, length = segment
            await self._ledger.restore(spec.id, unit, name, records, length)
        await self._ledger.open(spec.id, cancelled=files.cancelled)

    def _directories(self) -> Iterator[Path]:
        """Every job's directory. Drafts that nobody finished are removed."""
        for tenant in (self._data_dir / "jobs").glob("*"):
            for path in tenant.iterdir():
                if path.suffix != ".draft":
                    yield path
                elif time.time() - _mtime(path) > _DRAFT_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)


def _tidy(files: JobFiles) -> None:
    files.drop_segments()
    files.drop_drafts()


def _take(paths: Iterator[Path]) -> list[Path]:
    return list(islice(paths, _CHUNK))


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()
