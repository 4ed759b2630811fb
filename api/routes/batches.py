"""/v1/batches: bulk jobs as OpenAI has them, from an uploaded file to two output files."""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request

from api import shape
from api.asgi import read_body
from api.errors import ApiError
from api.gateway import Gateway
from api.intake_batch import BatchInput, Fault, fault_of, first_model, write_batch
from api.intake_lines import Lines, checked
from api.job_input import window_seconds
from api.keys import Key
from api.routes.caller import caller, page
from api.routes.submit import idempotency_of
from api.submission import cancel, fail, require_room, submit, written
from engine.client import Model
from workers.errors import NoSuchFile, NoSuchJob
from workers.files import File, Files, output_id
from workers.job import JobSpec, JobState, JobStatus, new_id
from workers.store import JobFiles

router = APIRouter(prefix="/v1/batches")

BatchId = Annotated[str, Path(pattern=r"^batch_[0-9a-f]{32}$")]
_BODY_MOST = 128 * 1024
_STATUS = {
    JobStatus.QUEUED: "in_progress",
    JobStatus.EXPIRING: "finalizing",
    JobStatus.FAILING: "in_progress",
}
"""States that are velocity's own, by OpenAI's name; the others have the same."""
_TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
_REFUSED = frozenset({400, 403, 404})
"""With these a model can't be used: the batch fails, and says why."""


@router.post("")
async def create_batch(request: Request) -> dict[str, Any]:
    """Make a batch from an uploaded file: 200 once it is on the disk and in the ledger."""
    gateway, key = caller(request)
    settings = gateway.settings
    idempotency = idempotency_of(request)
    body = await read_body(request.receive, _BODY_MOST, settings.body_timeout)
    given = checked(BatchInput, shape.parse(body), "", "")
    file, lines = await _input(gateway, key, given.input_file_id)
    expiry, now = given.output_expires_after, time.time()
    spec = JobSpec(
        id=new_id("batch"), tenant=key.tenant, account=key.id, endpoint=given.endpoint.value, model="",
        total=file.lines, shard_items=settings.shard_items, created=now,
        deadline=int(now) + window_seconds(given.completion_window), completion_window=given.completion_window,
        metadata=given.metadata or {}, input_file=file.id,
        output_expires_after=None if expiry is None else expiry.seconds, idempotency=idempotency,
        digest=_digest(request, body) if idempotency else None,
    )  # fmt: skip
    await gateway.pressure.require_room(file.bytes)
    job = await require_room(gateway, key, spec)
    if job is None:
        job = await _make(gateway, key, spec, lines, file)
    return await _view(gateway, job)


@router.get("")
async def list_batches(
    request: Request, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str | None = None
) -> dict[str, Any]:
    """The caller's batches, newest first; `after` is the id of the last batch of the page before."""
    gateway, key = caller(request)
    found = await gateway.ledger.jobs(key.tenant, limit + 1, after, "batches")
    data = [await _view(gateway, job) for job in found[:limit]]
    return page(data, more=len(found) > limit)


@router.get("/{batch_id}")
async def show_batch(request: Request, batch_id: BatchId) -> dict[str, Any]:
    """One batch."""
    gateway, key = caller(request)
    return await _view(gateway, await _batch(gateway, key, batch_id))


@router.post("/{batch_id}/cancel")
async def cancel_batch(request: Request, batch_id: BatchId) -> dict[str, Any]:
    """Stop a batch; what is finished is kept. Cancelling one that is over changes nothing."""
    gateway, key = caller(request)
    return await _view(gateway, await cancel(gateway, await _batch(gateway, key, batch_id)))


async def _input(gateway: Gateway, key: Key, file_id: str) -> tuple[File, Lines]:
    files = Files(gateway.settings.data_dir)
    try:
        file = await asyncio.to_thread(files.get, key.tenant, file_id)
    except NoSuchFile as error:
        text = f"{error} Upload it to /v1/files with the purpose 'batch'."
        raise ApiError(404, text, code="not_found", param="input_file_id") from None
    if file.purpose != "batch":
        text = f"The file {file_id!r} has the purpose {file.purpose!r}: upload one with the purpose 'batch'."
        raise ApiError(400, text, param="input_file_id")
    return file, Lines(files.source(file), file.lines, gateway.settings.max_body_bytes)


async def _make(gateway: Gateway, key: Key, spec: JobSpec, lines: Lines, file: File) -> JobState:
    """The batch, entered: to be worked on, or failed at once because its input is not what it must be."""
    name = await gateway.intake.run(0, first_model, lines)
    model: Model | None = None
    faults: list[Fault] = []
    try:
        model = await gateway.watch.resolve(name, key)
    except ApiError as error:
        if error.status not in _REFUSED:
            raise
        faults = [fault_of(error.code or "invalid_request", 1, str(error), "body.model")]
    if model is not None:
        spec = spec.model_copy(update={"model": model.id})
        making = gateway.intake.run(file.bytes, write_batch, lines, spec, name, model, key, gateway.settings)
        spec, faults = await written(gateway, spec, making)
    return await (fail(gateway, spec, faults) if faults else submit(gateway, key, spec))


async def _batch(gateway: Gateway, key: Key, batch_id: str) -> JobState:
    try:
        return await gateway.job(key.tenant, batch_id)
    except NoSuchJob:
        raise ApiError(404, f"There is no batch {batch_id!r}.", code="not_found", param="batch_id") from None


async def _view(gateway: Gateway, job: JobState) -> dict[str, Any]:
    """A batch as clients see it. Times are unix seconds or null."""
    errors = None
    if job.status is JobStatus.FAILED:
        outcome = await asyncio.to_thread(JobFiles(gateway.settings.data_dir, job.tenant, job.id).outcome)
        errors = outcome.errors if outcome else None
    return batch_view(job, errors)


def batch_view(job: JobState, errors: list[Fault] | None) -> dict[str, Any]:
    """A batch as clients see it. Times are unix seconds or null."""
    created = job.times["created_at"]
    times = {f"{name}_at": job.times.get(f"{name}_at") for name in _TIMES}
    if job.status is not JobStatus.FAILED and times["in_progress_at"] is None:
        times["in_progress_at"] = created
    over = job.status.terminal
    return {
        "id": job.id, "object": "batch", "endpoint": job.endpoint, "model": job.model or None,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": job.input_file, "completion_window": job.completion_window,
        "status": _STATUS.get(job.status, job.status.value),
        "output_file_id": output_id(job.id, created, "output") if over and job.completed else None,
        "error_file_id": output_id(job.id, created, "error") if over and job.failed else None,
        "created_at": created, "expires_at": job.deadline, **times,
        "request_counts": {"total": job.total, "completed": job.completed, "failed": job.failed},
        "usage": {
            "input_tokens": job.input_tokens, "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": job.output_tokens, "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": job.input_tokens + job.output_tokens,
        },
        "metadata": dict(job.metadata) or None,
    }  # fmt: skip


def _digest(request: Request, body: bytes) -> str:
    kind = request.headers.get("content-type", "").encode()
    return hashlib.sha256(kind + b"\n" + body).hexdigest()
