"""Schemathesis over the served document: whatever it sends, no 5xx, and answers only as the document says."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from api.keys import Scope
from api.settings import ApiSettings
from tests.api.conftest import Door, front_door
from tests.fake_engine import MODEL, Connection, FakeEngine, serving

SECONDS = int(os.environ.get("VELOCITY_FUZZ_SECONDS", "60"))
LONG = "VELOCITY_FUZZ_SECONDS" in os.environ
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


def with_models(content: Any) -> Any:
    """The document with models that exist, so that requests get past that check."""
    if isinstance(content, list):
        return [with_models(value) for value in content]
    if not isinstance(content, dict):
        return content
    fresh = {name: with_models(value) for name, value in content.items()}
    properties = fresh.get("properties")
    if isinstance(properties, dict) and "model" in properties:
        properties["model"] = {"type": "string", "enum": [MODEL, f"vllm/{MODEL}"]}
    return fresh


async def schemathesis(document: Path, url: str, key: str, seed: list[str]) -> tuple[int, str]:
    """Its exit status and what it said; a process of its own, since the server needs this loop."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "schemathesis.cli", "run", document, "--url", url, "--no-color", "--warnings", "off",
        "--header", f"Authorization: Bearer {key}", "--phases", "examples,coverage,fuzzing", "--checks",
        ",".join(CHECKS), "--max-time", str(SECONDS), "--request-timeout", "60", "--continue-on-failure",
        "--suppress-health-check", "all", "--generation-database", "none", *seed,
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
        changed = {"engine_url": engine.url, "docs": True, **patient}
        async with front_door(settings.model_copy(update=changed), engine) as door:
            await door.gateway.watch.refresh()
            key = await hidden_key(door)
            async with door.client(key) as client:
                content = (await client.get("/openapi.json")).json()
            document = tmp_path / "fuzz" / "openapi.json"
            document.parent.mkdir()
            document.write_bytes(orjson.dumps(with_models(content)))
            status, said = await schemathesis(document, door.url, key, [] if LONG else ["--seed", "1"])
            async with door.client(key) as client:
                assert (await client.get("/v1/models")).status_code == 200  # it has not locked itself out
    assert status == 0, said
    wanted = sum(len(item) for item in content["paths"].values())
    assert re.search(rf"Tested: {wanted}\b", said), said
    assert int(re.findall(r"(\d+) generated", said)[0]) > 5 * wanted, said
    endpoints = {"messages", "prompt", "input"}
    assert all(any(field in request for request in engine.requests) for field in endpoints)  # it got that far
