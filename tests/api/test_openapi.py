"""GET /openapi.json: off by default, and complete. That it is true: test_openapi_answers.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import schemathesis
from fastapi import FastAPI
from fastapi.routing import APIRoute

from api.intake_batch import BatchInput
from api.keys import Scope, Terms
from api.openapi import document
from api.routes import health
from api.routes.admin import NewKey
from api.server import config
from api.settings import ApiSettings
from engine.client import Endpoint
from tests.api.conftest import Door
from tests.api.test_openapi_answers import documented, served

__all__ = ["documented"]  # a fixture

METHODS = {"get", "post", "put", "patch", "delete"}


def routes_of(door: Door) -> FastAPI:
    """The FastAPI application behind the gate."""
    app = config(door.gateway).app.app  # type: ignore[union-attr]
    assert isinstance(app, FastAPI)
    return app


def operations(content: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in content["paths"].items():
        for method, operation in item.items():
            assert method in METHODS
            yield method, path, operation


def references(content: object) -> Iterator[str]:
    if isinstance(content, dict):
        if isinstance(content.get("$ref"), str):
            yield content["$ref"]
        for value in content.values():
            yield from references(value)
    elif isinstance(content, list):
        for value in content:
            yield from references(value)


async def test_there_is_none_by_default(door: Door) -> None:
    assert not ApiSettings.model_fields["docs"].default
    async with door.client() as client:
        for path in ("/openapi.json", "/docs", "/redoc", "/docs/oauth2-redirect"):
            assert (await client.get(path)).status_code == 404
    async with httpx.AsyncClient(base_url=door.url) as client:
        assert (await client.get("/openapi.json")).status_code == 401


async def test_it_takes_a_key_of_any_scope(documented: Door) -> None:
    async with httpx.AsyncClient(base_url=documented.url) as client:
        assert (await client.get("/openapi.json")).status_code == 401
    async with documented.client(await documented.new_key(scopes=(Scope.METRICS,))) as client:
        response = await client.get("/openapi.json")
        assert (await client.get("/docs")).status_code == 404
    assert response.json()["openapi"].startswith("3.1")
    assert response.headers["content-type"] == "application/json"


async def test_every_route_is_in_it(documented: Door) -> None:
    content = await served(documented)
    there = {(method.upper(), path) for method, path, _ in operations(content)}
    routes = [route for route in routes_of(documented).routes if isinstance(route, APIRoute)]
    own = {(method, route.path_format) for route in routes for method in route.methods or () if route.include_in_schema}
    assert there == own | {("POST", endpoint.value) for endpoint in Endpoint}
    assert {route.path for route in routes if not route.include_in_schema} == {"/health"}  # HEAD


async def test_it_is_sound(documented: Door) -> None:
    content = await served(documented)
    for reference in references(content):
        place: Any = content
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]
    schemathesis.openapi.from_dict(content).validate()
    ids = [operation["operationId"] for _, _, operation in operations(content)]
    assert len(ids) == len(set(ids))
    assert "HTTPValidationError" not in str(content)
    assert '"422"' not in str(content)


async def test_errors_are_openais_everywhere(documented: Door) -> None:
    content = await served(documented)
    for method, path, operation in operations(content):
        answers = operation["responses"]
        bad = {status: answer for status, answer in answers.items() if int(status) >= 400}
        public = path == "/health"
        assert operation.get("security", content["security"]) == ([] if public else [{"bearer": []}])
        assert {"400", "415", "431", "500"} <= set(bad), (method, path)
        assert public or {"401", "403", "503"} <= set(bad), (method, path)
        if "{" in path:
            assert "404" in bad, path
        if "requestBody" in operation:
            assert {"408", "413"} <= set(bad), path
        for status, answer in bad.items():
            if not (public and status == "503"):
                assert answer == {"$ref": f"#/components/responses/{status}"}
    for answer in content["components"]["responses"].values():
        assert answer["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}


async def test_good_answers_say_what_they_are(documented: Door) -> None:
    content = await served(documented)
    for method, path, operation in operations(content):
        good = next(answer for status, answer in operation["responses"].items() if status.startswith("2"))
        for kind, media in good["content"].items():
            assert media["schema"] not in ({}, {"$ref": "#/components/schemas/Anything"}), (method, path, kind)


async def test_bodies_that_are_read_by_hand_are_described(documented: Door) -> None:
    schemas = (await served(documented))["components"]["schemas"]
    assert set(schemas["NewKey"]["properties"]) == set(NewKey.model_fields)
    assert schemas["NewKey"]["required"] == ["name"]
    assert set(schemas["KeyChanges"]["properties"]) == set(Terms.model_fields)
    assert "required" not in schemas["KeyChanges"]
    ways = schemas["JobInput"]["properties"]["items"]["items"]["anyOf"]
    assert [way["$ref"].rpartition("/")[2] for way in ways] == ["ItemInput", "PromptItem", "InputItem"]
    assert all(schemas[name]["additionalProperties"] is True for name in ("ItemInput", "PromptItem", "InputItem"))
    assert set(schemas["JobHead"]["properties"]) == set(schemas["JobInput"]["properties"]) - {"items"}
    assert set(schemas["BatchInput"]["properties"]) == set(BatchInput.model_fields)
    assert schemas["WebhookTest"]["required"] == ["url"]
    assert {"file", "purpose", "expires_after[seconds]"} < set(schemas["FileInput"]["properties"])
    assert not any(secret in schemas["Key"]["properties"] for secret in ("hash", "former_hash", "key"))


async def test_bodies_of_more_than_one_kind(documented: Door) -> None:
    paths = (await served(documented))["paths"]
    assert set(paths["/jobs"]["post"]["requestBody"]["content"]) == {"application/json", "application/x-ndjson"}
    assert set(paths["/v1/files"]["post"]["requestBody"]["content"]) == {"multipart/form-data"}
    taken = {
        path for path, item in paths.items() for operation in item.values()
        for parameter in operation.get("parameters", ()) if parameter["name"] == "Idempotency-Key"
    }  # fmt: skip
    assert taken == {"/jobs", "/v1/batches"}
    assert [parameter["name"] for parameter in paths["/jobs/{job_id}/events"]["get"]["parameters"]] == [
        "job_id", "last-event-id",
    ]  # fmt: skip


def test_caps_follow_the_settings() -> None:
    app = FastAPI(openapi_url=None)
    app.include_router(health.router)
    content = document(app, ApiSettings(max_n=3, max_schema_bytes=77))
    chat = content["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert chat["properties"]["n"]["maximum"] == 3
    assert "77" in chat["properties"]["response_format"]["description"]
    assert chat["additionalProperties"] is True
