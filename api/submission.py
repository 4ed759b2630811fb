"""How a job whose files are on the disk becomes one that workers see: the same for /jobs, batches and retries."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from fastapi import Request

from api.errors import ApiError
from api.gateway import Gateway
from api.keys import Key
from api.metrics import Refusal
from engine import log
from workers.errors import IdempotencyConflict, LedgerFull, LedgerUnavailable, QuotaExceeded
from workers.job import BulkQuota, JobSpec, JobState, JobStatus, Outcome
from workers.progress import seconds_left
from workers.store import JobFiles

_LOOK_AT = 50
_LONGEST_WAIT = 3600.0

T = TypeVar("T")

logger = log.get(__name__)


def quota_of(key: Key) -> BulkQuota:
    """What the key lets its tenant have in active jobs."""
    return BulkQuota(key.bulk_jobs or 0, key.bulk_items or 0, key.bulk_tokens or 0)


async def require_capacity(gateway: Gateway, request: Request, most: int) -> None:
    """Ask before a body of at most `most` bytes is read; its length is only a hint.

    Raises DiskFull, Overloaded, PreflightError, LedgerUnavailable, StorageError.
    """
    length = request.headers.get("content-length", "")
    await gateway.pressure.require_room(min(int(length), most) if length.isdecimal() else 0)


async def require_room(gateway: Gateway, key: Key, spec: JobSpec) -> JobState | None:
    """Ask before the expensive part; its size may still be a guess. The earlier job, if this request came before.

    Raises QuotaExceeded, IdempotencyConflict; LedgerUnavailable also while a lost Redis is made anew, since the job of
    an Idempotency-Key may not be there again yet.
    """
    if spec.idempotency and not await gateway.ledger.remembers():
        raise LedgerUnavailable("Redis has lost its data; which Idempotency-Keys came before is known in a moment.")
    async with _counted(gateway, key):
        earlier = await gateway.ledger.require_room(spec, quota_of(key))
    return None if earlier is None else await gateway.ledger.job(key.tenant, earlier)


async def submit(gateway: Gateway, key: Key, spec: JobSpec) -> JobState:
    """Enter a job whose files are durable; returns the job that stands for the request: it, or an earlier one.

    Raises QuotaExceeded, IdempotencyConflict or LedgerFull, and then its files are gone. If Redis does not answer they
    stay, since the job may have been entered all the same: what is on the disk is entered later.
    """
    files = JobFiles(gateway.settings.data_dir, spec.tenant, spec.id)
    try:
        async with _counted(gateway, key):
            entered = await gateway.ledger.submit(spec, quota_of(key))
        if entered != spec.id:
            await asyncio.to_thread(files.remove)
        await ring(gateway, pending=-(-spec.total // spec.shard_items))
        return await gateway.ledger.job(spec.tenant, entered)
    except (QuotaExceeded, IdempotencyConflict, LedgerFull):  # it is certain that it was not entered
        await asyncio.to_thread(files.remove)
        raise
    except LedgerUnavailable:
        logger.warning("job_not_entered", job=spec.id)
        raise uncertain(spec) from None


async def written(gateway: Gateway, spec: JobSpec, making: Awaitable[T]) -> T:
    """What makes the job's files; if its process ended in the middle, nothing of them is left."""
    try:
        return await making
    except ApiError as error:
        if error.status == 503:
            await asyncio.to_thread(JobFiles(gateway.settings.data_dir, spec.tenant, spec.id).remove)
        raise


async def fail(gateway: Gateway, spec: JobSpec, faults: list[dict[str, Any]]) -> JobState:
    """Enter a batch that is failed from the start, for these faults of its input; it has no items."""
    spec = spec.model_copy(update={"total": 0, "tokens": 0})
    now = int(time.time())
    outcome = Outcome(status=JobStatus.FAILED, at=now, errors=faults, times={"failed_at": now})
    await asyncio.to_thread(_write_failed, JobFiles(gateway.settings.data_dir, spec.tenant, spec.id), spec, outcome)
    try:
        await gateway.ledger.enter_over(spec, outcome)
        return await gateway.ledger.job(spec.tenant, spec.id)
    except LedgerUnavailable:
        raise uncertain(spec) from None


def _write_failed(files: JobFiles, spec: JobSpec, outcome: Outcome) -> None:
    with files.draft() as draft:
        draft.publish(spec, outcome)


def uncertain(spec: JobSpec) -> ApiError:
    """The answer when a job is on the disk, and nobody knows whether it is in the ledger."""
    kind = "batch" if spec.batch else "job"
    message = f"Redis did not answer. The {kind} is stored and will be entered as {spec.id!r} when Redis is back."
    if spec.idempotency:
        again = (b"retry-after", b"2")
        message += " Asking again with the same Idempotency-Key gives the same one."
    else:
        again = (b"x-should-retry", b"false")
        message += " Asking again would make another; send an Idempotency-Key to be able to."
    return ApiError(503, message, type="server_error", code="redis_unavailable", headers=(again,))


async def cancel(gateway: Gateway, job: JobState) -> JobState:
    """Stop a job, durably; what is finished is kept. One that is over stays as it is."""
    if not job.status.terminal:
        await asyncio.to_thread(JobFiles(gateway.settings.data_dir, job.tenant, job.id).cancel)
        await gateway.ledger.cancel(job.id)
        await ring(gateway, pending=1)
    return await gateway.job(job.tenant, job.id)


async def ring(gateway: Gateway, pending: int) -> None:
    """Wake workers now. If that fails the sweeper does it later: the job is accepted all the same."""
    with suppress(LedgerUnavailable):
        await gateway.sweeper.ring(pending)


@asynccontextmanager
async def _counted(gateway: Gateway, key: Key) -> AsyncIterator[None]:
    """Count a refusal, and say when to ask again: when the first of the tenant's jobs will probably end."""
    try:
        yield
    except QuotaExceeded as error:
        gateway.metrics.refused(Refusal(f"bulk_{error.what}"))
        with suppress(LedgerUnavailable):  # it is refused all the same
            queued, rate = await gateway.ledger.bulk()
            active = [job for job in await gateway.ledger.jobs(key.tenant, _LOOK_AT, None) if not job.status.terminal]
            seconds = [seconds_left(job.left, job.rate, queued, rate) for job in active]
            known = [left for left in seconds if left is not None]
            if known:
                error.seconds = min(max(min(known), 1.0), _LONGEST_WAIT)
        raise
