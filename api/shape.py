"""What velocity changes in a request before the engine sees it, and nothing else: unknown fields are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from api.errors import ApiError
from api.keys import Key
from api.request_caps import check_caps, check_depth, check_reach, input_tokens
from api.settings import ApiSettings
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
_COMPLETIONS_DEFAULT = 16
_HAS_STREAM_USAGE = (Endpoint.CHAT, Endpoint.COMPLETIONS)


@dataclass(slots=True)  # not frozen, which makes each one dearer to make: there is one per request
class EngineRequest:
    """The request as it goes to the engine."""

    endpoint: Endpoint
    body: bytes
    model: str
    stream: bool
    hide_usage: bool
    """Whether the usage chunk was asked for by velocity alone, and is kept from the client."""
    input_estimate: int
    """Tokens of the input, by its length: about one per four bytes."""
    output_most: int
    """Most tokens that the answer can have."""


def parse(body: bytes) -> dict[str, Any]:
    """The request's JSON object. Raises ApiError 400."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"The request body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(content, dict):
        raise ApiError(400, "The request body must be a JSON object.", code="invalid_json")
    check_depth(content)
    return content


def clean(endpoint: Endpoint, content: dict[str, Any], model: Model, key: Key, settings: ApiSettings) -> dict[str, Any]:
    """A copy with the model's true name, without the dropped fields, and with an output limit that fits.

    The engine itself shortens the output to what the prompt leaves; it refuses only a limit beyond the whole context.
    Raises ApiError 400 for a field that asks for too much.
    """
    check_caps(content, settings)
    check_reach(content)
    cleaned = {name: value for name, value in content.items() if name not in DROPPED}
    cleaned["model"] = model.id
    if key.version:  # a tenant's prompts are cached for itself alone: what is fast would tell others what was asked
        cleaned["cache_salt"] = key.tenant
    field = _limit_field(endpoint, cleaned)
    if field and field not in cleaned and endpoint is not Endpoint.COMPLETIONS:  # there OpenAI's own default is 16
        cleaned[field] = settings.default_max_tokens
    limit = cleaned.get(field or "")
    if field and isinstance(limit, int) and not isinstance(limit, bool):
        cleaned[field] = min(limit, model.max_model_len or limit, key.max_tokens or limit)
    return cleaned


def interactive(
    endpoint: Endpoint, content: dict[str, Any], model: Model, key: Key, settings: ApiSettings, length: int = 0
) -> EngineRequest:
    """An interactive request: highest priority, with usage reported so that it can be accounted.

    `length` is the body's, in bytes. Raises ApiError 400.
    """
    body = clean(endpoint, content, model, key, settings)
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
    return EngineRequest(
        endpoint,
        orjson.dumps(body),
        model.id,
        stream,
        hide_usage,
        input_tokens(body, length),
        output_most(endpoint, body),
    )


def output_most(endpoint: Endpoint, body: dict[str, Any]) -> int:
    """Most tokens that the answers to a cleaned request can have together."""
    field = _limit_field(endpoint, body)
    if not field:
        return 0
    limit = body.get(field, _COMPLETIONS_DEFAULT)
    prompts = body.get("prompt")
    count = len(prompts) if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int) else 1
    return _count(limit) * max(1, _count(body.get("n"))) * count


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _limit_field(endpoint: Endpoint, content: dict[str, Any]) -> str | None:
    """The field that limits the output: the one that the request has, or that it gets."""
    fields = _LIMIT_FIELDS[endpoint]
    for field in fields:
        if content.get(field) is not None:
            return field
    if fields:
        content.pop(fields[-1], None)  # a null is no limit
        return fields[-1]
    return None
