"""Merges the results of a job whose shards are closed, in input order, and makes it terminal."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from engine import log
from workers.batch_lines import batch_line
from workers.files import Files, Part
from workers.job import JobSpec, JobState, JobStatus, Lease, Outcome, Record
from workers.ledger import Ledger, Verdict
from workers.store import JobFiles

PARTS: tuple[Part, ...] = ("output", "error")
LOST = "result_lost"
_MISSING = {
    JobStatus.EXPIRED: ("batch_expired", "This request was not finished before the job's deadline."),
    JobStatus.COMPLETED: (LOST, "The result of this request was stored and can't be found any more."),
}
"""What an item without a result gets in a job that ended so; in others it stays without one."""

logger = log.get(__name__)


class Finalizer:
    """Does the unit `final`. Repeating it after a crash gives the same files."""

    def __init__(self, ledger: Ledger, data_dir: Path, lease_seconds: float) -> None:
        self._ledger = ledger
        self._data_dir = data_dir
        self._lease_seconds = lease_seconds

    async def run(self, lease: Lease) -> None:
        """Write output.jsonl, error.jsonl and the outcome, then compare-and-set the terminal state."""
        files = JobFiles(self._data_dir, lease.tenant, lease.job)
        outcome = await asyncio.to_thread(files.outcome) or await self._merge(lease, files)
        if outcome is None:
            return  # another finalizer has the job
        status = await self._ledger.finalize(lease, outcome)
        if status == outcome.status.value:
            await asyncio.to_thread(files.drop_segments)
            await asyncio.to_thread(files.drop_drafts)
        logger.info("job_finished", job=lease.job, status=status, completed=outcome.completed, failed=outcome.failed)

    async def _merge(self, lease: Lease, files: JobFiles) -> Outcome | None:
        job = await self._ledger.job(lease.tenant, lease.job)
        segments = await self._ledger.segments(lease.job, range(job.shards))
        spec = await asyncio.to_thread(files.spec)
        merge = Merge(files, job, segments, batch=spec.batch)
        merging = asyncio.create_task(asyncio.to_thread(files.merge, merge.records(), lease.segment))
        try:
            while not (await asyncio.wait({merging}, timeout=self._lease_seconds / 3))[0]:
                if await self._ledger.commit(lease, [], 0, self._lease_seconds) is Verdict.STALE:
                    break
        finally:
            publish = await merging
        if await self._ledger.commit(lease, [], 0, self._lease_seconds) is Verdict.STALE:
            return None
        await asyncio.to_thread(publish)
        if spec.batch:
            await asyncio.to_thread(self._add_outputs, spec, merge)
        outcome = merge.outcome()
        await asyncio.to_thread(files.write_outcome, outcome)
        return outcome

    def _add_outputs(self, spec: JobSpec, merge: Merge) -> None:
        for part in PARTS:
            Files(self._data_dir).add_output(spec, part, merge.sizes[part], merge.counts[part])


class Merge:
    """A job's records in input order, and what they come to."""

    def __init__(self, files: JobFiles, job: JobState, segments: list[dict[str, int]], *, batch: bool) -> None:
        self._files = files
        self._job = job
        self._segments = segments
        self._batch = batch
        self._status = JobStatus(job.outcome or JobStatus.COMPLETED)
        self.counts: Counter[Part] = Counter()
        """Records of each part."""
        self.sizes: Counter[Part] = Counter()
        """Bytes of a batch's output files."""

    def records(self) -> Iterator[Record]:
        """All of them, one shard in memory at a time."""
        missing = _MISSING.get(self._status)
        ids = self._files.ids()
        for unit, segments in enumerate(self._segments):
            found = self._files.committed(segments, strict=False)
            first = unit * self._job.shard_size
            for index in range(first, min(first + self._job.shard_size, self._job.total)):
                name = next(ids)
                record = found.get(index)
                if record is None and missing:
                    if missing[0] == LOST:
                        logger.error("result_lost", job=self._job.id, item=index)
                    error = {"code": missing[0], "message": missing[1]}
                    record = Record(index, name, 0, f"{self._job.id}-{index}", error=error, nth=len(found))
                    found[index] = record
                if record is not None:
                    part: Part = "output" if record.ok else "error"
                    self.counts[part] += 1
                    if self._batch:
                        self.sizes[part] += len(batch_line(record, self._job.id))
                    yield record

    def outcome(self) -> Outcome:
        """Once all records were read."""
        return Outcome(
            status=self._status, at=int(time.time()), completed=self.counts["output"], failed=self.counts["error"],
            input_tokens=self._job.input_tokens, output_tokens=self._job.output_tokens, times=dict(self._job.times),
        )  # fmt: skip
