"""POST /jobs: bulk generation, accepted durably."""

from __future__ import annotations

import hashlib
import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from api.errors import ApiError
from api.gateway import Gateway
from api.intake import Intake
from api.intake_lines import Lines
from api.job_input import JobHead, JobLines, read_head, split_job, window_seconds, write_job
from api.keys import Key
from api.routes.jobs import current_view
from api.submission import require_capacity, require_room, submit, written
from api.upload import Upload, receive_body
from workers.files import Files
from workers.job import JobSpec, new_id
from workers.webhooks import check_url

router = APIRouter(prefix="/jobs")

LINES_TYPE = "application/x-ndjson"


@router.post("", status_code=202)
async def submit_job(request: Request) -> JSONResponse:
    """Accept a job: 202 once it is on the disk and in the ledger.

    One JSON object; or, as application/x-ndjson, that object without its items and then an item a line.
    """
    gateway: Gateway = request.app.state.gateway
    key: Key = request.state.key
    settings, kind = gateway.settings, request.headers.get("content-type", "")
    idempotency = idempotency_of(request)
    as_lines = kind.partition(";")[0].strip().lower() == LINES_TYPE
    most = settings.max_file_bytes if as_lines else settings.max_job_bytes
    await require_capacity(gateway, request, most)
    async with receive_body(request.receive, Files(settings.data_dir), settings, most, kind.encode()) as upload:
        intake = gateway.intake
        head, source = await _read(upload, intake, as_lines=as_lines, longest=settings.max_body_bytes)
        if head.webhook is not None:
            check_url(head.webhook, settings.webhook_allow)
        model = await gateway.watch.resolve(head.model, key)
        spec = JobSpec(
            **_asked(head), id=new_id("job"), tenant=key.tenant, account=key.id, model=model.id,
            total=source.lines.last - 1, shard_items=settings.shard_items, idempotency=idempotency,
            digest=upload.digest if idempotency else None,
        )  # fmt: skip
        job = await require_room(gateway, key, spec)
        if job is None:
            spec = await written(
                gateway, spec, intake.run(upload.size, write_job, source, head, spec, model, key, settings)
            )
            job = await submit(gateway, key, spec)
    return JSONResponse(await current_view(gateway, job), status_code=202)


async def _read(upload: Upload, intake: Intake, *, as_lines: bool, longest: int) -> tuple[JobHead, JobLines]:
    if as_lines:
        return await intake.run(upload.size, read_head, Lines(upload.content, upload.lines, longest))
    return await intake.run(upload.size, split_job, upload.content, upload.directory / "lines")


def _asked(head: JobHead) -> dict[str, Any]:
    """The job's own wishes, as its spec has them."""
    now, window = time.time(), head.completion_window
    return {
        **head.model_dump(include={"name", "completion_window", "max_error_rate", "priority", "webhook"}),
        "endpoint": head.endpoint.value,
        "metadata": head.metadata or {},
        "created": now,
        "deadline": int(now) + window_seconds(window) if window else None,
    }


def idempotency_of(request: Request) -> str | None:
    """Digest of the Idempotency-Key. Raises ApiError 400 for one that is not 1 to 255 printable characters."""
    given = request.headers.get("idempotency-key")
    if given is None:
        return None
    if not (1 <= len(given) <= 255 and given.isascii() and given.isprintable()):
        raise ApiError(
            400, "The Idempotency-Key must have 1 to 255 printable ASCII characters.", param="Idempotency-Key"
        )  # fmt: skip
    return hashlib.sha256(given.encode()).hexdigest()
