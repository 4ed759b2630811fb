"""Deletes jobs that have been over for longer than the operator keeps them."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path

from engine import log
from workers.errors import NoSuchJob, StorageError
from workers.files import Files
from workers.ledger import Ledger
from workers.store import JobFiles, empty_trash

_MOST = 100

logger = log.get(__name__)


class Retention:
    """Looks from time to time for what may go."""

    def __init__(self, ledger: Ledger, data_dir: Path, seconds: float) -> None:
        self._ledger = ledger
        self._data_dir = data_dir
        self._seconds = seconds

    async def step(self) -> None:
        """Delete what is due, oldest first."""
        await asyncio.to_thread(empty_trash, self._data_dir)
        while due := await self._ledger.finished_before(int(time.time() - self._seconds), _MOST):
            for tenant, job in due:
                await delete(self._ledger, self._data_dir, tenant, job)
            logger.info("jobs_deleted", jobs=len(due))


async def delete(ledger: Ledger, data_dir: Path, tenant: str, job: str) -> None:
    """Delete a job that is over: its files first, so that nothing enters it again. Safe to repeat."""
    await asyncio.to_thread(_discard, data_dir, tenant, job)
    await ledger.forget(tenant, job)


def _discard(data_dir: Path, tenant: str, job: str) -> None:
    files = JobFiles(data_dir, tenant, job)
    with suppress(StorageError, NoSuchJob):  # it was deleted before
        spec = files.spec()
        if spec.batch:
            Files(data_dir).delete_outputs(spec)
    files.discard()
