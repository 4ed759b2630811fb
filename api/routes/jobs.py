"""/jobs: bulk generation, accepted durably, drained by the workers, readable while it runs."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Header, Path, Query, Request
from fastapi.responses import StreamingResponse

from api.errors import ApiError
from api.gateway import Gateway
from api.job_events import Events
from api.job_results import Results, record_line
from api.job_retry import retry
from api.routes.caller import caller, page
from api.submission import cancel
from workers.job import JobState, Record
from workers.progress import seconds_left
from workers.retention import delete

router = APIRouter(prefix="/jobs")

JobId = Annotated[str, Path(pattern=r"^(job|batch)_[0-9a-f]{32}$")]


@router.get("")
async def list_jobs(
    request: Request, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str | None = None
) -> dict[str, Any]:
    """The caller's jobs, newest first; `after` is the id of the last job of the page before."""
    gateway, key = caller(request)
    found = await gateway.ledger.jobs(key.tenant, limit + 1, after)
    return page([job_view(job) for job in found[:limit]], more=len(found) > limit)


@router.get("/{job_id}")
async def show(request: Request, job_id: JobId) -> dict[str, Any]:
    """One job."""
    gateway, key = caller(request)
    return await current_view(gateway, await gateway.job(key.tenant, job_id))


@router.delete("/{job_id}")
async def delete_job(request: Request, job_id: JobId) -> dict[str, Any]:
    """Delete a job that is over, with its input and results."""
    gateway, key = caller(request)
    job = await gateway.job(key.tenant, job_id)
    if not job.status.terminal:
        raise ApiError(
            409, f"{job_id} is {job.status.value}. Cancel it first; it can be deleted once it is over.",
            code="job_not_over", headers=((b"x-should-retry", b"false"),),
        )  # fmt: skip
    await delete(gateway.ledger, gateway.settings.data_dir, key.tenant, job_id)
    return {"id": job_id, "object": "job", "deleted": True}


@router.post("/{job_id}/retry", status_code=202)
async def retry_failed(request: Request, job_id: JobId) -> dict[str, Any]:
    """Run the items that did not complete again, as another job. Asking twice gives the same one."""
    gateway, key = caller(request)
    return await current_view(gateway, await retry(gateway, key, await gateway.job(key.tenant, job_id)))


@router.get("/{job_id}/events")
async def events(
    request: Request, job_id: JobId, last_event_id: Annotated[str | None, Header()] = None
) -> StreamingResponse:
    """Server-sent events: `progress`, each finished `item` as it comes, at the end `done`.

    A client that comes back with Last-Event-ID goes on after the last item that it saw.
    """
    gateway, key = caller(request)
    job = await gateway.job(key.tenant, job_id)

    async def view(state: JobState) -> dict[str, Any]:
        return await current_view(gateway, state)

    async def still_allowed() -> None:
        await gateway.keys.authenticate(request.headers.get("authorization", "").encode() or None)

    stream = Events(gateway.ledger, gateway.settings.data_dir, job, view, last_event_id)
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(
        stream.stream(still_allowed, gateway.settings.ping_interval), media_type="text/event-stream", headers=headers
    )


@router.post("/{job_id}/cancel")
async def cancel_job(request: Request, job_id: JobId) -> dict[str, Any]:
    """Stop a job; what is finished is kept. Cancelling one that is over changes nothing."""
    gateway, key = caller(request)
    job = await cancel(gateway, await gateway.job(key.tenant, job_id))
    return await current_view(gateway, job)


@router.get("/{job_id}/results")
async def results(request: Request, job_id: JobId, after: Annotated[int, Query(ge=-1)] = -1) -> StreamingResponse:
    """Finished items as NDJSON in input order, from the one after input index `after` on.

    While the job runs these are the items without a gap from the first one; ask again with the last index.
    """
    gateway, key = caller(request)
    job = await gateway.job(key.tenant, job_id)
    blocks = Results(gateway.ledger, gateway.settings.data_dir, job).blocks(after)
    first: list[Record] = await anext(blocks, [])  # what can't be read is told before the answer begins

    async def lines() -> AsyncIterator[bytes]:
        block = first
        while block:
            yield b"".join(orjson.dumps(record_line(record)) + b"\n" for record in block)
            block = await anext(blocks, [])

    return StreamingResponse(lines(), media_type="application/x-ndjson")


def job_view(job: JobState) -> dict[str, Any]:
    """A job as clients see it. Times are unix seconds or null."""
    names = (
        "created_at", "in_progress_at", "finalizing_at", "completed_at", "cancelled_at", "expired_at", "failed_at",
    )  # fmt: skip
    webhook = job.webhook and {
        "url": job.webhook, "status": job.webhook_status or "pending", "attempts": job.webhook_attempts,
        "error": job.webhook_error,
    }  # fmt: skip
    return {
        "id": job.id, "object": "job", "name": job.name, "status": job.status.value, "model": job.model,
        "endpoint": job.endpoint,
        "counts": {"total": job.total, "completed": job.completed, "failed": job.failed},
        "usage": {"input_tokens": job.input_tokens, "output_tokens": job.output_tokens},
        "priority": job.priority, "metadata": job.metadata, "completion_window": job.completion_window,
        "expires_at": job.deadline, "retry_of": job.retry_of, "retried_by": job.retried_by, "webhook": webhook,
        **{name: job.times.get(name) for name in names},
    }  # fmt: skip


async def current_view(gateway: Gateway, job: JobState) -> dict[str, Any]:
    """The same with `estimated_completion`: unix seconds, or null as long as nobody can say."""
    seconds = None
    if not job.status.terminal:
        queued, rate = await gateway.ledger.bulk()
        seconds = seconds_left(job.left, job.rate, queued, rate)
    return {**job_view(job), "estimated_completion": None if seconds is None else round(time.time() + seconds)}
