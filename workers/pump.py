"""The pump: claims shards, keeps a bounded window of requests in flight at the engine, commits what is finished."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from engine import log
from engine.client import EngineClient
from workers.errors import LedgerUnavailable, StorageError
from workers.finalizer import Finalizer
from workers.ledger import Ledger
from workers.request import Requester
from workers.settings import WorkerSettings
from workers.shard import ShardRun

_TICK = 0.25
_REDIS_PAUSE = 1.0

logger = log.get(__name__)


class Pump:
    """Works through a lane until nothing is pending or it is told to stop."""

    def __init__(self, ledger: Ledger, engine: EngineClient, settings: WorkerSettings) -> None:
        self._ledger = ledger
        self._settings = settings
        self._data_dir: Path = settings.data_dir
        self._window = asyncio.Semaphore(settings.bulk_window)
        self._requester = Requester(engine, settings)
        self._finalizer = Finalizer(ledger, settings.data_dir, settings.lease_seconds)

    async def drain(self, stop: threading.Event) -> None:
        """Claim and run units until none is pending; when `stop` is set, finish or give back what is running."""
        running: dict[asyncio.Task[None], ShardRun | None] = {}
        while not stop.is_set():
            self._reap(running)
            hungry = any(run is not None and run.waiting for run in running.values())
            if not hungry and not self._window.locked() and await self._start_next(running):
                continue
            if not running:
                return
            await asyncio.wait(running, timeout=_TICK, return_when=asyncio.FIRST_COMPLETED)
        for run in running.values():
            if run is not None:
                run.stop(self._settings.drain_seconds)
        if running:
            await asyncio.wait(running)
        self._reap(running)

    async def _start_next(self, running: dict[asyncio.Task[None], ShardRun | None]) -> bool:
        """Claim one unit and start on it; False if there is none (or Redis is away)."""
        try:
            lease = await self._ledger.claim(self._settings.lease_seconds)
        except LedgerUnavailable as error:
            logger.warning("claim_failed", reason=str(error))
            await asyncio.sleep(_REDIS_PAUSE)
            return False
        if lease is None:
            return False
        if lease.final:
            running[asyncio.create_task(self._finalizer.run(lease))] = None
        else:
            run = ShardRun(lease, self._ledger, self._requester, self._window, self._settings)
            running[asyncio.create_task(run.run())] = run
        return True

    @staticmethod
    def _reap(running: dict[asyncio.Task[None], ShardRun | None]) -> None:
        """Forget finished units. What Redis or the disk refused is left to the sweeper, which gives it to another."""
        for task in [task for task in running if task.done()]:
            del running[task]
            try:
                task.result()
            except (LedgerUnavailable, StorageError) as error:
                logger.warning("unit_abandoned", reason=str(error))
