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
from api.bulk_watch import BulkWatch
from api.engine_watch import EngineWatch
from api.fast_redis import FastRedis
from api.intake import Intake
from api.key_store import Keys
from api.limits.limiter import Limiter
from api.metrics import Metrics, Refusal, installed_version
from api.settings import ApiSettings
from api.usage_store import UsageStore
from engine import log
from engine.client import EngineClient
from workers.errors import LedgerUnavailable, NoSuchJob, StorageError
from workers.files import Files
from workers.job import JobState
from workers.ledger import Ledger
from workers.outbox import INTERVAL, Outbox
from workers.preflight import Preflight
from workers.pressure import Limits, Pressure
from workers.reconcile import Reconciler
from workers.redis import connect, connect_sync
from workers.retention import Retention
from workers.store import JobFiles
from workers.sweeper import Chore, Sweeper
from workers.webhooks import Webhooks

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
    preflight: Preflight
    pressure: Pressure
    intake: Intake
    outbox: Outbox
    sweeper: Sweeper
    metrics: Metrics
    tracer: tracing.Tracer
    bulk: BulkWatch

    @classmethod
    @asynccontextmanager
    async def opened(cls, settings: ApiSettings) -> AsyncIterator[Gateway]:
        """Connect lazily, run the background tasks, and close all of it at the end. Raises PreflightError."""
        bulk = connect(settings.redis_url, settings.api_redis_timeout)
        metrics = Metrics()
        fast = FastRedis(settings.redis_url, settings.limiter_timeout, metrics)
        rq_redis = connect_sync(settings.redis_url, settings.api_redis_timeout)
        error_tracking.start(settings.sentry_dsn, installed_version())
        gateway = cls.of(settings, bulk, fast, rq_redis, metrics)
        tasks: list[asyncio.Task[None]] = []
        try:
            try:
                await gateway.preflight.check()
                if not await asyncio.to_thread((settings.data_dir / "jobs").exists):
                    await gateway.ledger.remember()  # there is nothing that Redis could have lost
            except (LedgerUnavailable, StorageError) as error:
                logger.warning("preflight_put_off", reason=str(error))  # its task goes on
            watching = (gateway.preflight.run(), gateway.watch.run(), gateway.bulk.run())
            for work in (*watching, gateway.limiter.run(), *gateway.sweeper.work()):
                tasks.append(asyncio.create_task(work))
                tasks[-1].add_done_callback(_end_if_broken)
            if settings.bootstrap_key_file:
                await asyncio.to_thread(gateway.keys.adopt, settings.bootstrap_key_file, "bootstrap")
            try:
                await gateway.keys.enter_all()
            except (LedgerUnavailable, StorageError) as error:
                logger.warning("keys_not_entered", reason=str(error))  # each is entered when it is next used or changed
            yield gateway
        finally:
            await gateway.intake.aclose()
            await gateway.limiter.aclose()
            await _end(set(tasks))
            await gateway.outbox.aclose()
            await gateway.engine.aclose()
            await bulk.aclose()
            await fast.aclose()
            rq_redis.close()
            await asyncio.to_thread(gateway.tracer.close)
            await asyncio.to_thread(error_tracking.close)

    async def job(self, tenant: str, job_id: str) -> JobState:
        """A tenant's job. Raises NoSuchJob; LedgerUnavailable if it is on the disk and not in Redis again yet."""
        try:
            return await self.ledger.job(tenant, job_id)
        except NoSuchJob:
            if await asyncio.to_thread(JobFiles(self.settings.data_dir, tenant, job_id).path.exists):
                raise LedgerUnavailable("Redis has lost this job; it is being entered again. Ask once more.") from None
            raise

    @classmethod
    def of(
        cls, settings: ApiSettings, bulk: Redis, fast: FastRedis, rq_redis: sync_redis.Redis, metrics: Metrics
    ) -> Gateway:
        """The services on these connections."""
        engine = EngineClient.of(settings)
        watch = EngineWatch(engine)
        metrics.observe_engine(lambda: watch.up, lambda: watch.protection.protection if watch.protection else None)
        ledger = Ledger(bulk)
        bulk_watch = BulkWatch(ledger)
        metrics.register(bulk_watch)
        keys = Keys(fast, settings.data_dir, open_mode=settings.open)
        preflight = Preflight(bulk, settings.data_dir, owner=True)
        outbox = Outbox(bulk, ledger, Webhooks(settings.data_dir, settings.webhook_allow), settings.data_dir)
        limits = Limits(settings.min_free_bytes, settings.max_queued_items)
        return cls(
            settings=settings,
            engine=engine,
            watch=watch,
            keys=keys,
            limiter=Limiter(fast, keys, settings, metrics),
            usage=UsageStore(bulk),
            ledger=ledger,
            preflight=preflight,
            pressure=Pressure(
                bulk, ledger.queued, preflight, settings.data_dir, limits, lambda why: metrics.refused(Refusal(why))
            ),
            outbox=outbox,
            intake=Intake(),
            sweeper=Sweeper(bulk, rq_redis, ledger, _chores(ledger, outbox, settings)),
            metrics=metrics,
            tracer=tracing.load("velocity-api"),
            bulk=bulk_watch,
        )


def _chores(ledger: Ledger, outbox: Outbox, settings: ApiSettings) -> list[Chore]:
    files = Files(settings.data_dir)
    reconciler = Reconciler(ledger, settings.data_dir)
    retention = Retention(ledger, settings.data_dir, settings.retention_days * 86400)
    return [
        Chore("reconcile", 2, reconciler.step),
        Chore("retention", 60, retention.step),
        Chore("files", 60, lambda: asyncio.to_thread(files.tidy)),
        Chore("webhooks", INTERVAL, outbox.send_due),
    ]


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
