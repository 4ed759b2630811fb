"""The pump: claims shards, keeps a window of requests in flight at the engine, commits what is finished."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress

from engine import log
from engine.client import EngineClient
from workers.courtesy import Courtesy
from workers.errors import LedgerUnavailable, NoSuchJob, StorageError
from workers.finalizer import Finalizer
from workers.job import FINAL, LANE, QUARANTINE
from workers.ledger import Ledger
from workers.request import Requester
from workers.settings import WorkerSettings
from workers.shard import ShardRun
from workers.window import Tally, Window

_TICK = 0.25
_PAUSE = 1.0
_MOST_FINALIZING = 2
_MOST_FEEDING = 8
"""Accounts whose items take turns in one worker's window."""

logger = log.get(__name__)


class Pump:
    """Works through a lane until nothing is pending or it is told to stop."""

    def __init__(
        self,
        ledger: Ledger,
        engine: EngineClient,
        settings: WorkerSettings,
        lane: str = LANE,
        tally: Tally | None = None,
    ) -> None:
        self._ledger = ledger
        self._settings = settings
        self._lane = lane
        self._window = Window(1, tally)
        self._courtesy = None if lane == QUARANTINE else Courtesy(self._window, ledger, engine, settings)
        self._changed = asyncio.Event()
        self._requester = Requester(engine, settings)
        self._finalizer = Finalizer(ledger, settings.data_dir, settings.lease_seconds)

    async def drain(self, stop: threading.Event) -> None:
        """Claim and run units until none is pending; when `stop` is set, finish or give back what is running."""
        if self._courtesy is None:
            await self._drain(stop, None)
            return
        async with self._courtesy.following() as following:
            await self._drain(stop, following)

    async def _drain(self, stop: threading.Event, following: asyncio.Task[None] | None) -> None:
        running: dict[asyncio.Task[None], ShardRun | None] = {}
        while not stop.is_set():
            if following is not None and following.done():
                following.result()
            await self._reap(running)
            try:
                if await self._start_next(running):
                    continue
            except LedgerUnavailable as error:
                logger.warning("claim_failed", reason=str(error))
                await asyncio.sleep(_PAUSE)
            if not running and self._window.size:  # without a place nobody asked whether there is work
                return
            await self._change()
        for shard in running.values():
            if shard is not None:
                shard.stop(self._settings.drain_seconds)
        if running:
            await asyncio.wait(running)
        await self._reap(running)

    async def _change(self) -> None:
        """Until a unit is over, a shard is all in flight, or a tick has passed (a place in the window may be free)."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_TICK):
                await self._changed.wait()
        self._changed.clear()

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._changed.set())
        return task

    async def _start_next(self, running: dict[asyncio.Task[None], ShardRun | None]) -> bool:
        """Claim one unit and start on it; False if there is none that could start now.

        Finalizing needs no place in the window. Of an account another shard is claimed only when all the claimed ones
        are in flight; other accounts need not wait for that: places in the window are given in turn.
        """
        if sum(shard is None for shard in running.values()) < _MOST_FINALIZING:
            lease = await self._ledger.claim(self._settings.lease_seconds, FINAL)
            if lease is not None:
                running[self._start(self._finalizer.run(lease))] = None
                return True
        feeding = {shard.flow for shard in running.values() if shard is not None and shard.feeding}
        most = 1 if self._lane == QUARANTINE else _MOST_FEEDING
        if len(feeding) >= most or (not feeding and self._window.locked):
            return False
        lease = await self._ledger.claim(self._settings.lease_seconds, self._lane, feeding)
        if lease is None:
            return False
        shard = ShardRun(lease, self._ledger, self._requester, self._window, self._settings, self._changed.set)
        running[self._start(shard.run())] = shard
        return True

    @staticmethod
    async def _reap(running: dict[asyncio.Task[None], ShardRun | None]) -> None:
        """Forget finished units. One that failed is left to others, and to later; it takes nothing else along."""
        for task in [task for task in running if task.done()]:
            shard = running.pop(task)
            error = task.exception()
            if error is None:
                continue
            if isinstance(error, LedgerUnavailable | StorageError | NoSuchJob):
                logger.warning("unit_abandoned", reason=str(error))
            elif isinstance(error, Exception):
                logger.error("unit_failed", flow=shard and shard.flow, exc_info=error)
            else:
                raise error
            await asyncio.sleep(_PAUSE)
