"""The worker process: `velocity worker`. RQ hands it tickets; each ticket drains the lane."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import threading

import uvloop

from engine import log
from engine.client import EngineClient
from workers.errors import LedgerUnavailable, PreflightError, StorageError
from workers.job import LANE
from workers.ledger import Ledger
from workers.preflight import Preflight
from workers.pump import Pump
from workers.redis import close, connect, connect_sync, translated
from workers.settings import WorkerSettings
from workers.tickets import TicketWorker
from workers.window import Tally

_ALIVE_SECONDS = 15

logger = log.get(__name__)


def run(settings: WorkerSettings, lane: str = LANE) -> None:
    """Work on a lane until SIGTERM or SIGINT; what is running then is finished or given back.

    Raises LedgerUnavailable, StorageError or PreflightError.
    """
    uvloop.run(_check(settings))
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    ended = threading.Event()
    faults: list[PreflightError] = []
    tally = Tally()

    def drain(stop: threading.Event) -> None:
        try:
            uvloop.run(_drain(settings, lane, stop, tally))
        except PreflightError as error:  # RQ would only call the ticket failed
            faults.append(error)
            signal.raise_signal(signal.SIGTERM)

    beating = threading.Thread(target=lambda: uvloop.run(_beat(settings, name, lane, tally, ended)), name="heartbeat")
    beating.start()
    try:
        with translated():
            redis = connect_sync(settings.redis_url)
            worker = TicketWorker(redis, lane, name, drain)
            logger.info("worker_started", worker=name, lane=lane, window=settings.bulk_window or "auto")
            worker.work(logging_level=None)
    finally:
        ended.set()
        beating.join()
        logger.info("worker_ended", worker=name)
    if faults:
        raise faults[0]


async def _check(settings: WorkerSettings) -> None:
    redis = connect(settings.redis_url, settings.redis_timeout)
    try:
        await Preflight(redis, settings.data_dir, owner=False).check()
    finally:
        await close(redis)


async def _drain(settings: WorkerSettings, lane: str, stop: threading.Event, tally: Tally) -> None:
    redis = connect(settings.redis_url, settings.redis_timeout)
    try:
        await Preflight(redis, settings.data_dir, owner=False).require_same_data()  # it may have gone in the meantime
        async with EngineClient.of(settings) as engine:
            await Pump(Ledger(redis), engine, settings, lane, tally).drain(stop)
    except (LedgerUnavailable, StorageError) as error:
        logger.warning("drain_put_off", reason=str(error))  # the sweeper rings again
    finally:
        await close(redis)


async def _beat(settings: WorkerSettings, name: str, lane: str, tally: Tally, ended: threading.Event) -> None:
    """Say every second that this process lives, and what it does. A drain keeps the main thread busy, hence another."""
    redis = connect(settings.redis_url, settings.redis_timeout)
    ledger = Ledger(redis)
    try:
        while not ended.is_set():
            try:
                await ledger.beat(name, _ALIVE_SECONDS, lane, tally)
            except LedgerUnavailable as error:
                logger.warning("heartbeat_failed", reason=str(error))
            await asyncio.sleep(1)
        try:
            await ledger.beat(name, 0, lane, tally)
        except LedgerUnavailable as error:
            logger.debug("farewell_failed", reason=str(error))
    finally:
        await close(redis)
