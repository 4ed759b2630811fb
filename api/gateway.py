"""Everything that one api process holds open, made in one place and handed down."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import redis as sync_redis
from redis.asyncio import Redis

from api import error_tracking, tracing
from api.engine_watch import EngineWatch
from api.fast_redis import FastRedis
from api.key_store import Keys
from api.limits.limiter import Limiter
from api.metrics import Metrics, installed_version
from api.settings import ApiSettings
from api.usage_store import UsageStore
from engine import log
from engine.client import EngineClient
from workers.errors import LedgerUnavailable, StorageError
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
    limiter: Limiter
    usage: UsageStore
    ledger: Ledger
    sweeper: Sweeper
    metrics: Metrics
    tracer: tracing.Tracer

    @classmethod
    @asynccontextmanager
    async def opened(cls, settings: ApiSettings) -> AsyncIterator[Gateway]:
        """Connect lazily, run the background tasks, and close all of it at the end."""
        bulk = connect(settings.redis_url, settings.api_redis_timeout)
        quick = connect(settings.redis_url, settings.limiter_timeout, retries=0)
        rq_redis = connect_sync(settings.redis_url, settings.api_redis_timeout)
        error_tracking.start(settings.sentry_dsn, installed_version())
        gateway = cls.of(settings, bulk, quick, rq_redis)
        tasks = [
            asyncio.create_task(work) for work in (gateway.watch.run(), gateway.sweeper.run(), gateway.limiter.run())
        ]
        for task in tasks:
            task.add_done_callback(_end_if_broken)
        try:
            if settings.bootstrap_key_file:
                await asyncio.to_thread(gateway.keys.adopt, settings.bootstrap_key_file, "bootstrap")
            try:
                await gateway.keys.enter_all()
            except (LedgerUnavailable, StorageError) as error:
                logger.warning("keys_not_entered", reason=str(error))  # each is entered when it is next used or changed
            yield gateway
        finally:
            await gateway.limiter.aclose()
            await _end(set(tasks))
            await gateway.engine.aclose()
            await bulk.aclose()
            await quick.aclose()
            rq_redis.close()
            await asyncio.to_thread(gateway.tracer.close)
            await asyncio.to_thread(error_tracking.close)

    @classmethod
    def of(cls, settings: ApiSettings, bulk: Redis, quick: Redis, rq_redis: sync_redis.Redis) -> Gateway:
        """The services on these connections."""
        metrics = Metrics()
        engine = EngineClient.of(settings)
        watch = EngineWatch(engine)
        metrics.observe_engine(lambda: watch.up)
        ledger = Ledger(bulk)
        fast = FastRedis(quick, settings.limiter_timeout, metrics)
        keys = Keys(fast, settings.data_dir, open_mode=settings.open)
        return cls(
            settings=settings,
            engine=engine,
            watch=watch,
            keys=keys,
            limiter=Limiter(fast, keys, settings, metrics),
            usage=UsageStore(bulk),
            ledger=ledger,
            sweeper=Sweeper(bulk, rq_redis, ledger),
            metrics=metrics,
            tracer=tracing.load("velocity-api"),
        )


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
        error_tracking.report(error)
        os.kill(os.getpid(), signal.SIGTERM)
