"""The outbox: who is to be told that a job is over, in Redis, and the sender that tells them until they have heard it.

An entry stands there from the moment when its job is over (the same script does both) until it is delivered or given
up. How that ended is written beside the job's results too, so that a rebuilt Redis does not begin again.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from redis.asyncio import Redis

from engine import log
from engine.errors import VelocityError
from workers import durable
from workers.errors import LedgerUnavailable, StorageError
from workers.job import new_id
from workers.ledger import Ledger
from workers.redis import translated
from workers.scripts import Scripts
from workers.store import JobFiles
from workers.webhooks import DEADLINE, Delivery, Webhooks, job_event

_MARKER = "webhook.json"
INTERVAL = 1.0
SCHEDULE = (5, 60, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400)
"""Seconds after each failed attempt until the next one."""
_JITTER = 0.1
_LEASE = 3 * DEADLINE
"""Seconds after which another sender takes an entry that nobody settled."""
_MOST = 16
_MOST_OF_HOST = 2
_MOST_OF_TENANT = 8
_CLOSE_SECONDS = 2.0
_TESTS, _TEST_SECONDS = 10, 60
"""Test events that one API key may send in so many seconds."""

logger = log.get(__name__)


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    host: str
    tenant: str
    url: str
    attempts: int

    @property
    def job(self) -> str:
        return self.name.partition("/")[2]


class Outbox:
    """Sends what is due. Several may run: an entry that is being sent is leased."""

    def __init__(self, redis: Redis, ledger: Ledger, webhooks: Webhooks, data_dir: Path) -> None:
        self._scripts = Scripts(redis, "workers", prelude="prelude.lua")
        self._ledger = ledger
        self._data_dir = data_dir
        self._senders: set[asyncio.Task[None]] = set()
        self._taking = asyncio.Lock()
        self._busy: Counter[str] = Counter()
        self._closing = False
        self.webhooks = webhooks

    async def run(self) -> None:
        """Send until cancelled; a Redis that is away is waited for."""
        while True:
            try:
                await self.send_due()
            except LedgerUnavailable as error:
                logger.warning("outbox_waits", reason=str(error))
            await asyncio.sleep(INTERVAL)

    async def step(self) -> None:
        """Send all that is due, and wait until it is settled. Raises LedgerUnavailable."""
        await self.send_due()
        while self._senders:
            await asyncio.wait(self._senders)

    async def send_due(self) -> None:
        """Begin to send what is due, in tasks of its own. Raises LedgerUnavailable."""
        for entry in await self._take(_MOST - len(self._senders)):
            sender = asyncio.create_task(self._send_from(entry))
            self._senders.add(sender)
            sender.add_done_callback(self._ended)

    async def aclose(self) -> None:
        """Let running deliveries end for a moment, then give them up; they are sent again when their lease is over."""
        self._closing = True
        if self._senders:
            await asyncio.wait(self._senders, timeout=_CLOSE_SECONDS)
        while self._senders:  # a cancellation can be lost before Python 3.12
            for sender in self._senders:
                sender.cancel()
            await asyncio.wait(self._senders, timeout=1.0)

    async def test_wait(self, account: str) -> float:
        """Seconds until an API key may send one more test event; 0 if it may now, and then it counts."""
        return int(await self._run("outbox_test", account, new_id("test"), _TESTS, _TEST_SECONDS * 1000)) / 1000

    async def _send_from(self, first: _Entry) -> None:
        """Send an entry, and then what else is due, one after the other."""
        entry: _Entry | None = first
        while entry is not None:
            try:
                await self._deliver(entry)
            except VelocityError as error:  # its lease ends, and it is due again
                logger.warning("webhook_postponed", job=entry.job, reason=type(error).__name__)
            finally:
                self._busy.subtract((entry.host, entry.tenant))
            entry = None
            with suppress(LedgerUnavailable):
                entry = next(iter(await self._take(1)), None)

    async def _take(self, most: int) -> list[_Entry]:
        if most <= 0 or self._closing:
            return []
        async with self._taking:  # so that what is busy is known
            self._busy = +self._busy
            busy = [part for pair in self._busy.items() for part in pair]
            lease = round(_LEASE * 1000)
            found = await self._run("outbox_take", most, lease, _MOST_OF_HOST, _MOST_OF_TENANT, *busy)
            entries = []
            for name, host, tenant, url, attempts in found:
                entry = _Entry(name.decode(), host.decode(), tenant.decode(), url.decode(), int(attempts))
                self._busy.update((entry.host, entry.tenant))
                entries.append(entry)
        return entries

    async def _deliver(self, entry: _Entry) -> None:
        directory = JobFiles(self._data_dir, entry.tenant, entry.job).path
        before = await asyncio.to_thread(webhook_outcome, directory)
        if before:  # a sender ended between writing it down and telling Redis
            error = before.get("webhook_error", "")
            await self._settle(entry, before["webhook_status"], int(before["webhook_attempts"]), error)
            return
        job = await self._ledger.job(entry.tenant, entry.job)
        if not job.status.terminal:  # a rebuild has begun it again: it is told when it is over
            return
        attempts = entry.attempts + 1
        result = await self.webhooks.send(entry.tenant, entry.url, f"evt_{entry.job}", job_event(job))
        wait = pause(attempts, result)
        status = "delivered" if result.delivered else "failed" if wait is None else "pending"
        if status != "pending":
            await asyncio.to_thread(_write_down, directory, status, attempts, result.error)
        await self._settle(entry, status, attempts, result.error or "", wait or 0)
        logger.info(
            "webhook", job=entry.job, status=status, attempts=attempts, answer=result.status_code, reason=result.error,
            duration_ms=round(result.seconds * 1000),
        )  # fmt: skip

    async def _settle(self, entry: _Entry, status: str, attempts: int, error: str, wait: float = 0) -> None:
        await self._run("outbox_settle", entry.name, status, attempts, error, round(wait * 1000))

    async def _run(self, name: str, *args: str | float) -> Any:
        with translated():
            return await self._scripts.run(name, *args)

    def _ended(self, sender: asyncio.Task[None]) -> None:
        self._senders.discard(sender)
        if not sender.cancelled() and (error := sender.exception()):
            logger.error("webhook_sender_failed", exc_info=error)


def pause(attempts: int, result: Delivery) -> float | None:
    """Seconds until the next attempt after `attempts`; None if there is none. A receiver may ask for a longer pause."""
    if result.delivered or result.status_code == 410 or attempts > len(SCHEDULE):
        return None
    wait = SCHEDULE[attempts - 1] * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - jitter
    return max(wait, min(result.retry_after or 0, SCHEDULE[-1]))


def webhook_outcome(path: Path) -> dict[str, str]:
    """Fields of the job's hash that say how its webhook ended; empty if it has not. Raises StorageError."""
    with durable.storage("The webhook's outcome can't be read"), suppress(FileNotFoundError):
        known = orjson.loads((path / _MARKER).read_bytes())
        return {f"webhook_{name}": str(known[name]) for name in ("status", "attempts", "error") if known[name]}
    return {}


def _write_down(path: Path, status: str, attempts: int, error: str | None) -> None:
    known = {"status": status, "attempts": attempts, "error": error, "time": int(time.time())}
    try:
        with durable.storage("The webhook's outcome can't be written"):
            durable.replace(path / _MARKER, orjson.dumps(known))
    except StorageError as failure:  # a full disk, or the job was deleted meanwhile: Redis knows it all the same
        logger.warning("webhook_not_written_down", reason=str(failure))
