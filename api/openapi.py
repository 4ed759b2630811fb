"""GET /openapi.json, if VELOCITY_DOCS: FastAPI's routes and those that bypass it, with the errors that they give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import orjson
from fastapi import FastAPI, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from api import request_caps
from api.intake_batch import BatchInput
from api.job_input import ItemInput, JobInput
from api.keys import ANYONE, Key, Terms
from api.metrics import installed_version
from api.routes.admin import NewKey, Rotation, key_view
from api.settings import ApiSettings
from engine.client import Endpoint
from workers.job import JobStatus

Json = dict[str, Any]

PATH = "/openapi.json"

_ABOUT = """One vLLM engine for interactive streams and bulk jobs.

Errors are OpenAI's error object everywhere. Requests to the engine keep fields that are not named here."""

_WHY = {
    400: "Something in the request is not as it must be; `param` names it where one field is at fault.",
    401: "No API key, or not a valid one.",
    403: "The key lacks the scope, or may not use the model.",
    404: "There is no such thing, or it is somebody else's.",
    408: "The request's body did not come in time.",
    409: "The key has been ended for good, or its Idempotency-Key came before with another request.",
    413: "The request's body is too large.",
    415: "The request's body is compressed.",
    429: "Over a limit of the key, or over its quota for jobs.",
    431: "Too many headers, or too large ones.",
    500: "A fault of velocity's own.",
    502: "The engine broke off, or said something that can't be understood.",
    503: "The engine or Redis is away; try again after the seconds in Retry-After.",
    504: "The engine was too slow.",
    507: "The data directory can't be written or read.",
}
_ALWAYS = (400, 401, 403, 415, 431, 500, 503)
_BODY = (408, 413)


@dataclass(frozen=True, slots=True)
class _Own:
    """What FastAPI can't see in one of its routes."""

    answer: str
    """Name of the schema of a good answer."""
    errors: tuple[int, ...] = ()
    """Beyond those of every route."""
    body: str | None = None
    """Name of the schema of the request's body, which the route reads by hand."""
    body_required: bool = True
    body_type: str = "application/json"
    media_type: str = "application/json"


_OWN = {
    ("get", "/health"): _Own("Health"),
    ("get", "/v1/models"): _Own("ModelList"),
    ("get", "/v1/models/{name}"): _Own("Model", (404,)),
    ("get", "/v1/usage"): _Own("UsageList", (507,)),
    ("post", "/jobs"): _Own("Job", (404, *_BODY, 409, 429, 507), body="JobInput"),
    ("get", "/jobs"): _Own("JobList", (404,)),
    ("get", "/jobs/{job_id}"): _Own("Job", (404,)),
    ("post", "/jobs/{job_id}/cancel"): _Own("Job", (404,)),
    ("get", "/jobs/{job_id}/results"): _Own("Results", (404, 507), media_type="application/x-ndjson"),
    ("post", "/v1/files"): _Own("File", (*_BODY, 507), body="FileInput", body_type="multipart/form-data"),
    ("get", "/v1/files"): _Own("FileList", (404, 507)),
    ("get", "/v1/files/{file_id}"): _Own("File", (404, 507)),
    ("delete", "/v1/files/{file_id}"): _Own("FileDeleted", (404, 507)),
    ("get", "/v1/files/{file_id}/content"): _Own("FileContent", (404, 507), media_type="application/jsonl"),
    ("post", "/v1/batches"): _Own("Batch", (404, *_BODY, 409, 429, 507), body="BatchInput"),
    ("get", "/v1/batches"): _Own("BatchList", (404, 507)),
    ("get", "/v1/batches/{batch_id}"): _Own("Batch", (404, 507)),
    ("post", "/v1/batches/{batch_id}/cancel"): _Own("Batch", (404, 507)),
    ("post", "/admin/keys"): _Own("KeyWithText", (*_BODY, 507), body="NewKey"),
    ("get", "/admin/keys"): _Own("KeyList", (507,)),
    ("get", "/admin/keys/{key_id}"): _Own("Key", (404, 507)),
    ("patch", "/admin/keys/{key_id}"): _Own("Key", (404, *_BODY, 409, 507), body="KeyChanges"),
    ("post", "/admin/keys/{key_id}/revoke"): _Own("Key", (404, 507)),
    ("post", "/admin/keys/{key_id}/rotate"): _Own(
        "KeyWithText", (404, *_BODY, 409, 507), body="Rotation", body_required=False
    ),
    ("get", PATH): _Own("Document"),
}

_TEXT: Json = {"type": "string"}
_NUMBER: Json = {"type": "integer"}
_OBJECT: Json = {"type": "object", "additionalProperties": True}
_MODEL: Json = {**_TEXT, "minLength": 1, "description": "A name from /v1/models; `vllm/` or `openai/` may precede it."}
_SECONDS: Json = {"type": ["integer", "null"], "description": "Unix seconds."}


def add_route(app: FastAPI, settings: ApiSettings) -> None:
    """Serve the document of what `app` has by now; the gate asks for a key as everywhere."""

    async def show_document() -> Response:
        """This document."""
        return Response(body, media_type="application/json")

    app.add_api_route(PATH, show_document)
    body = orjson.dumps(document(app, settings))


def document(app: FastAPI, settings: ApiSettings) -> Json:
    """The OpenAPI 3.1 document."""
    content = get_openapi(title="velocity", version=installed_version(), description=_ABOUT, routes=app.routes)
    for path, operations in content["paths"].items():
        for method, operation in operations.items():
            _mend(operation, _OWN.get((method, path), _Own("Anything")))
    content["paths"]["/health"]["get"]["security"] = []
    content["paths"]["/health"]["get"]["responses"] = _health_answers()
    for endpoint in Endpoint:
        content["paths"][endpoint.value] = {"post": _passed_on(endpoint, settings)}
    content["components"] = {
        "schemas": {**_model_schemas(), **_shapes()},
        "responses": {str(status): _error_answer(status) for status in _WHY},
        "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "description": "A key: `vk_…`."}},
    }
    content["security"] = [{"bearer": []}]
    return content


def _mend(operation: Json, own: _Own) -> None:
    """FastAPI documents its own errors, and sees neither bodies that are read by hand nor what a dict holds."""
    good = next(status for status in operation["responses"] if status.startswith("2"))
    answer = {"description": "Done.", "content": {own.media_type: {"schema": _ref(own.answer)}}}
    operation["responses"] = {good: answer, **_errors(*own.errors)}
    if own.body:
        content = {own.body_type: {"schema": _ref(own.body)}}
        operation["requestBody"] = {"required": own.body_required, "content": content}


def _passed_on(endpoint: Endpoint, settings: ApiSettings) -> Json:
    """A route whose bytes go to the engine and back."""
    name = endpoint.removeprefix("/v1/").replace("/", "_")
    content: Json = {"application/json": {"schema": _OBJECT}}
    if endpoint is not Endpoint.EMBEDDINGS:
        content["text/event-stream"] = {"schema": {"description": "The engine's own events, if `stream`."}}
    return {
        "summary": name.replace("_", " ").capitalize(),
        "operationId": name,
        "description": "The engine's answer as it is. Fields that reach into the engine itself are dropped.",
        "requestBody": {"required": True, "content": {"application/json": {"schema": _request(endpoint, settings)}}},
        "responses": {
            "200": {"description": "Done, or begun: a stream.", "content": content},
            **_errors(404, *_BODY, 429, 502, 504),
        },
    }


def _request(endpoint: Endpoint, settings: ApiSettings) -> Json:
    """The fields of a request that velocity looks at."""
    limit = {"type": ["integer", "null"], "minimum": 1}
    few = {"type": ["integer", "null"], "minimum": 1, "maximum": settings.max_n}
    logprobs = {"type": ["integer", "null"], "minimum": 0, "maximum": request_caps.MAX_LOGPROBS}
    binding = {"type": ["object", "null"], "description": f"At most {settings.max_schema_bytes:,} bytes."}
    words = {**_TEXT, "maxLength": request_caps.MAX_STOP_CHARACTERS}
    tool = {"type": "object", "description": f"At most {settings.max_tool_bytes:,} bytes."}
    tools = {"type": ["array", "null"], "items": tool, "maxItems": request_caps.MAX_TOOLS}
    message = {"type": "object", "properties": {"role": _TEXT}, "required": ["role"]}
    tokens = {"type": "array", "items": {**_NUMBER, "minimum": 0}, "minItems": 1}
    generation = {
        "stream": {"type": ["boolean", "null"]}, "stream_options": {"type": ["object", "null"]}, "n": few,
        "stop": {"anyOf": [words, {"type": "array", "items": words, "maxItems": request_caps.MAX_STOPS},
                           {"type": "null"}]},
        "response_format": binding, "structured_outputs": binding, "prompt_logprobs": logprobs, "max_tokens": limit,
    }  # fmt: skip
    one: list[Json] = [{**_TEXT, "minLength": 1}, tokens]
    several = [{"type": "array", "items": way, "minItems": 1, "maxItems": request_caps.MAX_PROMPTS} for way in one]
    prompt: Json = {"anyOf": [*one, *several]}
    fields: dict[Endpoint, Json] = {
        Endpoint.CHAT: {
            **generation, "messages": {"type": "array", "items": message, "minItems": 1}, "tools": tools,
            "max_completion_tokens": limit, "logprobs": {"type": ["boolean", "null"]}, "top_logprobs": logprobs,
        },
        Endpoint.COMPLETIONS: {**generation, "prompt": prompt, "best_of": few, "logprobs": logprobs},
        Endpoint.RESPONSES: {
            "input": {"anyOf": [_TEXT, {"type": "array", "items": _OBJECT, "minItems": 1}]}, "tools": tools,
            "stream": generation["stream"], "text": binding, "top_logprobs": logprobs, "max_output_tokens": limit,
        },
        Endpoint.EMBEDDINGS: {"input": prompt},
    }  # fmt: skip
    content = next(name for name in ("messages", "prompt", "input") if name in fields[endpoint])
    properties = {"model": _MODEL, **fields[endpoint]}
    return {"type": "object", "properties": properties, "required": ["model", content], "additionalProperties": True}


def _model_schemas() -> Json:
    """What pydantic knows."""
    validated: tuple[type[BaseModel], ...] = (JobInput, ItemInput, BatchInput, Terms, NewKey, Rotation)
    modes: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = [
        *((model, "validation") for model in validated), (Key, "serialization"),
    ]  # fmt: skip
    schemas: Json = models_json_schema(modes, ref_template="#/components/schemas/{model}")[1]["$defs"]
    job = schemas["JobInput"]["properties"]
    job["items"]["items"], job["model"] = _ref("ItemInput"), _MODEL
    changes = schemas.pop("Terms")["properties"]
    for field in changes.values():
        field.pop("default", None)  # what is not named is not changed
    schemas["KeyChanges"] = _shape(changes, required=False)
    known = schemas["Key"]["properties"]
    more = {"object": {"const": "key"}, "usable": {"type": "boolean", "description": "Whether it opens anything now."}}
    view = _shape({name: known.get(name) or more[name] for name in key_view(ANYONE)})
    text = {**_TEXT, "description": "The key itself, shown this once."}
    return {**schemas, "Key": view, "KeyWithText": _shape({"key": text, **view["properties"]})}


def _shapes() -> Json:
    """What the routes make by hand."""
    nullable_text = {"type": ["string", "null"]}
    error = _shape({"message": _TEXT, "type": _TEXT, "param": nullable_text, "code": nullable_text})
    model = {
        "id": _TEXT, "object": {"const": "model"}, "created": _NUMBER, "owned_by": _TEXT,
        "max_model_len": {"type": ["integer", "null"]},
    }  # fmt: skip
    job = {
        "id": {**_TEXT, "pattern": "^job_[0-9a-f]{32}$"}, "object": {"const": "job"}, "name": nullable_text,
        "status": {"enum": [status.value for status in JobStatus]}, "model": _TEXT, "endpoint": _TEXT,
        "counts": _numbers("total", "completed", "failed"), "usage": _numbers("input_tokens", "output_tokens"),
        "created_at": _SECONDS, "in_progress_at": _SECONDS, "finalizing_at": _SECONDS, "completed_at": _SECONDS,
        "cancelled_at": _SECONDS, "expired_at": _SECONDS,
    }  # fmt: skip
    used = _numbers("requests", "input_tokens", "output_tokens", "refused")
    usage = {
        "object": {"const": "usage"}, "key": _TEXT, "date": {**_TEXT, "format": "date"}, "interactive": used,
        "bulk": used,
    }  # fmt: skip
    pages = {"has_more": {"type": "boolean"}, "first_id": nullable_text, "last_id": nullable_text}
    file = {
        "id": {**_TEXT, "pattern": "^file-[0-9a-f]{32}$"}, "object": {"const": "file"}, "bytes": _NUMBER,
        "created_at": _NUMBER, "expires_at": _SECONDS, "filename": _TEXT,
        "purpose": {"enum": ["batch", "batch_output"]}, "status": {"const": "processed"}, "status_details": nullable_text,
    }  # fmt: skip
    upload = {"file": {**_TEXT, "format": "binary"}, "purpose": {"const": "batch"}}
    fault = _shape({"code": _TEXT, "line": {"type": ["integer", "null"]}, "message": _TEXT, "param": nullable_text})
    faults = _shape({"object": {"const": "list"}, "data": {"type": "array", "items": fault}})
    faults["type"] = ["object", "null"]
    tokens = {
        **_numbers("input_tokens", "output_tokens", "total_tokens")["properties"],
        "input_tokens_details": _numbers("cached_tokens"), "output_tokens_details": _numbers("reasoning_tokens"),
    }  # fmt: skip
    moments = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    states = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    batch = {
        "id": {**_TEXT, "pattern": "^batch_[0-9a-f]{32}$"}, "object": {"const": "batch"}, "endpoint": _TEXT,
        "model": nullable_text, "errors": faults, "input_file_id": _TEXT, "completion_window": _TEXT,
        "status": {"enum": list(states)}, "output_file_id": nullable_text, "error_file_id": nullable_text,
        "created_at": _NUMBER, "expires_at": _SECONDS, **{f"{moment}_at": _SECONDS for moment in moments},
        "request_counts": _numbers("total", "completed", "failed"), "usage": _shape(tokens),
        "metadata": {"type": ["object", "null"], "additionalProperties": _TEXT},
    }  # fmt: skip
    results = "One JSON object a line: `index`, `id`, `status` (completed or failed), `response`, `error`."
    return {
        "Error": _shape({"error": error}),
        "Model": _shape(model), "ModelList": _list("Model"),
        "Job": _shape(job), "JobList": _list("Job", pages),
        "Results": {"description": results},
        "File": _shape(file), "FileList": _list("File", pages),
        "FileInput": {**_shape(upload), "additionalProperties": True},
        "FileDeleted": _shape({"id": _TEXT, "object": {"const": "file"}, "deleted": {"const": True}}),
        "FileContent": {"description": "The file's lines."}, "Batch": _shape(batch), "BatchList": _list("Batch", pages),
        "KeyList": _list("Key"),
        "Usage": _shape(usage), "UsageList": _list("Usage"),
        "Health": {"type": "object", "properties": {"status": {"enum": ["ok", "degraded", "unavailable"]}},
                   "required": ["status"], "additionalProperties": _TEXT},
        "Document": {**_OBJECT, "description": "OpenAPI 3.1."},
        "Anything": {},
    }  # fmt: skip


def _shape(properties: Json, *, required: bool = True) -> Json:
    """An object with just these properties, all of them there unless not `required`."""
    shape: Json = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**shape, "required": list(properties)} if required else shape


def _numbers(*names: str) -> Json:
    return _shape({name: {**_NUMBER, "minimum": 0} for name in names})


def _list(of: str, more: Json | None = None) -> Json:
    return _shape({"object": {"const": "list"}, "data": {"type": "array", "items": _ref(of)}, **(more or {})})


def _health_answers() -> Json:
    content = {"application/json": {"schema": _ref("Health")}}
    return {
        "200": {"description": "Chat can be served; `degraded` if bulk work suffers.", "content": content},
        "503": {"description": "Chat can't be served.", "content": content},
        **{status: answer for status, answer in _errors().items() if status in {"400", "415", "431", "500"}},
    }


def _errors(*more: int) -> Json:
    return {str(status): {"$ref": f"#/components/responses/{status}"} for status in sorted({*_ALWAYS, *more})}


def _error_answer(status: int) -> Json:
    answer: Json = {"description": _WHY[status], "content": {"application/json": {"schema": _ref("Error")}}}
    if status in {429, 503}:
        seconds = {"description": "Seconds after which to try again.", "schema": {**_NUMBER, "minimum": 0}}
        answer["headers"] = {"Retry-After": seconds}
    return answer


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}
