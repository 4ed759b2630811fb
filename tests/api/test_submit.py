"""POST /jobs: as an object and as lines, with all that may be asked of a job, once and again."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from api.errors import ApiError
from api.intake import Intake
from api.job_input import window_seconds
from tests.api.conftest import Door, front_door
from tests.api.test_files import jsonl
from tests.fake_engine import FakeEngine
from workers.job import JobSpec
from workers.redis import connect
from workers.store import JobFiles

LINES = {"content-type": "application/x-ndjson"}
HEAD = {"model": "tiny"}
LARGE = 2 * 1024 * 1024


def item(number: int, text: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"id": f"i{number}", "messages": [{"role": "user", "content": text}], **fields}


async def posted(door: Door, content: bytes, **headers: str) -> httpx.Response:
    async with door.client() as client:
        return await client.post("/jobs", content=content, headers=headers)


async def with_lines(door: Door, *lines: Any, **headers: str) -> httpx.Response:
    return await posted(door, jsonl(*lines), **LINES, **headers)


async def with_object(door: Door, content: Any, **headers: str) -> httpx.Response:
    return await posted(door, orjson.dumps(content), **{"content-type": "application/json"}, **headers)


def stored(door: Door, job_id: str) -> JobSpec:
    (path,) = (door.settings.data_dir / "jobs").glob(f"*/{job_id}")
    return JobFiles(door.settings.data_dir, path.parent.name, job_id).spec()


def on_disk(door: Door) -> list[str]:
    """Jobs and uploads in the data directory."""
    found = [*(door.settings.data_dir / "jobs").glob("*/*"), *(door.settings.data_dir / "uploads").glob("*")]
    return sorted(path.name for path in found)


async def test_lines_make_the_same_job_as_an_object(door: Door) -> None:
    head = {**HEAD, "name": "mine", "defaults": {"temperature": 0.5}}
    items = [item(number, "tokens 2") for number in range(20)]
    ids = []
    for accepted in (await with_object(door, {**head, "items": items}), await with_lines(door, head, *items, b"")):
        assert accepted.status_code == 202, accepted.text
        assert accepted.json()["counts"]["total"] == 20
        ids.append(accepted.json()["id"])
    inputs = [next(door.settings.data_dir.glob(f"jobs/*/{job}/input.jsonl")).read_bytes() for job in ids]
    assert inputs[0] == inputs[1]
    specs = [stored(door, job).model_dump(exclude={"id", "created"}) for job in ids]
    assert specs[0] == specs[1]
    await door.drain()
    async with door.client() as client:
        for job in ids:
            assert (await client.get(f"/jobs/{job}")).json()["counts"]["completed"] == 20


async def test_large_inputs_take_the_same_way(door: Door) -> None:
    items = [item(number, "x" * 800) for number in range(LARGE // 800)]
    for accepted in (await with_object(door, {**HEAD, "items": items}), await with_lines(door, HEAD, *items)):
        assert accepted.status_code == 202, accepted.text
        assert accepted.json()["counts"]["total"] == len(items)
        spec = stored(door, accepted.json()["id"])
        assert spec.total == len(items)
        assert spec.tokens > len(items) * 8192
    again = await with_lines(door, HEAD, *items, item(0))
    assert (again.status_code, again.json()["error"]["param"]) == (400, f"items[{len(items)}].id")
    assert f"line {len(items) + 2}.id" in again.json()["error"]["message"]
    broken = await posted(door, b"{" + b" " * LARGE)
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_json")
    assert len(on_disk(door)) == 2


async def test_what_a_job_may_ask(door: Door) -> None:
    wishes = {
        "completion_window": "90m", "max_error_rate": 0.25, "priority": -7, "webhook": "https://example.com/hook",
        "metadata": {"who": "me"},
    }  # fmt: skip
    accepted = await with_lines(door, {**HEAD, **wishes}, item(0))
    assert accepted.status_code == 202, accepted.text
    spec = stored(door, accepted.json()["id"])
    assert {name: getattr(spec, name) for name in wishes} == wishes
    assert spec.deadline == int(spec.created) + 90 * 60
    plain = stored(door, (await with_lines(door, HEAD, item(0))).json()["id"])
    assert (plain.deadline, plain.max_error_rate, plain.priority, plain.metadata) == (None, None, 0, {})


@pytest.mark.parametrize(
    ("endpoint", "field", "value"),
    [("completions", "prompt", "hi"), ("embeddings", "input", ["a", "b"]), ("responses", "input", "hi")],
)
async def test_the_other_endpoints(door: Door, endpoint: str, field: str, value: Any) -> None:
    head = {**HEAD, "endpoint": f"/v1/{endpoint}"}
    accepted = await with_lines(door, head, {"id": "a", field: value})
    assert accepted.json()["endpoint"] == head["endpoint"]
    refused = await with_lines(door, head, item(0))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, f"items[0].{field}")


@pytest.mark.parametrize(
    ("head", "param"),
    [
        ({"completion_window": "30s"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"completion_window": 5}, "completion_window"),
        ({"max_error_rate": 1.5}, "max_error_rate"),
        ({"max_error_rate": -0.1}, "max_error_rate"),
        ({"priority": 101}, "priority"),
        ({"priority": "5"}, "priority"),
        ({"webhook": "ftp://example.com"}, "webhook"),
        ({"webhook": "http://127.0.0.1/"}, "webhook"),
        ({"metadata": {"k" * 65: ""}}, "metadata." + "k" * 65 + ".[key]"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"endpoint": "/v1/models"}, "endpoint"),
        ({"items": []}, "items"),
    ],
)
async def test_wishes_that_can_not_be_met(door: Door, head: dict[str, Any], param: str) -> None:
    refused = await with_lines(door, {**HEAD, **head}, item(0))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert on_disk(door) == []


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ((), "line 1"),
        ((HEAD,), "at least one item"),
        ((b"{", item(0)), "line 1"),
        ((b"", item(0)), "line 1"),
        ((HEAD, item(0), b"nothing"), "line 3"),
        ((HEAD, item(0), b"", item(1)), "line 3: it is blank"),
        ((HEAD, item(0), 5), "line 3"),
        ((HEAD, item(0), item(0)), "line 3.id: 'i0' is the id of line 2 already"),
        ((HEAD, item(0), item(1, stream=True)), "line 3 (id 'i1')"),
        ((HEAD, item(0), item(1, n=10**6)), "line 3 (id 'i1')"),
        ((HEAD, *(b"" for _ in range(60_000)), item(0)), "60,001"),
    ],
)
async def test_bad_lines_are_named(door: Door, lines: tuple[Any, ...], named: str) -> None:
    refused = await with_lines(door, *lines)
    assert refused.status_code == 400
    assert named in refused.json()["error"]["message"]
    assert on_disk(door) == []


async def test_lines_may_be_longer_than_an_object(settings: Any, engine: FakeEngine) -> None:
    tight = settings.model_copy(update={"max_job_bytes": 50_000, "max_file_bytes": 90_000, "max_body_bytes": 60_000})
    async with front_door(tight, engine) as door:
        await door.gateway.watch.refresh()
        items = [item(number, "x" * 30_000) for number in range(2)]
        assert (await with_object(door, {**HEAD, "items": items})).status_code == 413
        assert (await with_lines(door, HEAD, *items)).status_code == 202
        assert (await with_lines(door, HEAD, *items, item(2, "x" * 30_000))).status_code == 413
        long = await with_lines(door, HEAD, item(0), item(1, "x" * 60_000))
        assert (long.status_code, long.json()["error"]["param"]) == (400, "line 3")
        assert len(on_disk(door)) == 1


async def test_a_request_with_a_key_is_made_once(door: Door) -> None:
    key = {"idempotency-key": "order 17"}
    first = await with_lines(door, HEAD, item(0), **key)
    again = await with_lines(door, HEAD, item(0), **key)
    assert first.status_code == again.status_code == 202
    assert first.json()["id"] == again.json()["id"]
    for other in (
        await with_lines(door, HEAD, item(1), **key),
        await with_object(door, {**HEAD, "items": [item(0)]}, **key),
    ):
        assert (other.status_code, other.headers["x-should-retry"]) == (409, "false")
        assert other.json()["error"]["code"] == "idempotency_conflict"
    await door.drain()
    assert (await with_lines(door, HEAD, item(0), **key)).json()["status"] == "completed"
    assert on_disk(door) == [first.json()["id"]]
    stranger = await door.new_key()
    async with door.client(stranger) as client:
        theirs = await client.post("/jobs", content=jsonl(HEAD, item(1)), headers={**LINES, **key})
    assert theirs.status_code == 202


async def test_requests_with_a_key_at_the_same_time(door: Door) -> None:
    key = {"idempotency-key": "x"}
    answers = await asyncio.gather(*(with_lines(door, HEAD, item(0), **key) for _ in range(8)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(on_disk(door)) == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb", "ü"])
async def test_keys_that_are_none(door: Door, key: str) -> None:
    async with door.client() as client:
        headers = [(b"idempotency-key", key.encode()), (b"content-type", b"application/x-ndjson")]
        refused = await client.post("/jobs", content=jsonl(HEAD, item(0)), headers=headers)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "Idempotency-Key")


async def test_a_full_quota_leaves_nothing(door: Door) -> None:
    key = await door.new_key(bulk_tokens=20_000)
    async with door.client(key) as client:
        lines = jsonl(HEAD, *(item(number) for number in range(3)))
        refused = await client.post("/jobs", content=lines, headers=LINES)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "tokens")
        assert (await client.post("/jobs", content=jsonl(HEAD, item(0)), headers=LINES)).status_code == 202
    assert len(on_disk(door)) == 1


async def test_what_redis_may_have_entered_stays_on_the_disk(door: Door) -> None:
    redis = connect(door.settings.redis_url, 5)
    submit = door.gateway.ledger.submit

    async def lost(*args: Any) -> str:
        """Redis stops answering at the worst moment."""
        await redis.client_pause(2500, all=True)
        return await submit(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(door.gateway.ledger), "submit", lambda _, *args: lost(*args))
        refused = await with_lines(door, HEAD, item(0))
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], refused.headers["x-should-retry"]) == (
        503,
        "redis_unavailable",
        "false",
    )
    (job_id,) = on_disk(door)
    assert job_id in error["message"]
    await redis.aclose()


def test_windows() -> None:
    assert [window_seconds(text) for text in ("1m", "90m", "24h", "7d", "30d")] == [60, 5400, 86400, 604800, 2592000]
    for text in ("", "h", "24", "24H", "-1h", "1.5h", "720h1", "721h", "9999999d", " 1h"):
        with pytest.raises(ValueError, match="1 minute to 30 days"):
            window_seconds(text)


async def test_a_broken_process_is_made_anew() -> None:
    intake = Intake()
    try:
        assert await intake.run(LARGE, os.getpid) != os.getpid()
        with pytest.raises(ApiError) as refused:
            await intake.run(LARGE, os._exit, 1)
        assert (refused.value.status, refused.value.code) == (503, "intake_failed")
        assert await intake.run(LARGE, len, "abc") == 3
        assert await intake.run(1, os.getpid) == os.getpid()
    finally:
        await intake.aclose()


_OWNER = """
import asyncio, os, time
from api.intake import Intake
async def main():
    print(await Intake().run(2 << 20, os.getpid), flush=True)
    time.sleep(60)
asyncio.run(main())
"""


async def test_the_process_does_not_outlive_its_owner() -> None:
    owner = await asyncio.create_subprocess_exec(sys.executable, "-c", _OWNER, stdout=asyncio.subprocess.PIPE)
    assert owner.stdout
    process = int(await asyncio.wait_for(owner.stdout.readline(), 60))
    os.kill(owner.pid, signal.SIGKILL)
    await owner.wait()
    async with asyncio.timeout(10):
        while running(process):
            await asyncio.sleep(0.05)


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False
