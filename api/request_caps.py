"""Bounds on what a request may ask of the engine's front end, where a stranger could make it work for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from api.errors import ApiError
from api.settings import ApiSettings

MAX_DEPTH = 32
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_TOOLS = 256
MAX_PROMPTS = 64
MAX_LOGPROBS = 20
_BINDING = (
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "text",
    "structural_tag",
)  # fmt: skip
"""Fields that bind an answer to a schema, a pattern or a grammar, which the engine has to compile."""
_MEDIA = ("image_url", "audio_url", "video_url", "file_url")
_MEDIUM_TOKENS = 1000
_COUNTS = ("n", "best_of")
_LOGPROBS = ("logprobs", "top_logprobs", "prompt_logprobs")
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_WHOLE = (*_COUNTS, *_LOGPROBS, *_LIMITS)


def check_depth(content: object) -> None:
    """Raises ApiError 400 if arrays and objects are nested more than 32 deep."""
    level = [content]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise ApiError(400, f"The body is nested more than {MAX_DEPTH} deep.", code="invalid_json")


def _inside(outer: object) -> Iterator[object]:
    values = outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ()
    return (value for value in values if isinstance(value, dict | list))


def check_caps(content: dict[str, Any], settings: ApiSettings) -> None:
    """Raises ApiError 400 that names the field which asks for too much."""
    for name in _WHOLE:
        if name in content and _reads_as_whole(content[name]):
            raise ApiError(400, f"'{name}' must be a whole number.", param=name)
    for name in _COUNTS:
        if name in content:
            _at_most(name, content[name], settings.max_n)
    for name in _LOGPROBS:
        if name in content:
            _at_most(name, content[name], MAX_LOGPROBS)
    for name in _BINDING:
        if name in content and len(orjson.dumps(content[name])) > settings.max_schema_bytes:
            raise _too_much(name, f"at most {settings.max_schema_bytes:,} bytes (VELOCITY_MAX_SCHEMA_BYTES)")
    _check_stops(content.get("stop"))
    _check_tools(content.get("tools"), settings.max_tool_bytes)
    prompts = content.get("prompt")
    if isinstance(prompts, list) and len(prompts) > MAX_PROMPTS and not isinstance(prompts[0], int):
        raise _too_much("prompt", f"at most {MAX_PROMPTS} prompts; send a job to /jobs instead")


def check_reach(content: dict[str, Any]) -> None:
    """Raises ApiError 400 for what would make the engine fetch an address, or keep an answer that has no tenant."""
    for name, url in _media(content):
        if not url.startswith("data:"):
            raise ApiError(400, f"Send '{name}' as a data: URL; addresses are not fetched.", param=name)
    if content.get("background"):
        raise ApiError(400, "Background responses are not served; send a job to /jobs instead.", param="background")
    if content.get("previous_response_id") is not None:
        raise ApiError(
            400, "velocity keeps no responses: send the whole conversation as 'input'.", param="previous_response_id"
        )


def input_tokens(content: dict[str, Any], length: int) -> int:
    """About how many tokens a request of `length` bytes has: one per four bytes, and a fixed number per medium."""
    media = [len(url) for _, url in _media(content)]
    return max(0, length - sum(media)) // 4 + 1 + len(media) * _MEDIUM_TOKENS


def _media(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The name and the address of each image, sound or video."""
    for part in _parts(content):
        for name in _MEDIA:
            media = part.get(name)
            url = media.get("url") if isinstance(media, dict) else media
            if isinstance(url, str):
                yield name, url


def _parts(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every part of every message."""
    for name in ("messages", "input"):
        messages = content.get(name)
        for message in messages if isinstance(messages, list) else ():
            if isinstance(message, dict):
                yield message
                inner = message.get("content")
                yield from (part for part in (inner if isinstance(inner, list) else ()) if isinstance(part, dict))


def _check_stops(stops: object) -> None:
    stops = [stops] if isinstance(stops, str) else stops
    if isinstance(stops, list) and (
        len(stops) > MAX_STOPS or any(isinstance(stop, str) and len(stop) > MAX_STOP_CHARACTERS for stop in stops)
    ):
        raise _too_much("stop", f"at most {MAX_STOPS} texts of {MAX_STOP_CHARACTERS} characters")


def _check_tools(tools: object, most_bytes: int) -> None:
    if not isinstance(tools, list):
        return
    if len(tools) > MAX_TOOLS:
        raise _too_much("tools", f"at most {MAX_TOOLS} tools")
    for index, tool in enumerate(tools):
        if len(orjson.dumps(tool)) > most_bytes:
            raise _too_much(f"tools[{index}]", f"at most {most_bytes:,} bytes a tool (VELOCITY_MAX_TOOL_BYTES)")


def _reads_as_whole(value: object) -> bool:
    """Whether it is no whole number, but the engine may take it for one: "100" and 100.0 would go past any cap."""
    try:
        return isinstance(value, float) or (isinstance(value, str) and float(value) is not None)
    except ValueError:
        return False


def _at_most(name: str, value: object, most: int) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and value > most:
        raise _too_much(name, f"at most {most}")


def _too_much(name: str, allowed: str) -> ApiError:
    return ApiError(400, f"'{name}' asks for too much: {allowed}.", param=name, code="value_too_large")
