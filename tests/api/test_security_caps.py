"""What is too much, too deep, not JSON, or an id that can't exist is refused before anybody works on it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from api.keys import Scope
from engine.client import Endpoint
from tests.api.conftest import Door
from tests.api.test_security_engine import BODIES, MESSAGES, batch_of

LONG = "x" * 9000
CAPS: list[tuple[str, str, Any, Any]] = [  # endpoint, field, too much, just right
    (Endpoint.CHAT, "n", 9, 8),
    (Endpoint.COMPLETIONS, "n", 9, 8),
    (Endpoint.COMPLETIONS, "best_of", 9, 8),
    (Endpoint.CHAT, "top_logprobs", 21, 20),
    (Endpoint.RESPONSES, "top_logprobs", 21, 20),
    (Endpoint.COMPLETIONS, "logprobs", 21, 20),
    (Endpoint.CHAT, "prompt_logprobs", 21, 20),
    (Endpoint.CHAT, "stop", ["x"] * 17, ["x"] * 16),
    (Endpoint.CHAT, "stop", ["x" * 1025], ["x" * 1024]),
    (Endpoint.CHAT, "stop", "x" * 1025, "x" * 1024),
    (Endpoint.CHAT, "tools", [{}] * 257, [{}] * 256),
    (Endpoint.CHAT, "response_format", {"type": "json_schema", "json_schema": {"schema": {"title": LONG}}}, {}),
    (Endpoint.CHAT, "structured_outputs", {"regex": LONG}, {"regex": "x" * 8000}),
    (Endpoint.CHAT, "structured_outputs", {"grammar": LONG}, {"grammar": "x" * 8000}),
    (Endpoint.CHAT, "guided_regex", LONG, "x"),
    (Endpoint.CHAT, "guided_json", {"title": LONG}, {}),
    (Endpoint.RESPONSES, "text", {"format": {"schema": {"title": LONG}}}, {}),
    (Endpoint.COMPLETIONS, "prompt", ["x"] * 65, ["x"] * 64),
    (Endpoint.COMPLETIONS, "prompt", [[1]] * 65, [1] * 65),
]


async def test_caps(door: Door) -> None:
    async with door.client() as client:
        for path, name, much, right in CAPS:
            refused = await client.post(path, json={**BODIES[path], name: much})
            assert refused.status_code == 400, name
            error = refused.json()["error"]
            assert (error["code"], error["param"]) == ("value_too_large", name)
            assert (await client.post(path, json={**BODIES[path], name: right})).status_code == 200, name
        tool = {"type": "function", "function": {"name": "f", "parameters": {"title": "x" * 33_000}}}
        refused = await client.post(Endpoint.CHAT, json={**BODIES[Endpoint.CHAT], "tools": [{}, tool]})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools[1]")
    assert len(door.engine.requests) == len(CAPS)


async def test_caps_hold_in_jobs_too(door: Door) -> None:
    async with door.client() as client:
        for path, name, much, _ in CAPS:
            if path == Endpoint.CHAT:
                items = [{"id": "a", "messages": MESSAGES}, {"id": "b", "messages": MESSAGES, name: much}]
                refused = await client.post("/jobs", json={"model": "tiny", "items": items})
                assert (refused.status_code, refused.json()["error"]["param"]) == (400, f"items[1].{name}")
                given = {"model": "tiny", "items": items[:1], "defaults": {name: much}}
                assert (await client.post("/jobs", json=given)).status_code == 400
        assert (await client.get("/jobs")).json()["data"] == []


async def test_caps_hold_in_bulk_for_every_endpoint(door: Door) -> None:
    async with door.client() as client:
        for path, name, much, _ in CAPS:
            body = {field: value for field, value in BODIES[path].items() if field != "stream"}
            item = {"id": "a", **{field: value for field, value in body.items() if field != "model"}}
            job = {"model": "tiny", "endpoint": path, "items": [item, {**item, "id": "b", name: much}]}
            refused = await client.post("/jobs", json=job)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, f"items[1].{name}")
            (error,) = (await batch_of(client, path, body, {**body, name: much}))["errors"]["data"]
            assert (error["code"], error["line"], error["param"]) == ("value_too_large", 2, f"body.{name}")
        listed = (await client.get("/jobs")).json()["data"]
    assert {job["status"] for job in listed} == {"failed"}
    assert not door.engine.requests


WHOLE = ["n", "best_of", "top_logprobs", "prompt_logprobs", "logprobs", "max_tokens", "max_completion_tokens"]


DISGUISED = ["1000000", 1e6, " 7 ", "1_000", "+7", "7.0", 7.5, "٧"]


async def test_no_cap_is_passed_by_a_number_in_disguise(door: Door) -> None:
    """The engine's own validation would take these for whole numbers."""
    async with door.client(await door.new_key(max_tokens=5)) as client:
        for value in DISGUISED:
            for name in WHOLE:
                refused = await client.post(Endpoint.CHAT, json={**BODIES[Endpoint.CHAT], name: value})
                assert (refused.status_code, refused.json()["error"]["param"]) == (400, name), value
            body = {**BODIES[Endpoint.RESPONSES], "max_output_tokens": value}
            assert (await client.post(Endpoint.RESPONSES, json=body)).status_code == 400
            job = {"model": "tiny", "items": [{"id": "a", "messages": MESSAGES, "max_tokens": value}]}
            assert (await client.post("/jobs", json=job)).status_code == 400
    assert not door.engine.requests


async def test_the_keys_own_limit_on_output_can_not_be_left_out(door: Door) -> None:
    key = await door.new_key(max_tokens=5)
    async with door.client(key) as client:
        for limits in ({}, {"max_tokens": None}, {"max_tokens": 900}, {"max_completion_tokens": 900, "max_tokens": 1},
                       {"max_completion_tokens": None, "max_tokens": 900}):  # fmt: skip
            assert (await client.post(Endpoint.CHAT, json={**BODIES[Endpoint.CHAT], **limits})).status_code == 200
    for request in door.engine.requests:
        effective = request.get("max_completion_tokens")
        assert (request["max_tokens"] if effective is None else effective) == 5


def nested(depth: int) -> Any:
    return [] if depth == 1 else [nested(depth - 1)]


NOT_JSON = [b'{"model": NaN}', b'{"model": Infinity}', b'{"model": "\\ud800"}', b'{"model": "\xff"}', b"\xef\xbb\xbf{}",
            b'{"model": 1e999}', b"{'model': 1}", b'{"model": "a",}', b"{}{}", b"null", b'"x"', b""]  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/jobs", "/v1/batches", "/webhooks/test", "/admin/keys"])
async def test_only_plain_json_is_read(door: Door, path: str) -> None:
    async with door.client(await door.new_key(scopes=tuple(Scope))) as client:
        for body in NOT_JSON:
            response = await client.post(path, content=body)
            assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json"), body
        deep = await client.post(path, json={"metadata": nested(32)})
        assert (deep.status_code, deep.json()["error"]["code"]) == (400, "invalid_json")
        fits = await client.post(path, json={"metadata": nested(31)})
        assert fits.json()["error"]["code"] != "invalid_json"
    assert not door.engine.requests


IMPOSSIBLE = [
    "..%2f..%2fetc%2fpasswd", "..%5c..%5cetc", "%2e%2e", "%00", "job_" + "0" * 32 + "%00", "job_" + "0" * 32 + "%0a",
    "job_" + "0" * 31 + "%0a", "job_" + "A" * 32, "job_" + "%EF%BC%90" * 32, "job_" + "0" * 33, "job_" + "0" * 31,
    "job_" + "0" * 30 + "%2f.", "JOB_" + "0" * 32, "*", "job_*", "%2a", "0" * 11 + "%0a", "0" * 12 + "%0a", "0" * 11,
    "file-" + "0" * 32 + "%00", "file-" + "0" * 32 + "%0a", "file-" + "0" * 30 + "%2f.", "batch_" + "0" * 33,
    "A" * 12, "%EF%BC%90" * 12, ".lock", "%2e%2f" + "0" * 12, "~", "$(id)", "%24%7bjndi%7d", "a" * 5000,
]  # fmt: skip


async def test_ids_that_can_not_exist_do_not(door: Door) -> None:
    key = await door.new_key(scopes=tuple(Scope))
    async with door.client(key) as client:
        for bad in IMPOSSIBLE:
            for method, path in (
                ("GET", "/jobs/{}"), ("GET", "/jobs/{}/results"), ("POST", "/jobs/{}/cancel"),
                ("GET", "/jobs/{}/events"), ("POST", "/jobs/{}/retry"), ("DELETE", "/jobs/{}"),
                ("GET", "/v1/batches/{}"), ("POST", "/v1/batches/{}/cancel"), ("GET", "/v1/batches?after={}"),
                ("GET", "/v1/files/{}"), ("GET", "/v1/files/{}/content"), ("DELETE", "/v1/files/{}"),
                ("GET", "/v1/files?after={}"),
                ("GET", "/jobs?after={}"), ("GET", "/admin/keys/{}"), ("PATCH", "/admin/keys/{}"),
                ("POST", "/admin/keys/{}/revoke"), ("POST", "/admin/keys/{}/rotate"), ("GET", "/v1/models/{}"),
            ):  # fmt: skip
                url = httpx.URL(door.url).copy_with(raw_path=path.format(bad).encode())
                response = await client.request(method, url, content=b"{}" if method == "PATCH" else None)
                assert response.status_code == 404, (method, path, bad)
                assert response.json()["error"]["code"] in {"not_found", "model_not_found"}
