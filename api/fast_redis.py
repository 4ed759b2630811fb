"""Redis on the interactive path: every call bounded, none repeated, and none for a second after a failure."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from redis.asyncio import Redis

from api.metrics import Metrics
from engine import log
from workers.errors import LedgerUnavailable
from workers.redis import translated
from workers.scripts import Scripts

_OPEN_SECONDS = 1.0

T = TypeVar("T")

logger = log.get(__name__)


class FastRedis:
    """Runs the api's scripts. Every method raises LedgerUnavailable within `timeout` seconds, or at once."""

    def __init__(self, redis: Redis, timeout: float, metrics: Metrics) -> None:
        self.redis = redis
        self._timeout = timeout
        self._metrics = metrics
        self._scripts = Scripts(redis, "api", prelude="prelude.lua")
        self._closed_again = 0.0
        self.down_since: float | None = None
        """Monotonic time of the first failure after which no call has succeeded."""

    async def run(self, script: str, *args: str | float | bytes) -> Any:
        """One script in one round trip."""
        return await self.call(script, lambda: self._scripts.run(script, *args))

    async def call(self, operation: str, command: Callable[[], Awaitable[T]]) -> T:
        """One command, counted and timed under `operation`."""
        began = time.monotonic()
        if began < self._closed_again:
            self._metrics.redis_failed(operation)
            raise LedgerUnavailable("Redis did not answer a moment ago.")
        try:
            async with asyncio.timeout(self._timeout):
                with translated():
                    result = await command()
        except TimeoutError:
            self._failed(operation, reason := f"Redis did not answer within {self._timeout:g} s.")
            raise LedgerUnavailable(reason) from None
        except LedgerUnavailable as error:
            self._failed(operation, str(error))
            raise
        if self.down_since is not None:
            logger.info("redis_back", after_seconds=round(time.monotonic() - self.down_since, 1))
            self.down_since = None
        self._metrics.redis(operation, time.monotonic() - began)
        return result

    def _failed(self, operation: str, reason: str) -> None:
        now = time.monotonic()
        self._metrics.redis_failed(operation)
        self._closed_again = now + _OPEN_SECONDS
        if self.down_since is None:
            self.down_since = now
            logger.warning("redis_down", operation=operation, reason=reason)
