"""/jobs: bulk generation, accepted durably, drained by the workers, readable while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse

from api.asgi import read_body
from api.gateway import Gateway
from api.job_input import parse_job
from api.job_results import Results, record_line
from api.keys import Key
from api.metrics import Refusal
from workers.errors import LedgerUnavailable, QuotaExceeded
from workers.job import BulkQuota, JobState
from workers.store import JobFiles

router = APIRouter(prefix="/jobs")

JobId = Annotated[str, Path(pattern=r"^job_[0-9a-f]{32}$")]


@router.post("", status_code=202)
async def submit(request: Request) -> JSONResponse:
    """Accept a job: 202 once it is on the disk and in the ledger."""
    gateway, key = _context(request)
    body = await read_body(request.receive, gateway.settings.max_job_bytes, gateway.settings.body_timeout)
    spec, items = await parse_job(body, key, gateway)
    quota = BulkQuota(key.bulk_jobs or 0, key.bulk_items or 0, key.bulk_tokens or 0)
    files = JobFiles(gateway.settings.data_dir, key.tenant, spec.id)
    try:
        await gateway.ledger.require_room(spec, quota)
        await asyncio.to_thread(files.create, spec, items)
        await gateway.ledger.submit(spec, quota)
    except QuotaExceeded as error:  # the second time if others came first: then the files go again
        await asyncio.to_thread(files.remove)
        gateway.metrics.refused(Refusal(f"bulk_{error.what}"))
        raise
    await _ring(gateway, pending=-(-spec.total // spec.shard_items))
    return JSONResponse(job_view(await gateway.ledger.job(key.tenant, spec.id)), status_code=202)


@router.get("")
async def list_jobs(
    request: Request, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str | None = None
) -> dict[str, Any]:
    """The caller's jobs, newest first; `after` is the id of the last job of the page before."""
    gateway, key = _context(request)
    found = await gateway.ledger.jobs(key.tenant, limit + 1, after)
    page = [job_view(job) for job in found[:limit]]
    return {
        "object": "list", "data": page, "has_more": len(found) > limit,
        "first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None,
    }  # fmt: skip


@router.get("/{job_id}")
async def show(request: Request, job_id: JobId) -> dict[str, Any]:
    """One job."""
    gateway, key = _context(request)
    return job_view(await gateway.ledger.job(key.tenant, job_id))


@router.post("/{job_id}/cancel")
async def cancel(request: Request, job_id: JobId) -> dict[str, Any]:
    """Stop a job; what is finished is kept. Cancelling one that is over changes nothing."""
    gateway, key = _context(request)
    await gateway.ledger.job(key.tenant, job_id)
    await gateway.ledger.cancel(job_id)
    await _ring(gateway, pending=1)
    return job_view(await gateway.ledger.job(key.tenant, job_id))


@router.get("/{job_id}/results")
async def results(request: Request, job_id: JobId, after: Annotated[int, Query(ge=-1)] = -1) -> StreamingResponse:
    """Finished items as NDJSON in input order, from the one after input index `after` on.

    While the job runs these are the items without a gap from the first one; ask again with the last index.
    """
    gateway, key = _context(request)
    job = await gateway.ledger.job(key.tenant, job_id)
    blocks = Results(gateway.ledger, gateway.settings.data_dir, job).blocks(after)

    async def lines() -> AsyncIterator[bytes]:
        async for block in blocks:
            yield b"".join(orjson.dumps(record_line(record)) + b"\n" for record in block)

    return StreamingResponse(lines(), media_type="application/x-ndjson")


def job_view(job: JobState) -> dict[str, Any]:
    """A job as clients see it. Times are unix seconds or null."""
    names = ("created_at", "in_progress_at", "finalizing_at", "completed_at", "cancelled_at", "expired_at")
    return {
        "id": job.id, "object": "job", "name": job.name, "status": job.status.value, "model": job.model,
        "endpoint": job.endpoint,
        "counts": {"total": job.total, "completed": job.completed, "failed": job.failed},
        "usage": {"input_tokens": job.input_tokens, "output_tokens": job.output_tokens},
        **{name: job.times.get(name) for name in names},
    }  # fmt: skip


async def _ring(gateway: Gateway, pending: int) -> None:
    """Wake workers now. If that fails the sweeper does it later: the job is accepted all the same."""
    with suppress(LedgerUnavailable):
        await gateway.sweeper.ring(pending)


def _context(request: Request) -> tuple[Gateway, Key]:
    return request.app.state.gateway, request.state.key
