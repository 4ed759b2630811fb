"""Reads a job's finished items in input order, from the running shards' segments or from the final files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from workers.errors import NoSuchJob, StorageError
from workers.job import JobState, Record
from workers.ledger import Ledger
from workers.store import JobFiles

_BLOCK = 128


class Results:
    """The results of one job, as it stands when they are read."""

    def __init__(self, ledger: Ledger, data_dir: Path, job: JobState) -> None:
        self._ledger = ledger
        self._job = job
        self._files = JobFiles(data_dir, job.tenant, job.id)
        self._next = 0

    async def blocks(self, after: int) -> AsyncIterator[list[Record]]:
        """Blocks of records from index `after` + 1 on; a job that ends meanwhile is read on from its final files."""
        self._next = after + 1
        if not self._job.status.terminal:
            async for block in self._running():
                self._next = block[-1].index + 1
                yield block
            self._job = await self._ledger.job(self._job.tenant, self._job.id)
        if self._job.status.terminal:
            source = self._files.results(self._next - 1)
            while block := await asyncio.to_thread(_take, source):
                yield block

    async def _running(self) -> AsyncIterator[list[Record]]:
        """The finished items without a gap, shard by shard; ends early if the job's segments are gone."""
        end = await self._ledger.finished_prefix(self._job.id, self._job.total)
        size = self._job.shard_size
        for unit in range(self._next // size, -(-end // size)):
            (segments,) = await self._ledger.segments(self._job.id, [unit])
            try:
                records = await asyncio.to_thread(self._files.committed, segments)
            except (StorageError, NoSuchJob):
                return
            wanted = range(max(self._next, unit * size), min(end, (unit + 1) * size))
            block = [records[index] for index in wanted if index in records]
            if len(block) < len(wanted):
                return
            if block:
                yield block


def record_line(record: Record) -> dict[str, Any]:
    """One line of GET /jobs/{id}/results."""
    return {
        "index": record.index, "id": record.id, "status": "completed" if record.ok else "failed",
        "response": record.body, "error": record.error,
    }  # fmt: skip


def _take(source: Iterator[Record]) -> list[Record]:
    return list(islice(source, _BLOCK))
