"""Everything that one api process holds open, made in one place and handed down."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from api.engine_watch import EngineWatch
from api.keys import Keys
from api.limits import Limits
from api.settings import ApiSettings
from engine import log
from engine.client import EngineClient
from workers.ledger import Ledger
from workers.redis import connect, connect_sync
from workers.sweeper import Sweeper

logger = log.get(__name__)


@dataclass(frozen=True, slots=True)
class Gateway:
    """The connections and services behind the routes."""

    settings: ApiSettings
    engine: EngineClient
    watch: EngineWatch
    keys: Keys
    limits: Limits
    ledger: Ledger
    sweeper: Sweeper

    @classmethod
    @asynccontextmanager
    async def opened(cls, settings: ApiSettings) -> AsyncIterator[Gateway]:
        """Connect lazily, run the background tasks, and close all of it at the end."""
        bulk = connect(settings.redis_url, settings.redis_timeout)
        fast = connect(settings.redis_url, settings.limiter_timeout)
        rq_redis = connect_sync(settings.redis_url, settings.redis_timeout)
        engine = EngineClient.of(settings)
        ledger = Ledger(bulk)
        gateway = cls(
            settings=settings,
            engine=engine,
            watch=EngineWatch(engine),
            keys=Keys(fast, settings.data_dir, open_mode=settings.open),
            limits=Limits(fast),
            ledger=ledger,
            sweeper=Sweeper(bulk, rq_redis, ledger),
        )
        tasks = [asyncio.create_task(work) for work in (gateway.watch.run(), gateway.sweeper.run())]
        for task in tasks:
            task.add_done_callback(_end_if_broken)
        try:
            if settings.bootstrap_key_file:
                await asyncio.to_thread(gateway.keys.adopt, settings.bootstrap_key_file, "bootstrap")
            yield gateway
        finally:
            await _end(set(tasks))
            await engine.aclose()
            await bulk.aclose()
            await fast.aclose()
            rq_redis.close()


async def _end(tasks: set[asyncio.Task[None]]) -> None:
    """Cancel until they have ended: before Python 3.12 a cancellation is lost if a `wait_for` ends at that moment."""
    while tasks:
        for task in tasks:
            task.cancel()
        _, tasks = await asyncio.wait(tasks, timeout=1.0)


def _end_if_broken(task: asyncio.Task[None]) -> None:
    """A background task ends only by being cancelled. Without one the process is of no use: end it, to be restarted."""
    if not task.cancelled() and (error := task.exception()):
        logger.critical("background_task_failed", exc_info=error)
        os.kill(os.getpid(), signal.SIGTERM)
