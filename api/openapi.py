"""GET /openapi.json, if VELOCITY_DOCS: FastAPI's routes and those that bypass it, with the errors that they give."""

from __future__ import annotations

from typing import Literal

import orjson
from fastapi import FastAPI, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from api import openapi_bulk, request_caps
from api.keys import ANYONE, Key, Terms
from api.metrics import installed_version
from api.openapi_parts import (
    BODY,
    JSON,
    MODEL,
    NULLABLE_TEXT,
    NUMBER,
    OBJECT,
    TEXT,
    Json,
    Own,
    listed,
    numbers,
    ref,
    shape,
)
from api.routes.admin import NewKey, Rotation, key_view
from api.settings import ApiSettings
from engine.client import Endpoint

PATH = "/openapi.json"

_ABOUT = """One vLLM engine for interactive streams and bulk jobs.

Errors are OpenAI's error object everywhere. Requests to the engine keep fields that are not named here."""

_WHY = {
    400: "Something in the request is not as it must be; `param` names it where one field is at fault.",
    401: "No API key, or not a valid one.",
    403: "The key lacks the scope, or may not use the model.",
    404: "There is no such thing, or it is somebody else's.",
    408: "The request's body did not come in time.",
    409: "The key has been ended, the Idempotency-Key came with another request, or the job's status rules this out.",
    413: "The request's body is too large.",
    415: "The request's body is compressed.",
    429: "Over a limit of the key, or over its quota for jobs; no Retry-After if it can never fit.",
    431: "Too many headers, or too large ones.",
    500: "A fault of velocity's own.",
    502: "The engine broke off, or said something that can't be understood.",
    503: "The engine or Redis is away, or too much bulk work waits; try again after the seconds in Retry-After.",
    504: "The engine was too slow.",
    507: "The data directory can't be written or read, or is full.",
}
_ALWAYS = (400, 401, 403, 415, 431, 500, 503)

_OWN = {
    ("get", "/health"): Own("Health"),
    ("get", "/v1/models"): Own("ModelList"),
    ("get", "/v1/models/{name}"): Own("Model", (404,)),
    ("get", "/v1/usage"): Own("UsageList", (507,)),
    **openapi_bulk.ROUTES,
    ("post", "/admin/keys"): Own("KeyWithText", (*BODY, 507), {JSON: "NewKey"}),
    ("get", "/admin/keys"): Own("KeyList", (507,)),
    ("get", "/admin/keys/{key_id}"): Own("Key", (404, 507)),
    ("patch", "/admin/keys/{key_id}"): Own("Key", (404, *BODY, 409, 507), {JSON: "KeyChanges"}),
    ("post", "/admin/keys/{key_id}/revoke"): Own("Key", (404, 507)),
    ("post", "/admin/keys/{key_id}/rotate"): Own(
        "KeyWithText", (404, *BODY, 409, 507), {JSON: "Rotation"}, body_required=False
    ),
    ("get", PATH): Own("Document"),
}


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
            _mend(operation, _OWN.get((method, path), Own("Anything")))
    content["paths"]["/health"]["get"]["security"] = []
    content["paths"]["/health"]["get"]["responses"] = _health_answers()
    for endpoint in Endpoint:
        content["paths"][endpoint.value] = {"post": _passed_on(endpoint, settings)}
    content["components"] = {
        "schemas": {**_model_schemas(), **_shapes(), **openapi_bulk.shapes()},
        "responses": {str(status): _error_answer(status) for status in _WHY},
        "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "description": "A key: `vk_…`."}},
    }
    content["security"] = [{"bearer": []}]
    return content


def _mend(operation: Json, own: Own) -> None:
    """FastAPI documents its own errors, and sees neither bodies that are read by hand nor what a dict holds."""
    good = next(status for status in operation["responses"] if status.startswith("2"))
    answer = {"description": "Done.", "content": {own.media_type: {"schema": ref(own.answer)}}}
    operation["responses"] = {good: answer, **_errors(*own.errors)}
    if own.bodies:
        content = {kind: {"schema": ref(body)} for kind, body in own.bodies.items()}
        operation["requestBody"] = {"required": own.body_required, "content": content}
    if own.idempotent:
        operation["parameters"] = [*operation.get("parameters", ()), openapi_bulk.IDEMPOTENCY_KEY]


def _passed_on(endpoint: Endpoint, settings: ApiSettings) -> Json:
    """A route whose bytes go to the engine and back."""
    name = endpoint.removeprefix("/v1/").replace("/", "_")
    content: Json = {JSON: {"schema": OBJECT}}
    if endpoint is not Endpoint.EMBEDDINGS:
        content["text/event-stream"] = {"schema": {"description": "The engine's own events, if `stream`."}}
    return {
        "summary": name.replace("_", " ").capitalize(),
        "operationId": name,
        "description": "The engine's answer as it is. Fields that reach into the engine itself are dropped.",
        "requestBody": {"required": True, "content": {JSON: {"schema": _request(endpoint, settings)}}},
        "responses": {
            "200": {"description": "Done, or begun: a stream.", "content": content},
            **_errors(404, *BODY, 429, 502, 504),
        },
    }


def _request(endpoint: Endpoint, settings: ApiSettings) -> Json:
    """The fields of a request that velocity looks at."""
    limit = {"type": ["integer", "null"], "minimum": 1}
    few = {"type": ["integer", "null"], "minimum": 1, "maximum": settings.max_n}
    logprobs = {"type": ["integer", "null"], "minimum": 0, "maximum": request_caps.MAX_LOGPROBS}
    binding = {"type": ["object", "null"], "description": f"At most {settings.max_schema_bytes:,} bytes."}
    words = {**TEXT, "maxLength": request_caps.MAX_STOP_CHARACTERS}
    tool = {"type": "object", "description": f"At most {settings.max_tool_bytes:,} bytes."}
    tools = {"type": ["array", "null"], "items": tool, "maxItems": request_caps.MAX_TOOLS}
    message = {"type": "object", "properties": {"role": TEXT}, "required": ["role"]}
    tokens = {"type": "array", "items": {**NUMBER, "minimum": 0}, "minItems": 1}
    generation = {
        "stream": {"type": ["boolean", "null"]}, "stream_options": {"type": ["object", "null"]}, "n": few,
        "stop": {"anyOf": [words, {"type": "array", "items": words, "maxItems": request_caps.MAX_STOPS},
                           {"type": "null"}]},
        "response_format": binding, "structured_outputs": binding, "prompt_logprobs": logprobs, "max_tokens": limit,
    }  # fmt: skip
    one: list[Json] = [{**TEXT, "minLength": 1}, tokens]
    several = [{"type": "array", "items": way, "minItems": 1, "maxItems": request_caps.MAX_PROMPTS} for way in one]
    prompt: Json = {"anyOf": [*one, *several]}
    fields: dict[Endpoint, Json] = {
        Endpoint.CHAT: {
            **generation, "messages": {"type": "array", "items": message, "minItems": 1}, "tools": tools,
            "max_completion_tokens": limit, "logprobs": {"type": ["boolean", "null"]}, "top_logprobs": logprobs,
        },
        Endpoint.COMPLETIONS: {**generation, "prompt": prompt, "best_of": few, "logprobs": logprobs},
        Endpoint.RESPONSES: {
            "input": {"anyOf": [TEXT, {"type": "array", "items": OBJECT, "minItems": 1}]}, "tools": tools,
            "stream": generation["stream"], "text": binding, "top_logprobs": logprobs, "max_output_tokens": limit,
        },
        Endpoint.EMBEDDINGS: {"input": prompt},
    }  # fmt: skip
    content = next(name for name in ("messages", "prompt", "input") if name in fields[endpoint])
    properties = {"model": MODEL, **fields[endpoint]}
    return {"type": "object", "properties": properties, "required": ["model", content], "additionalProperties": True}


def _model_schemas() -> Json:
    """What pydantic knows."""
    validated: tuple[type[BaseModel], ...] = (*openapi_bulk.BODIES, Terms, NewKey, Rotation)
    modes: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = [
        *((model, "validation") for model in validated), (Key, "serialization"),
    ]  # fmt: skip
    schemas: Json = models_json_schema(modes, ref_template="#/components/schemas/{model}")[1]["$defs"]
    openapi_bulk.mend(schemas)
    changes = schemas.pop("Terms")["properties"]
    for field in changes.values():
        field.pop("default", None)  # what is not named is not changed
    schemas["KeyChanges"] = shape(changes, required=False)
    known = schemas["Key"]["properties"]
    more = {"object": {"const": "key"}, "usable": {"type": "boolean", "description": "Whether it opens anything now."}}
    view = shape({name: known.get(name) or more[name] for name in key_view(ANYONE)})
    text = {**TEXT, "description": "The key itself, shown this once."}
    return {**schemas, "Key": view, "KeyWithText": shape({"key": text, **view["properties"]})}


def _shapes() -> Json:
    """What the routes make by hand."""
    error = shape({"message": TEXT, "type": TEXT, "param": NULLABLE_TEXT, "code": NULLABLE_TEXT})
    model = {
        "id": TEXT, "object": {"const": "model"}, "created": NUMBER, "owned_by": TEXT,
        "max_model_len": {"type": ["integer", "null"]},
    }  # fmt: skip
    used = numbers("requests", "input_tokens", "output_tokens", "refused")
    usage = {
        "object": {"const": "usage"}, "key": TEXT, "date": {**TEXT, "format": "date"}, "interactive": used,
        "bulk": used,
    }  # fmt: skip
    return {
        "Error": shape({"error": error}),
        "Model": shape(model), "ModelList": listed("Model"), "KeyList": listed("Key"),
        "Usage": shape(usage), "UsageList": listed("Usage"),
        "Health": {"type": "object", "properties": {"status": {"enum": ["ok", "degraded", "unavailable"]}},
                   "required": ["status"], "additionalProperties": {"type": ["string", "null"]}},
        "Document": {**OBJECT, "description": "OpenAPI 3.1."},
        "Anything": {},
    }  # fmt: skip


def _health_answers() -> Json:
    content = {JSON: {"schema": ref("Health")}}
    return {
        "200": {"description": "Chat can be served; `degraded` if bulk work suffers.", "content": content},
        "503": {"description": "Chat can't be served.", "content": content},
        **{status: answer for status, answer in _errors().items() if status in {"400", "415", "431", "500"}},
    }


def _errors(*more: int) -> Json:
    return {str(status): {"$ref": f"#/components/responses/{status}"} for status in sorted({*_ALWAYS, *more})}


def _error_answer(status: int) -> Json:
    answer: Json = {"description": _WHY[status], "content": {JSON: {"schema": ref("Error")}}}
    if status in {429, 503}:
        seconds = {"description": "Seconds after which to try again.", "schema": {**NUMBER, "minimum": 0}}
        answer["headers"] = {"Retry-After": seconds}
    return answer
