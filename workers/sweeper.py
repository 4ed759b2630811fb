"""Keeps the bulk path moving: takes lost leases back, stops late jobs, and rings for work that nobody was told of.

Runs in every api process; a lock in Redis lets one of them do it.
"""

from __future__ import annotations

import asyncio
import secrets

from redis import Redis as SyncRedis
from redis.asyncio import Redis

from engine import log
from workers import redis_keys, tickets
from workers.errors import LedgerUnavailable
from workers.job import LANE
from workers.ledger import Ledger
from workers.redis import translated

INTERVAL = 2.0
_LOCK_MS = 6000

logger = log.get(__name__)


class Sweeper:
    """One per api process."""

    def __init__(self, redis: Redis, rq_redis: SyncRedis, ledger: Ledger) -> None:
        self._redis = redis
        self._rq_redis = rq_redis
        self._ledger = ledger
        self._name = secrets.token_hex(8)

    async def run(self) -> None:
        """Sweep every two seconds until cancelled; a Redis that is away is waited for."""
        while True:
            try:
                if await self._leads():
                    await self.sweep()
            except LedgerUnavailable as error:
                logger.warning("sweep_failed", reason=str(error))
            await asyncio.sleep(INTERVAL)

    async def sweep(self) -> None:
        """Once."""
        back, expired, pending = await self._ledger.sweep()
        if back or expired:
            logger.info("swept", leases_lost=back, jobs_expired=expired)
        await self.ring(pending)

    async def ring(self, pending: int) -> None:
        """See to it that workers hear of pending work."""
        if pending:
            await asyncio.to_thread(tickets.ring, self._rq_redis, LANE, pending)

    async def _leads(self) -> bool:
        with translated():
            if await self._redis.set(redis_keys.SWEEPER_LOCK, self._name, nx=True, px=_LOCK_MS):
                return True
            mine = await self._redis.get(redis_keys.SWEEPER_LOCK) == self._name.encode()
            if mine:
                await self._redis.pexpire(redis_keys.SWEEPER_LOCK, _LOCK_MS)
            return mine
