"""Bounds on what a request may ask of the engine's front end, where a stranger could make it work for nothing."""

from __future__ import annotations

from collections.abc import Callable
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
_MEDIA = frozenset({"image_url", "audio_url", "video_url", "file_url"})
_MEDIUM_TOKENS = 1000


def check_depth(content: object) -> None:
    """Raises ApiError 400 if arrays and objects are nested more than 32 deep."""
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer if type(outer) is list else ())
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return
    raise ApiError(400, f"The body is nested more than {MAX_DEPTH} deep.", code="invalid_json")


def check_caps(content: dict[str, Any], settings: ApiSettings) -> None:
    """Raises ApiError 400 that names the field which asks for too much."""
    for name, value in content.items():
        check = _CHECKS.get(name)
        if check is not None:
            check(name, value, settings)


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


def _media(content: dict[str, Any]) -> list[tuple[str, str]]:
    """The name and the address of each image, sound or video."""
    found: list[tuple[str, str]] = []
    for field in ("messages", "input"):
        messages = content.get(field)
        for message in messages if isinstance(messages, list) else ():
            if isinstance(message, dict):
                _media_of(message, found)
                parts = message.get("content")
                for part in parts if isinstance(parts, list) else ():
                    if isinstance(part, dict):
                        _media_of(part, found)
    return found


def _media_of(part: dict[str, Any], found: list[tuple[str, str]]) -> None:
    if _MEDIA.isdisjoint(part):
        return
    for name in sorted(_MEDIA.intersection(part)):
        media = part[name]
        url = media.get("url") if isinstance(media, dict) else media
        if isinstance(url, str):
            found.append((name, url))


def _check_count(name: str, value: object, settings: ApiSettings) -> None:
    _check_whole(name, value, settings)
    _at_most(name, value, settings.max_n)


def _check_logprobs(name: str, value: object, settings: ApiSettings) -> None:
    _check_whole(name, value, settings)
    _at_most(name, value, MAX_LOGPROBS)


def _check_whole(name: str, value: object, _: ApiSettings) -> None:
    if _reads_as_whole(value):
        raise ApiError(400, f"'{name}' must be a whole number.", param=name)


def _check_binding(name: str, value: object, settings: ApiSettings) -> None:
    if len(orjson.dumps(value)) > settings.max_schema_bytes:
        raise _too_much(name, f"at most {settings.max_schema_bytes:,} bytes (VELOCITY_MAX_SCHEMA_BYTES)")


def _check_stops(name: str, stops: object, _: ApiSettings) -> None:
    stops = [stops] if isinstance(stops, str) else stops
    if isinstance(stops, list) and (
        len(stops) > MAX_STOPS or any(isinstance(stop, str) and len(stop) > MAX_STOP_CHARACTERS for stop in stops)
    ):
        raise _too_much(name, f"at most {MAX_STOPS} texts of {MAX_STOP_CHARACTERS} characters")


def _check_tools(name: str, tools: object, settings: ApiSettings) -> None:
    if not isinstance(tools, list):
        return
    if len(tools) > MAX_TOOLS:
        raise _too_much(name, f"at most {MAX_TOOLS} tools")
    most = settings.max_tool_bytes
    for index, tool in enumerate(tools):
        if len(orjson.dumps(tool)) > most:
            raise _too_much(f"{name}[{index}]", f"at most {most:,} bytes a tool (VELOCITY_MAX_TOOL_BYTES)")


def _check_prompts(name: str, prompts: object, _: ApiSettings) -> None:
    if isinstance(prompts, list) and len(prompts) > MAX_PROMPTS and not isinstance(prompts[0], int):
        raise _too_much(name, f"at most {MAX_PROMPTS} prompts; send a job to /jobs instead")


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


# Those at the end bind an answer to a schema, a pattern or a grammar, which the engine has to compile.
_CHECKS: dict[str, Callable[[str, object, ApiSettings], None]] = {
    "n": _check_count, "best_of": _check_count, "logprobs": _check_logprobs, "top_logprobs": _check_logprobs,
    "prompt_logprobs": _check_logprobs, "max_tokens": _check_whole, "max_completion_tokens": _check_whole,
    "max_output_tokens": _check_whole, "stop": _check_stops, "tools": _check_tools, "prompt": _check_prompts,
    **dict.fromkeys(
        ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
         "text", "structural_tag"), _check_binding,
    ),
}  # fmt: skip
