"""What velocity changes in a request before the engine sees it, and nothing else: unknown fields are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from api.errors import ApiError
from engine.client import Endpoint, Model

# Fields that let a stranger reach into the engine (templates run code, embeddings and media load data), and those
# that are velocity's own to set.
DROPPED = frozenset({
    "priority", "cache_salt", "request_id", "chat_template", "chat_template_kwargs", "prompt_embeds",
    "mm_processor_kwargs", "media_io_kwargs", "kv_transfer_params", "vllm_xargs", "logits_processors",
    "allowed_local_media_path", "bad_words",
})  # fmt: skip

_LIMIT_FIELDS = {
    Endpoint.CHAT: ("max_completion_tokens", "max_tokens"),
    Endpoint.RESPONSES: ("max_output_tokens",),
    Endpoint.COMPLETIONS: ("max_tokens",),
    Endpoint.EMBEDDINGS: (),
}
_HAS_STREAM_USAGE = (Endpoint.CHAT, Endpoint.COMPLETIONS)


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """The request as it goes to the engine."""

    endpoint: Endpoint
    body: bytes
    model: str
    stream: bool
    hide_usage: bool
    """Whether the usage chunk was asked for by velocity alone, and is kept from the client."""


def parse(body: bytes) -> dict[str, Any]:
    """The request's JSON object. Raises ApiError 400."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"The request body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(content, dict):
        raise ApiError(400, "The request body must be a JSON object.", code="invalid_json")
    return content


def clean(endpoint: Endpoint, content: dict[str, Any], model: Model, default_max_tokens: int) -> dict[str, Any]:
    """A copy with the model's true name, without the dropped fields, and with an output limit that fits the context.

    The engine itself shortens the output to what the prompt leaves; it refuses only a limit beyond the whole context.
    """
    cleaned = {key: value for key, value in content.items() if key not in DROPPED}
    cleaned["model"] = model.id
    fields = _LIMIT_FIELDS[endpoint]
    asked = next((field for field in fields if cleaned.get(field) is not None), None)
    if asked is None and fields and endpoint is not Endpoint.COMPLETIONS:  # there OpenAI's own default is 16
        asked = fields[-1]
        cleaned[asked] = default_max_tokens
    limit = cleaned.get(asked) if asked else None
    if asked and model.max_model_len and isinstance(limit, int) and not isinstance(limit, bool):
        cleaned[asked] = min(limit, model.max_model_len)
    return cleaned


def interactive(endpoint: Endpoint, content: dict[str, Any], model: Model, default_max_tokens: int) -> EngineRequest:
    """An interactive request: highest priority, with usage reported so that it can be accounted. ApiError 400."""
    body = clean(endpoint, content, model, default_max_tokens)
    if not isinstance(body.get("stream"), bool | None):
        raise ApiError(400, "'stream' must be true or false.", param="stream")
    stream = body.get("stream") is True
    hide_usage = False
    if endpoint is not Endpoint.EMBEDDINGS:
        body["priority"] = 0
    if stream and endpoint in _HAS_STREAM_USAGE:
        options = body.get("stream_options") or {}
        if isinstance(options, dict):
            hide_usage = options.get("include_usage") is not True
            body["stream_options"] = {**options, "include_usage": True}
    return EngineRequest(endpoint, orjson.dumps(body), model.id, stream, hide_usage)
