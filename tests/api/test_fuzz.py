"""Schemathesis over the served document: whatever it sends, no 5xx, and answers only as the document says."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from api.keys import Scope
from api.settings import ApiSettings
from tests.api.conftest import Door, front_door
from tests.fake_engine import MODEL, Connection, FakeEngine, serving
from tests.webhook_receiver import receiving

LONG = "VELOCITY_FUZZ_SECONDS" in os.environ
SECONDS = int(os.environ.get("VELOCITY_FUZZ_SECONDS", "300"))
"""How long it may take; by default it is a fixed number of requests, which a slow machine can do in that time."""
EXTENT = ["--max-time", str(SECONDS)] if LONG else ["--max-examples", "4", "--seed", "1"]
EACH = 12
CHECKS = (
    # Not those of what must be accepted or refused: that is the engine's to decide, and pydantic reads "1" as 1.
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "unsupported_method", "allow_header_conformance", "ignored_auth",
)  # fmt: skip


class _Wary(Connection):
    """Refuses what the real engine would refuse, where the fake would trip over it."""

    async def _generate(self, request: dict[str, Any]) -> None:
        said: Any = request.get("messages", request.get("prompt", request.get("input")))
        fit = isinstance(said, str | list) and isinstance(request.get("stream_options"), dict | None)
        if "messages" in request:
            fit = fit and bool(said) and all(isinstance(message, dict) and "content" in message for message in said)
        if fit:
            await super()._generate(request)
        else:
            error = {"message": "no", "type": "BadRequestError", "param": None, "code": 400}
            self.answer(400, orjson.dumps({"error": error}))


async def hidden_key(door: Door) -> str:
    """A key that may do everything, and that no list names: what is fuzzed can't revoke or change it."""
    text = await door.new_key(scopes=tuple(Scope))
    (door.settings.data_dir / "keys" / f"{text.split('_')[1]}.json").unlink()
    return text


Things = dict[str, list[str]]
"""What there is, by what the document calls it: an address's part, or a body's field."""


async def things(door: Door, key: str) -> Things:
    """Jobs and batches that are over (the events of others would not end), and their files; several, to be deleted."""
    item = {"messages": [{"role": "user", "content": "hi"}]}
    failing = {"messages": [{"role": "user", "content": "status 400"}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": MODEL, **item}}
    made: Things = {"job_id": [], "batch_id": [], "file_id": [], "name": [MODEL],
                    "model": [MODEL, f"vllm/{MODEL}"]}  # fmt: skip
    async with door.client(key) as client:
        for _ in range(EACH):
            job = {"model": MODEL, "items": [{"id": "a", **item}, {"id": "b", **failing}]}
            made["job_id"].append((await client.post("/jobs", json=job)).json()["id"])
            file = {"file": ("in.jsonl", orjson.dumps(line))}
            sent = await client.post("/v1/files", data={"purpose": "batch"}, files=file)
            made["file_id"].append(sent.json()["id"])
            asked = {"input_file_id": made["file_id"][-1], "endpoint": line["url"], "completion_window": "24h"}
            made["batch_id"].append((await client.post("/v1/batches", json=asked)).json()["id"])
        await door.drain()
        for batch in made["batch_id"]:
            made["file_id"].append((await client.get(f"/v1/batches/{batch}")).json()["output_file_id"])
    return {**made, "input_file_id": made["file_id"], "after": [*made["job_id"], *made["batch_id"], *made["file_id"]]}


def with_things(content: Any, there: Things) -> Any:
    """The document with what there is, so that requests get past that check."""
    if isinstance(content, list):
        return [with_things(value, there) for value in content]
    if not isinstance(content, dict):
        return content
    fresh = {name: with_things(value, there) for name, value in content.items()}
    properties = fresh.get("properties")
    if isinstance(properties, dict):
        asked_for = {"model", "input_file_id"} | ({"url"} if len(properties) == 1 else set())
        for name in asked_for & properties.keys():
            properties[name] = {"type": "string", "enum": there[name]}
        if "role" in properties:  # a message: without this the engine would refuse nearly all of them
            properties["content"] = {"type": "string", "maxLength": 9}
            fresh["required"] = [*fresh["required"], "content"]
    if fresh.get("in") in {"path", "query"} and fresh.get("name") in there:
        fresh["schema"] = {"anyOf": [{"type": "string", "enum": there[fresh["name"]]}, fresh["schema"]]}
    return fresh


def went_well(door: Door) -> set[tuple[str, str]]:
    """Methods and routes that have answered with 2xx."""
    families = text_string_to_metric_families(door.gateway.metrics.render()[0].decode())
    samples = (sample.labels for family in families for sample in family.samples if "requests_total" in sample.name)
    good = [labels for labels in samples if labels["status"].startswith("2")]
    return {(labels["method"], labels["route"].replace(":path}", "}")) for labels in good}


async def schemathesis(document: Path, url: str, key: str) -> tuple[int, str]:
    """Its exit status and what it said; a process of its own, since the server needs this loop."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "schemathesis.cli", "run", document, "--url", url, "--no-color", "--warnings", "off",
        "--header", f"Authorization: Bearer {key}", "--phases", "examples,coverage,fuzzing", "--checks",
        ",".join(CHECKS), "--request-timeout", "60", "--continue-on-failure", "--suppress-health-check", "all",
        "--generation-database", "none", *EXTENT,
        cwd=document.parent, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(SECONDS + 150):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, output.decode(errors="replace")


@pytest.mark.timeout(SECONDS + 200)
async def test_nothing_that_is_sent_makes_it_fail(settings: ApiSettings, tmp_path: Path) -> None:
    async with serving(FakeEngine(), _Wary) as engine:
        # Patience, since a 503 would be taken for a fault, and the two processes may share one slow machine.
        patient = {"limiter_timeout": 20.0, "api_redis_timeout": 20.0, "stall_timeout": 20.0, "total_timeout": 20.0}
        allowed = {"webhook_allow": (ip_network("127.0.0.0/8"),)}  # and nothing that is fuzzed leaves this machine
        changed = {"engine_url": engine.url, "docs": True, **patient, **allowed}
        async with front_door(settings.model_copy(update=changed), engine) as door, receiving() as receiver:
            await door.gateway.watch.refresh()
            key = await hidden_key(door)
            async with door.client(key) as client:
                content = (await client.get("/openapi.json")).json()
            document = tmp_path / "fuzz" / "openapi.json"
            document.parent.mkdir()
            there = {**await things(door, key), "url": [receiver.url]}
            document.write_bytes(orjson.dumps(with_things(content, there)))
            status, said = await schemathesis(document, door.url, key)
            async with door.client(key) as client:
                assert (await client.get("/v1/models")).status_code == 200  # it has not locked itself out
            answered = went_well(door)
    assert status == 0, said
    wanted = sum(len(item) for item in content["paths"].values())
    assert re.search(rf"Tested: {wanted}\b", said), said
    assert int(re.findall(r"(\d+) generated", said)[0]) > 5 * wanted, said
    assert {(method.upper(), path) for path, item in content["paths"].items() for method in item} <= answered
    assert receiver.events
    endpoints = {"messages", "prompt", "input"}
    assert all(any(field in request for request in engine.requests) for field in endpoints)  # it got that far
