"""The bulk routes in the OpenAPI document: jobs, files, batches, webhooks."""

from __future__ import annotations

from typing import get_args

from pydantic import BaseModel

from api.intake_batch import BatchInput, Expiry
from api.job_input import InputItem, ItemInput, JobHead, JobInput, PromptItem
from api.openapi_parts import (
    BODY,
    JSON,
    MODEL,
    NULLABLE_TEXT,
    NUMBER,
    SECONDS,
    TEXT,
    Json,
    Own,
    deleted,
    listed,
    numbers,
    ref,
    shape,
)
from api.routes.submit import LINES_TYPE
from api.routes.webhooks import WebhookTest
from workers.files import Purpose
from workers.job import JobStatus

ROUTES = {
    ("post", "/jobs"): Own(
        "Job", (404, *BODY, 409, 429, 507), {JSON: "JobInput", LINES_TYPE: "JobLines"}, idempotent=True
    ),
    ("get", "/jobs"): Own("JobList", (404,)),
    ("get", "/jobs/{job_id}"): Own("Job", (404,)),
    ("delete", "/jobs/{job_id}"): Own("JobDeleted", (404, 409, 507)),
    ("post", "/jobs/{job_id}/retry"): Own("Job", (404, 409, 429, 507)),
    ("post", "/jobs/{job_id}/cancel"): Own("Job", (404, 507)),
    ("get", "/jobs/{job_id}/results"): Own("Results", (404, 507), media_type=LINES_TYPE),
    ("get", "/jobs/{job_id}/events"): Own("JobEvents", (404,), media_type="text/event-stream"),
    ("post", "/v1/files"): Own("File", (*BODY, 507), {"multipart/form-data": "FileInput"}),
    ("get", "/v1/files"): Own("FileList", (404, 507)),
    ("get", "/v1/files/{file_id}"): Own("File", (404, 507)),
    ("delete", "/v1/files/{file_id}"): Own("FileDeleted", (404, 507)),
    ("get", "/v1/files/{file_id}/content"): Own("FileContent", (404, 507), media_type="application/jsonl"),
    ("post", "/v1/batches"): Own("Batch", (404, *BODY, 409, 429, 507), {JSON: "BatchInput"}, idempotent=True),
    ("get", "/v1/batches"): Own("BatchList", (404, 507)),
    ("get", "/v1/batches/{batch_id}"): Own("Batch", (404, 507)),
    ("post", "/v1/batches/{batch_id}/cancel"): Own("Batch", (404, 507)),
    ("get", "/webhooks/secret"): Own("WebhookSecret", (507,)),
    ("post", "/webhooks/test"): Own("WebhookResult", (*BODY, 429, 507), {JSON: "WebhookTest"}),
}

BODIES: tuple[type[BaseModel], ...] = (
    JobInput, JobHead, ItemInput, PromptItem, InputItem, BatchInput, Expiry, WebhookTest,
)  # fmt: skip
"""What pydantic knows of the bodies of these routes."""

IDEMPOTENCY_KEY: Json = {
    "name": "Idempotency-Key", "in": "header", "required": False,
    "description": "The same key with the same request gives the same answer again; with another request, 409.",
    "schema": {**TEXT, "minLength": 1, "maxLength": 255, "pattern": "^[ -~]+$"},
}  # fmt: skip

_PAGES: Json = {"has_more": {"type": "boolean"}, "first_id": NULLABLE_TEXT, "last_id": NULLABLE_TEXT}
_COUNTS = numbers("total", "completed", "failed")
_LINES = """One JSON object a line: the job as in JSON but without its items, and then an item on each further line."""
_RESULTS = "One JSON object a line: `index`, `id`, `status` (completed or failed), `response`, `error`."
_EVENTS = """Server-sent events. `progress`: the job. `item`: a finished item as in the results, with an id for
Last-Event-ID. The last one is `done` with the job's `id` and `status`, or `error` with a `message`."""


def shapes() -> Json:
    """What these routes make by hand."""
    return {
        "Job": _job(), "JobList": listed("Job", _PAGES), "JobDeleted": deleted("job"),
        "JobLines": {**TEXT, "description": _LINES}, "Results": {"description": _RESULTS},
        "JobEvents": {"description": _EVENTS},
        "File": _file(), "FileList": listed("File", _PAGES), "FileDeleted": deleted("file"), "FileInput": _upload(),
        "FileContent": {"description": "The file's bytes; a batch's output has a JSON object a line."},
        "Batch": _batch(), "BatchList": listed("Batch", _PAGES),
        "WebhookSecret": shape({"secret": {**TEXT, "pattern": "^whsec_[0-9A-Za-z+/=]{44}$"}}),
        "WebhookResult": _sent(),
    }  # fmt: skip


def mend(schemas: Json) -> None:
    """Say what the models leave to code: what an item is depends on the job's endpoint."""
    ways = [ref(kind.__name__) for kind in (ItemInput, PromptItem, InputItem)]
    schemas["JobInput"]["properties"]["items"]["items"] = {"anyOf": ways}
    for name in ("JobInput", "JobHead"):
        schemas[name]["properties"]["model"] = MODEL
    for name in ("PromptItem", "InputItem"):
        schemas[name]["additionalProperties"] = True


def _job() -> Json:
    times = ("created", "in_progress", "finalizing", "completed", "cancelled", "expired", "failed")
    webhook = shape({
        "url": TEXT, "status": {"enum": ["pending", "delivered", "failed"]}, "attempts": {**NUMBER, "minimum": 0},
        "error": NULLABLE_TEXT,
    })  # fmt: skip
    job = shape({
        "id": {**TEXT, "pattern": "^(job|batch)_[0-9a-f]{32}$"}, "object": {"const": "job"}, "name": NULLABLE_TEXT,
        "status": {"enum": [status.value for status in JobStatus]}, "model": TEXT, "endpoint": TEXT,
        "counts": _COUNTS, "usage": numbers("input_tokens", "output_tokens"), "priority": NUMBER,
        "metadata": {"type": "object", "additionalProperties": TEXT}, "completion_window": NULLABLE_TEXT,
        "expires_at": SECONDS, "retry_of": NULLABLE_TEXT, "retried_by": NULLABLE_TEXT,
        "webhook": {**webhook, "type": ["object", "null"]}, **{f"{time}_at": SECONDS for time in times},
    })  # fmt: skip
    guess = "Unix seconds; null as long as nobody can say. Not in lists."
    job["properties"]["estimated_completion"] = {**SECONDS, "description": guess}
    return job


def _file() -> Json:
    return shape({
        "id": {**TEXT, "pattern": "^file-[0-9a-f]{32}$"}, "object": {"const": "file"}, "bytes": NUMBER,
        "created_at": NUMBER, "expires_at": SECONDS, "filename": TEXT, "purpose": {"enum": list(get_args(Purpose))},
        "status": {"const": "processed"}, "status_details": NULLABLE_TEXT,
    })  # fmt: skip


def _upload() -> Json:
    expiry = Expiry.model_json_schema()["properties"]
    upload = shape({"file": {**TEXT, "format": "binary"}, "purpose": {"const": "batch"}})
    upload["properties"] |= {f"expires_after[{name}]": expiry[name] for name in Expiry.model_fields}
    return {**upload, "additionalProperties": True}


def _batch() -> Json:
    fault = shape({"code": TEXT, "line": {"type": ["integer", "null"]}, "message": TEXT, "param": NULLABLE_TEXT})
    faults = shape({"object": {"const": "list"}, "data": {"type": "array", "items": fault}})
    tokens = {
        **numbers("input_tokens", "output_tokens", "total_tokens")["properties"],
        "input_tokens_details": numbers("cached_tokens"), "output_tokens_details": numbers("reasoning_tokens"),
    }  # fmt: skip
    states = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    return shape({
        "id": {**TEXT, "pattern": "^batch_[0-9a-f]{32}$"}, "object": {"const": "batch"}, "endpoint": TEXT,
        "model": NULLABLE_TEXT, "errors": {**faults, "type": ["object", "null"]}, "input_file_id": TEXT,
        "completion_window": TEXT, "status": {"enum": list(states)}, "output_file_id": NULLABLE_TEXT,
        "error_file_id": NULLABLE_TEXT, "created_at": NUMBER, "expires_at": SECONDS,
        **{f"{state}_at": SECONDS for state in states}, "request_counts": _COUNTS, "usage": shape(tokens),
        "metadata": {"type": ["object", "null"], "additionalProperties": TEXT},
    })  # fmt: skip


def _sent() -> Json:
    return shape({
        "delivered": {"type": "boolean"}, "status_code": {"type": ["integer", "null"]}, "error": NULLABLE_TEXT,
        "seconds": {"type": "number", "minimum": 0},
    })  # fmt: skip
