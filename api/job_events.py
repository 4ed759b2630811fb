"""A job's progress and its finished items as they come: GET /jobs/{id}/events.

An event's id says how many items of each shard were sent, so that a client that comes back goes on exactly after it,
also when the job is over by then: a shard's items have an order, in which they finished, and the final files keep it.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import orjson

from api.errors import ApiError
from api.job_results import record_line
from engine.errors import VelocityError
from workers.errors import StorageError
from workers.job import JobState, Record
from workers.ledger import Ledger
from workers.store import JobFiles

_POLL = 0.5
_CHUNK = 64
_CURSOR = re.compile(r"(\d{1,5})(?:;((?:\d{1,5}:\d{1,5},)*\d{1,5}:\d{1,5}))?")

View = Callable[[JobState], Awaitable[dict[str, Any]]]


class Cursor:
    """How many items of each shard were sent: `12;13:57,15:4` are the first 12 shards, and parts of two others."""

    def __init__(self, job: JobState, text: str | None) -> None:
        self._job = job
        self._whole = 0
        """Shards from the first on of which everything was sent."""
        self._sent: Counter[int] = Counter()
        """Items sent of the shards from there on."""
        if not text:
            return
        found = _CURSOR.fullmatch(text)
        if found is None:
            raise ApiError(400, "Last-Event-ID is not the id of an event of this job.", param="last-event-id")
        self._whole = min(int(found[1]), job.shards)
        for part in (found[2] or "").split(","):
            if part:
                unit, count = part.split(":")
                if int(unit) >= self._whole:
                    self._sent[int(unit)] = int(count)

    def size(self, unit: int) -> int:
        """Items of a shard."""
        return min(self._job.shard_size, self._job.total - unit * self._job.shard_size)

    def sent(self, unit: int) -> int:
        """Items of a shard that were sent."""
        return self.size(unit) if unit < self._whole else self._sent.get(unit, 0)

    def advance(self, unit: int) -> str:
        """One more; returns the cursor after it."""
        self._sent[unit] += 1
        while self._whole < self._job.shards and self.done(self._whole):
            self._sent.pop(self._whole)
            self._whole += 1
        parts = ",".join(f"{unit}:{count}" for unit, count in sorted(self._sent.items()))
        return f"{self._whole};{parts}" if parts else str(self._whole)

    def done(self, unit: int) -> bool:
        """Whether all of a shard was sent."""
        return self.sent(unit) >= self.size(unit)


class Events:
    """The events of one job from a cursor on."""

    def __init__(self, ledger: Ledger, data_dir: Path, job: JobState, view: View, last: str | None) -> None:
        self._ledger = ledger
        self._job = job
        self._view = view
        self._files = JobFiles(data_dir, job.tenant, job.id)
        self._cursor = Cursor(job, last)
        self._lengths: dict[int, dict[str, int]] = {}
        """What was read of each shard's segments."""

    async def stream(self, may_go_on: Callable[[], Awaitable[None]], ping: float) -> AsyncIterator[bytes]:
        """Server-sent events until the job is over, the caller may not read on, or the job is deleted."""
        yield b"retry: 2000\n\n"
        told: tuple[object, ...] = ()
        checked = time.monotonic()
        try:
            while True:
                now = (self._job.status, self._job.completed, self._job.failed)
                if now != told:
                    async for event in self._items():
                        yield event
                    yield _event("progress", await self._view(self._job))
                    told = now
                if self._job.status.terminal:
                    yield _event("done", {"id": self._job.id, "status": self._job.status.value})
                    return
                if time.monotonic() - checked > ping:
                    await may_go_on()
                    checked = time.monotonic()
                    yield b": ping\n\n"
                await asyncio.sleep(_POLL)
                self._job = await self._ledger.job(self._job.tenant, self._job.id)
        except VelocityError as error:
            yield _event("error", {"message": str(error)})

    async def _items(self) -> AsyncIterator[bytes]:
        """What finished since; a job that ends meanwhile is read on from its final files."""
        if not self._job.status.terminal:
            try:
                async for event in self._running():
                    yield event
            except StorageError:
                self._job = await self._ledger.job(self._job.tenant, self._job.id)
                if not self._job.status.terminal:
                    raise
        if self._job.status.terminal and not self._never_began():
            for unit, group in groupby(self._final(), lambda record: record.index // self._job.shard_size):
                records = await asyncio.to_thread(sorted, group, key=lambda record: record.nth)
                for event in self._new(unit, records):
                    yield event

    def _never_began(self) -> bool:
        return not self._job.completed + self._job.failed

    def _final(self) -> Iterator[Record]:
        return self._files.results(-1)

    async def _running(self) -> AsyncIterator[bytes]:
        open_units = [unit for unit in range(self._job.shards) if not self._cursor.done(unit)]
        for at in range(0, len(open_units), _CHUNK):
            units = open_units[at : at + _CHUNK]
            for unit, lengths in zip(units, await self._ledger.segments(self._job.id, units), strict=True):
                if lengths != self._lengths.get(unit, {}):
                    records = await asyncio.to_thread(self._files.committed, lengths)
                    self._lengths[unit] = lengths
                    for event in self._new(unit, list(records.values())):
                        yield event

    def _new(self, unit: int, records: list[Record]) -> Iterator[bytes]:
        for record in records[self._cursor.sent(unit) :]:
            yield _event("item", record_line(record), self._cursor.advance(unit))


def _event(name: str, data: dict[str, Any], cursor: str | None = None) -> bytes:
    head = b"" if cursor is None else b"id: " + cursor.encode() + b"\n"
    return head + b"event: " + name.encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n"
