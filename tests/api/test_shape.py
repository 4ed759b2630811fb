"""What is changed in a request, and what is not."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from api import shape
from api.errors import ApiError
from api.keys import ANYONE, Key
from api.settings import ApiSettings
from engine.client import Endpoint, Model

MODEL = Model("tiny", "/m", 8192)
SETTINGS = ApiSettings(default_max_tokens=1000)


def shaped(
    content: dict[str, Any], endpoint: Endpoint = Endpoint.CHAT, key: Key = ANYONE
) -> tuple[shape.EngineRequest, dict[str, Any]]:
    request = shape.interactive(endpoint, content, MODEL, key, SETTINGS)
    return request, orjson.loads(request.body)


def test_unknown_fields_are_kept_and_dangerous_ones_dropped() -> None:
    _, body = shaped({"model": "x", "tools": [1], "top_k": 5, "chat_template": "{{ evil }}", "cache_salt": "theirs"})
    assert body["tools"] == [1]
    assert body["top_k"] == 5
    assert "chat_template" not in body
    assert "cache_salt" not in body


def test_priority_is_velocitys_own() -> None:
    assert shaped({"priority": -5})[1]["priority"] == 0


def test_the_alias_becomes_the_true_name() -> None:
    assert shaped({"model": "velocity-30b"})[1]["model"] == "tiny"


@pytest.mark.parametrize(
    ("endpoint", "given", "field", "expected"),
    [
        (Endpoint.CHAT, {}, "max_tokens", 1000),
        (Endpoint.CHAT, {"max_tokens": 5}, "max_tokens", 5),
        (Endpoint.CHAT, {"max_tokens": 999_999}, "max_tokens", 8192),
        (Endpoint.CHAT, {"max_completion_tokens": 999_999}, "max_completion_tokens", 8192),
        (Endpoint.CHAT, {"max_tokens": "many"}, "max_tokens", "many"),
        (Endpoint.RESPONSES, {}, "max_output_tokens", 1000),
        (Endpoint.COMPLETIONS, {}, "max_tokens", None),
        (Endpoint.COMPLETIONS, {"max_tokens": 999_999}, "max_tokens", 8192),
        (Endpoint.EMBEDDINGS, {}, "max_tokens", None),
    ],
)
def test_output_limits(endpoint: Endpoint, given: dict[str, Any], field: str, expected: object) -> None:
    assert shaped(given, endpoint)[1].get(field) == expected


@pytest.mark.parametrize(
    ("options", "hidden"),
    [(None, True), ({}, True), ({"include_usage": False}, True), ({"include_usage": True}, False)],
)
def test_usage_is_always_asked_for_in_streams(options: object, hidden: bool) -> None:
    request, body = shaped({"stream": True, "stream_options": options})
    assert body["stream_options"]["include_usage"] is True
    assert request.hide_usage is hidden


def test_no_stream_no_stream_options() -> None:
    assert "stream_options" not in shaped({"stream": False})[1]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"3", b"\xff", b'{"a": NaN}'])
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        shape.parse(body)
    assert caught.value.status == 400


MEDIA = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}


@pytest.mark.parametrize(
    ("endpoint", "content", "param"),
    [
        (Endpoint.CHAT, {"messages": [{"role": "user", "content": [MEDIA]}]}, "image_url"),
        (
            Endpoint.RESPONSES,
            {"input": [{"content": [{"type": "input_image", "image_url": "file:///x"}]}]},
            "image_url",
        ),
        (Endpoint.RESPONSES, {"input": "hi", "background": True}, "background"),
        (Endpoint.RESPONSES, {"input": "hi", "previous_response_id": "resp_1"}, "previous_response_id"),
    ],
)
def test_what_would_make_the_engine_reach_out_is_refused(
    endpoint: Endpoint, content: dict[str, Any], param: str
) -> None:
    with pytest.raises(ApiError) as caught:
        shaped(content, endpoint)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_media_that_is_sent_along_is_passed_on() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    assert shaped({"messages": [{"role": "user", "content": [part]}]})[1]["messages"][0]["content"] == [part]
    large = {"messages": [{"role": "user", "content": [{"image_url": {"url": "data:" + "A" * 400_000}}]}]}
    assert shape.interactive(Endpoint.CHAT, large, MODEL, ANYONE, SETTINGS, 400_100).input_estimate < 2_000
