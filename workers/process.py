"""The worker process: `velocity worker`. RQ hands it tickets; each ticket drains the lane."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import threading

import uvloop

from engine import log
from engine.client import EngineClient
from workers.errors import LedgerUnavailable
from workers.job import LANE
from workers.ledger import Ledger
from workers.pump import Pump
from workers.redis import connect, connect_sync, translated
from workers.settings import WorkerSettings
from workers.tickets import TicketWorker

_BEAT_SECONDS = 5
_ALIVE_SECONDS = 15

logger = log.get(__name__)


def run(settings: WorkerSettings) -> None:
    """Work until SIGTERM or SIGINT; what is running then is finished or given back. Raises LedgerUnavailable."""
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    ended = threading.Event()
    beating = threading.Thread(target=lambda: uvloop.run(_beat(settings, name, ended)), name="heartbeat")
    beating.start()
    try:
        with translated():
            redis = connect_sync(settings.redis_url)
            worker = TicketWorker(redis, LANE, name, lambda stop: uvloop.run(_drain(settings, stop)))
            logger.info("worker_started", worker=name, window=settings.bulk_window)
            worker.work(logging_level=None)
    finally:
        ended.set()
        beating.join()
        logger.info("worker_ended", worker=name)


async def _drain(settings: WorkerSettings, stop: threading.Event) -> None:
    redis = connect(settings.redis_url, settings.redis_timeout)
    try:
        async with EngineClient.of(settings) as engine:
            await Pump(Ledger(redis), engine, settings).drain(stop)
    finally:
        await redis.aclose()


async def _beat(settings: WorkerSettings, name: str, ended: threading.Event) -> None:
    """Say every five seconds that this process lives. A thread of its own, since a drain keeps the main one busy."""
    redis = connect(settings.redis_url, settings.redis_timeout)
    ledger = Ledger(redis)
    beats = 0
    try:
        while not ended.is_set():
            if beats % _BEAT_SECONDS == 0:
                try:
                    await ledger.beat(name, _ALIVE_SECONDS)
                except LedgerUnavailable as error:
                    logger.warning("heartbeat_failed", reason=str(error))
            beats += 1
            await asyncio.sleep(1)
        try:
            await ledger.beat(name, 0)
        except LedgerUnavailable as error:
            logger.debug("farewell_failed", reason=str(error))
    finally:
        await redis.aclose()
