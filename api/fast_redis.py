"""Redis on the interactive path: every call bounded, none repeated, and none for a second after a failure."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from api.metrics import Metrics
from api.redis_pipe import RedisPipe, Script, Word
from engine import log
from workers.errors import LedgerUnavailable
from workers.scripts import texts

_OPEN_SECONDS = 1.0

logger = log.get(__name__)


class FastRedis:
    """Runs the api's scripts. Every method raises LedgerUnavailable within `timeout` seconds, or at once."""

    def __init__(self, url: str, timeout: float, metrics: Metrics) -> None:
        self._loop = asyncio.get_running_loop()
        self._pipe = RedisPipe(url, timeout)
        self._metrics = metrics
        self._scripts = {name: Script(text) for name, text in texts("api", prelude="prelude.lua").items()}
        self._closed_again = 0.0
        self.down_since: float | None = None
        """Monotonic time of the first failure after which no call has succeeded."""

    async def run(self, script: str, *args: Word) -> Any:
        """One script in one round trip, counted and timed under its name."""
        began = self._begin(script)
        try:
            answer = await self._pipe.run(self._scripts[script], *args)
        except LedgerUnavailable as error:
            self._failed(script, str(error))
            raise
        self._done(script, began)
        return answer

    async def call(self, operation: str, *command: Word) -> Any:
        """One command, counted and timed under `operation`."""
        began = self._begin(operation)
        try:
            answer = await self._pipe.call(*command)
        except LedgerUnavailable as error:
            self._failed(operation, str(error))
            raise
        self._done(operation, began)
        return answer

    def post(self, script: str, *args: Word) -> asyncio.Future[Any] | None:
        """One script, sent at once if there is a connection, for whose answer nobody waits. None: it can't be sent."""
        try:
            began = self._begin(script)
        except LedgerUnavailable:
            return None

        def answered(sent: asyncio.Future[Any]) -> None:
            if sent.cancelled() or (error := sent.exception()) is None:
                self._done(script, began)
            else:
                self._failed(script, str(error))

        posted = self._pipe.post(self._scripts[script], *args)
        posted.add_done_callback(answered)
        return posted

    async def aclose(self) -> None:
        """Drop the connection."""
        await self._pipe.aclose()

    def _begin(self, operation: str) -> float:
        began = time.monotonic()
        if began < self._closed_again:
            self._metrics.redis_failed(operation)
            raise LedgerUnavailable("Redis did not answer a moment ago.")
        return began

    def _done(self, operation: str, began: float) -> None:
        now = time.monotonic()
        if self.down_since is not None:
            logger.info("redis_back", after_seconds=round(now - self.down_since, 1))
            self.down_since = None
        self._metrics.redis(operation, now - began)

    def _failed(self, operation: str, reason: str) -> None:
        now = time.monotonic()
        self._metrics.redis_failed(operation)
        self._closed_again = now + _OPEN_SECONDS
        if self.down_since is None:
            self.down_since = now
            logger.warning("redis_down", operation=operation, reason=reason)
