"""Merges the results of a job whose shards are closed, in input order, and makes it terminal."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

from engine import log
from workers.job import Lease, Record
from workers.ledger import Ledger, Verdict
from workers.store import JobFiles

logger = log.get(__name__)


class Finalizer:
    """Does the unit `final`. Repeating it after a crash gives the same files."""

    def __init__(self, ledger: Ledger, data_dir: Path, lease_seconds: float) -> None:
        self._ledger = ledger
        self._data_dir = data_dir
        self._lease_seconds = lease_seconds

    async def run(self, lease: Lease) -> None:
        """Write output.jsonl and error.jsonl, then compare-and-set the terminal state."""
        files = JobFiles(self._data_dir, lease.tenant, lease.job)
        job = await self._ledger.job(lease.tenant, lease.job)
        segments = await self._ledger.segments(lease.job, range(job.shards))
        merging = asyncio.create_task(asyncio.to_thread(files.merge, _merged(files, segments), lease.segment))
        try:
            while not (await asyncio.wait({merging}, timeout=self._lease_seconds / 3))[0]:
                if await self._ledger.commit(lease, [], 0, self._lease_seconds) is Verdict.STALE:
                    break
        finally:
            publish = await merging
        if await self._ledger.commit(lease, [], 0, self._lease_seconds) is Verdict.STALE:
            return  # another finalizer has the job; its files are its own
        await asyncio.to_thread(publish)
        status = await self._ledger.finalize(lease)
        if status != Verdict.STALE:
            await asyncio.to_thread(files.drop_segments)
        logger.info("job_finished", job=lease.job, status=status, completed=job.completed, failed=job.failed)


def _merged(files: JobFiles, segments: list[dict[str, int]]) -> Iterator[Record]:
    """All committed records in input order, one shard in memory at a time."""
    for shard in segments:
        records = files.committed(shard)
        for index in sorted(records):
            yield records[index]
