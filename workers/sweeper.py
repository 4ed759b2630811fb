"""Keeps the bulk path moving: takes lost leases back, stops late jobs, and rings for work that nobody was told of.

Runs in every api process; a lock in Redis lets one of them do it, and the chores that one process should do for all.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass

from redis import Redis as SyncRedis
from redis.asyncio import Redis

from engine import log
from engine.errors import VelocityError
from workers import redis_keys, tickets
from workers.errors import LedgerUnavailable
from workers.job import FINAL, LANE, QUARANTINE
from workers.ledger import Ledger
from workers.redis import translated

INTERVAL = 2.0
_LOCK_MS = 6000

logger = log.get(__name__)


@dataclass(frozen=True)
class Chore:
    """Something that one process does for all, every `seconds`."""

    name: str
    seconds: float
    step: Callable[[], Awaitable[None]]


class Sweeper:
    """One per api process."""

    def __init__(self, redis: Redis, rq_redis: SyncRedis, ledger: Ledger, chores: Sequence[Chore] = ()) -> None:
        self._redis = redis
        self._rq_redis = rq_redis
        self._ledger = ledger
        self._chores = chores
        self._name = secrets.token_hex(8)
        self._leading = False

    def work(self) -> list[Coroutine[None, None, None]]:
        """What runs until it is cancelled: sweeping every two seconds, and each chore; a Redis that is away is awaited.

        Each a task of its own, and no group: a group passes a cancellation on once only, and one may get lost.
        """
        return [self._sweep_for_ever(), *(self._repeat(chore) for chore in self._chores)]

    async def _sweep_for_ever(self) -> None:
        while True:
            try:
                self._leading = await self._leads()
                if self._leading:
                    await self.sweep()
            except LedgerUnavailable as error:
                self._leading = False
                logger.warning("sweep_failed", reason=str(error))
            await asyncio.sleep(INTERVAL)

    async def _repeat(self, chore: Chore) -> None:
        while True:
            if self._leading:
                try:
                    await chore.step()
                except (VelocityError, OSError) as error:
                    logger.warning("chore_failed", chore=chore.name, reason=str(error))
            await asyncio.sleep(chore.seconds)

    async def sweep(self) -> None:
        """Once."""
        swept = await self._ledger.sweep()
        if swept.back or swept.expired:
            logger.info("swept", leases_lost=swept.back, jobs_expired=swept.expired)
        waiting = {LANE: swept.pending.get(LANE, 0) + swept.pending.get(FINAL, 0)}
        waiting[QUARANTINE] = swept.pending.get(QUARANTINE, 0)
        for lane, units in waiting.items():
            await self.ring(units, lane)

    async def ring(self, units: int, lane: str = LANE) -> None:
        """See to it that workers hear of so many units of pending work."""
        if units > 0:
            await asyncio.to_thread(tickets.ring, self._rq_redis, lane, units)

    async def _leads(self) -> bool:
        with translated():
            if await self._redis.set(redis_keys.SWEEPER_LOCK, self._name, nx=True, px=_LOCK_MS):
                return True
            mine = await self._redis.get(redis_keys.SWEEPER_LOCK) == self._name.encode()
            if mine:
                await self._redis.pexpire(redis_keys.SWEEPER_LOCK, _LOCK_MS)
            return mine
