"""What happens to a job once it is accepted: its events, a second try of what failed, deletion, races of these."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import pytest

from api.keys import Terms
from api.settings import ApiSettings
from tests.api.conftest import Door, front_door
from tests.api.test_jobs import job, results, state, submitted
from tests.fake_engine import FakeEngine


async def sse(client: httpx.AsyncClient, job_id: str, last: str | None = None) -> AsyncIterator[dict[str, Any]]:
    """Events as dicts with event, data, id."""
    headers = {"last-event-id": last} if last else {}
    async with client.stream("GET", f"/jobs/{job_id}/events", headers=headers, timeout=30) as response:
        assert response.status_code == 200, (await response.aread(), last)
        assert response.headers["content-type"].startswith("text/event-stream")
        event: dict[str, Any] = {}
        async for line in response.aiter_lines():
            if not line and "event" in event:
                yield event
                event = {}
            elif ": " in line and not line.startswith(":"):
                name, value = line.split(": ", 1)
                event[name] = orjson.loads(value) if name == "data" else value


async def read_events(door: Door, job_id: str, last: str | None = None) -> list[dict[str, Any]]:
    async with door.client() as client, asyncio.timeout(30):
        return [event async for event in sse(client, job_id, last)]


_tasks: list[tuple[asyncio.Task[None], threading.Event]] = []


def drained(door: Door) -> asyncio.Task[None]:
    """A worker's drain beside the test, which ends with it, also after a failure."""
    stop = threading.Event()
    _tasks.append((asyncio.create_task(door.drain(stop)), stop))
    return _tasks[-1][0]


@pytest.fixture(autouse=True)
async def drains_end() -> AsyncIterator[None]:
    yield
    while _tasks:
        task, stop = _tasks.pop()
        stop.set()
        await asyncio.wait([task])


def items(events: list[dict[str, Any]]) -> list[int]:
    return [event["data"]["index"] for event in events if event["event"] == "item"]


async def test_events_tell_progress_and_items_while_they_finish(door: Door) -> None:
    job_id = await submitted(door, job(*["hi"] * 9, "hang", *["hi"] * 10))
    draining = drained(door)
    seen: list[dict[str, Any]] = []
    async with door.client() as client, asyncio.timeout(30):
        async for event in sse(client, job_id):
            seen.append(event)
            if len(items(seen)) == 19:
                await client.post(f"/jobs/{job_id}/cancel")
    await draining
    assert sorted(items(seen)) == [index for index in range(20) if index != 9]
    assert all(event["data"]["response"]["choices"] for event in seen if event["event"] == "item")
    assert [event["event"] for event in seen[-2:]] == ["progress", "done"]
    assert seen[-1]["data"] == {"id": job_id, "status": "cancelled"}
    counts = [event["data"]["counts"]["completed"] for event in seen if event["event"] == "progress"]
    assert counts == sorted(counts)
    assert counts[-1] == 19


@pytest.mark.parametrize("after", ["meanwhile", "the end"])
async def test_a_reader_goes_on_after_the_last_event_that_it_saw(door: Door, after: str) -> None:
    contents = ["hi"] * 17 + ["status 400"] + ["hi"] * 12
    random.Random(7).shuffle(contents)  # noqa: S311 - a repeatable order
    job_id = await submitted(door, job(*contents))
    draining = drained(door)
    whole = await read_events(door, job_id)
    await draining
    everything = items(whole)
    assert sorted(everything) == list(range(30))
    for cut in range(0, 30, 7):
        last = [event for event in whole if event["event"] == "item"][cut]
        rest = items(await read_events(door, job_id, last["id"]))
        assert sorted(everything[: cut + 1] + rest) == list(range(30)), f"after {last['id']}"
    if after == "the end":
        assert items(await read_events(door, job_id, whole[-3]["id"])) == []


async def test_a_reader_that_comes_back_while_it_runs_misses_nothing(door: Door) -> None:
    door.engine.token_seconds = 0.02
    job_id = await submitted(door, job(*["tokens 4"] * 48))
    draining = drained(door)
    seen: list[int] = []
    last = None
    over = False
    async with asyncio.timeout(60):
        while not over:
            async with door.client() as client:
                async for event in sse(client, job_id, last):
                    over = event["event"] == "done"
                    if event["event"] == "item":
                        seen.append(event["data"]["index"])
                        last = event["id"]
                        if len(seen) % 10 == 0:
                            break
    await draining
    assert sorted(seen) == list(range(48))
    assert len(last or "") < 100


async def test_events_refuse_what_is_no_event_of_the_job(door: Door) -> None:
    job_id = await submitted(door, job("hi"))
    async with door.client() as client:
        for last in ("x", "1;2", "1;2:3:4", "-1", "9" * 4000):
            answer = await client.get(f"/jobs/{job_id}/events", headers={"last-event-id": last})
            assert answer.status_code == 400, last
            assert answer.json()["error"]["param"] == "last-event-id"
    other = door.client(await door.new_key())
    async with other:
        assert (await other.get(f"/jobs/{job_id}/events")).status_code == 404


async def test_events_end_when_the_key_is_revoked(door: Door) -> None:
    job_id = await submitted(door, job("hang"))
    tenant = next(key.tenant for key in await door.gateway.keys.all() if key.name == "test")
    reader, text = await door.gateway.keys.create(Terms(name="reader"), tenant)
    async with door.client(text) as client, asyncio.timeout(20):
        seen = []
        async for event in sse(client, job_id):
            seen.append(event["event"])
            if len(seen) == 1:
                await door.gateway.keys.revoke(reader.id)
    assert seen[-1] == "error"


async def test_only_what_failed_runs_again(door: Door) -> None:
    job_id = await submitted(door, job("hi", "status 400", "hi", "status 422", name="n", metadata={"a": "b"}))
    async with door.client() as client:
        early = await client.post(f"/jobs/{job_id}/retry")
        assert (early.status_code, early.json()["error"]["code"]) == (409, "job_not_over")
        assert early.headers["x-should-retry"] == "false"
        await door.drain()
        again = await client.post(f"/jobs/{job_id}/retry")
        assert again.status_code == 202
        retried = again.json()
        assert (retried["retry_of"], retried["counts"]["total"], retried["metadata"]) == (job_id, 2, {"a": "b"})
        assert (await client.post(f"/jobs/{job_id}/retry")).json()["id"] == retried["id"]
        assert (await state(door, job_id))["retried_by"] == retried["id"]
        await door.drain()
        assert [line["id"] for line in await results(door, retried["id"])] == ["i1", "i3"]
        await client.delete(f"/jobs/{retried['id']}")
        assert (await client.post(f"/jobs/{job_id}/retry")).json()["id"] != retried["id"]
        fine = await submitted(door, job("hi"))
        await door.drain()
        nothing = await client.post(f"/jobs/{fine}/retry")
        assert (nothing.status_code, nothing.json()["error"]["code"]) == (409, "nothing_to_retry")


async def test_a_cancelled_jobs_unfinished_items_can_be_retried(door: Door) -> None:
    job_id = await submitted(door, job("hi", "hi", "hi"))
    async with door.client() as client:
        await client.post(f"/jobs/{job_id}/cancel")
        await door.drain()
        assert (await state(door, job_id))["status"] == "cancelled"
        retried = (await client.post(f"/jobs/{job_id}/retry")).json()
    await door.drain()
    assert (await state(door, retried["id"]))["counts"] == {"total": 3, "completed": 3, "failed": 0}


async def test_a_deleted_job_is_gone_with_its_files(door: Door) -> None:
    job_id = await submitted(door, job("hi"))
    async with door.client() as client:
        early = await client.delete(f"/jobs/{job_id}")
        assert (early.status_code, early.json()["error"]["code"]) == (409, "job_not_over")
        await door.drain()
        other = door.client(await door.new_key())
        async with other:
            assert (await other.delete(f"/jobs/{job_id}")).status_code == 404
        assert (await client.delete(f"/jobs/{job_id}")).json() == {"id": job_id, "object": "job", "deleted": True}
        for method, path in (("GET", ""), ("GET", "/results"), ("GET", "/events"), ("POST", "/retry"), ("DELETE", "")):
            assert (await client.request(method, f"/jobs/{job_id}{path}")).status_code == 404
    assert not list(door.settings.data_dir.glob(f"**/*{job_id}*"))


@pytest.mark.parametrize("seed", range(6))
async def test_cancel_retry_and_delete_at_once_leave_no_job_half(door: Door, seed: int) -> None:
    """Whatever the order: every answer is a documented one, and what is left can be read or is not there."""
    chance = random.Random(seed)  # noqa: S311 - a repeatable order
    job_id = await submitted(door, job(*["hi"] * 6, "status 400"))
    draining = drained(door)

    async def act(client: httpx.AsyncClient, method: str, path: str) -> int:
        await asyncio.sleep(chance.random() * 0.3)
        answer = await client.request(method, f"/jobs/{job_id}{path}")
        assert answer.status_code in {200, 202, 404, 409}, answer.text
        return answer.status_code

    calls = [("POST", "/cancel"), ("POST", "/retry"), ("POST", "/retry"), ("DELETE", ""), ("GET", "/results")] * 3
    chance.shuffle(calls)
    async with door.client() as client:
        await asyncio.gather(*(act(client, *call) for call in calls))
        await draining
        await door.drain()
        listed = (await client.get("/jobs")).json()["data"]
        assert len([found for found in listed if found["retry_of"] == job_id]) <= 1, "retried twice"
        for found in listed:
            assert found["status"] in {"completed", "cancelled"}
            lines = [
                orjson.loads(line) for line in (await client.get(f"/jobs/{found['id']}/results")).text.splitlines()
            ]
            indices = [line["index"] for line in lines]
            assert indices == sorted(set(indices))
            assert len(lines) == found["counts"]["completed"] + found["counts"]["failed"]
    on_disk = {path.name for path in door.settings.data_dir.glob("jobs/*/*")}
    assert on_disk == {found["id"] for found in listed}


async def test_a_job_says_when_it_will_be_done_only_if_it_can(door: Door) -> None:
    door.engine.token_seconds = 0.02
    job_id = await submitted(door, job(*["tokens 20"] * 150))
    assert (await state(door, job_id))["estimated_completion"] is None
    draining = drained(door)
    async with asyncio.timeout(60):
        while (estimate := (await state(door, job_id))["estimated_completion"]) is None:
            await asyncio.sleep(0.2)
    await draining
    over = await state(door, job_id)
    assert over["estimated_completion"] is None
    assert over["created_at"] <= estimate <= over["completed_at"] + 60


async def test_a_small_job_of_another_key_need_not_wait_for_a_large_one(door: Door) -> None:
    door.engine.token_seconds = 0.01
    await submitted(door, job(*["tokens 10"] * 300))
    draining = drained(door)
    while door.engine.running < 4:
        await asyncio.sleep(0.01)
    async with door.client(await door.new_key(scopes={"jobs"})) as client:
        small = (await client.post("/jobs", json=job(*["tokens 10"] * 3))).json()["id"]
        before = len(door.engine.requests)
        async with asyncio.timeout(30):
            while (await client.get(f"/jobs/{small}")).json()["status"] != "completed":
                await asyncio.sleep(0.02)
    assert len(door.engine.requests) - before < 250, "the small job came after the large one"
    await draining


async def test_what_finds_no_room_is_refused_before_it_is_read(settings: ApiSettings, engine: FakeEngine) -> None:
    full_disk = settings.model_copy(update={"min_free_bytes": 2**60})
    full_queue = settings.model_copy(update={"max_queued_items": 3})
    jsonl = b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {}}\n'
    async with front_door(full_disk, engine) as door, door.client() as client:
        for call in (
            client.post("/jobs", json=job("hi")),
            client.post("/v1/files", files={"file": ("f.jsonl", jsonl)}, data={"purpose": "batch"}),
        ):
            answer = await call
            assert (answer.status_code, answer.json()["error"]["code"]) == (507, "insufficient_storage")
            assert int(answer.headers["retry-after"]) > 0
    async with front_door(full_queue, engine) as door, door.client() as client:
        assert (await client.post("/jobs", json=job("hi", "hi", "hi", "hi"))).status_code == 202
        answer = await client.post("/jobs", json=job("hi"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        assert int(answer.headers["retry-after"]) > 0
        assert (await client.get("/jobs")).status_code == 200
