"""Whether there is room for more bulk work: asked before a submission is read, since that is the expensive part."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from redis.asyncio import Redis

from workers.errors import DiskFull, Overloaded, StorageError
from workers.preflight import Preflight
from workers.redis import translated

_MEMORY_SECONDS = 2.0
_MEMORY_MOST = 0.9
"""Share of maxmemory; the rest is for finishing what was accepted, and for the limits of interactive requests."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How full disk and queue may become."""

    min_free_bytes: int
    max_queued_items: int


class Pressure:
    """Refuses submissions while the disk, Redis or the queue is full.

    `queued` says how many items are accepted and not finished; `on_refused` hears disk_full, redis_full or queue_full.
    """

    def __init__(
        self,
        redis: Redis,
        queued: Callable[[], Awaitable[int]],
        preflight: Preflight,
        data_dir: Path,
        limits: Limits,
        on_refused: Callable[[str], None],
    ) -> None:
        self._redis = redis
        self._queued = queued
        self._preflight = preflight
        self._data_dir = data_dir
        self._limits = limits
        self._on_refused = on_refused
        self._memory = 0.0
        self._memory_until = 0.0

    async def require_room(self, bytes_expected: int = 0) -> None:
        """Raises DiskFull if the disk has no room for so many bytes, Overloaded if Redis or the queue is full.

        Also LedgerUnavailable, StorageError, PreflightError: nothing is accepted before the preflight has passed.
        """
        if not self._preflight.passed:
            await self._preflight.check()
        await self._require_disk(bytes_expected)
        if await self._memory_used() > _MEMORY_MOST:
            self._on_refused("redis_full")
            raise Overloaded(f"Redis uses more than {_MEMORY_MOST:.0%} of its memory. Try again when jobs have ended.")
        if await self._queued() >= self._limits.max_queued_items:
            self._on_refused("queue_full")
            most = self._limits.max_queued_items
            raise Overloaded(f"{most:,} items or more wait already. Try again when some of them are finished.")

    async def _require_disk(self, bytes_expected: int) -> None:
        free = await asyncio.to_thread(_free, self._data_dir)
        if free - bytes_expected < self._limits.min_free_bytes:
            self._on_refused("disk_full")
            raise DiskFull("The disk has too little free space for this. Try again when results have been deleted.")

    async def _memory_used(self) -> float:
        """Share of Redis's maxmemory that is in use, as it was at most two seconds ago; 0 if it has no limit."""
        if time.monotonic() >= self._memory_until:
            with translated():
                info = await self._redis.info("memory")
            most = int(info.get("maxmemory", 0))
            self._memory = int(info["used_memory"]) / most if most else 0.0
            self._memory_until = time.monotonic() + _MEMORY_SECONDS
        return self._memory


def _free(directory: Path) -> int:
    """Bytes that may still be written below a directory, which need not be there yet."""
    try:
        there = next(path for path in (directory, *directory.parents) if path.exists())
        return shutil.disk_usage(there).free
    except OSError as error:
        raise StorageError(f"The data directory {directory} can't be used: {error.strerror}.") from None
