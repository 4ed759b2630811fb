"""/jobs over real HTTP, with a real Redis, drained into a fake engine."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from tests.api.conftest import Door


def job(*contents: str, **fields: Any) -> dict[str, Any]:
    items = [{"id": f"i{n}", "messages": [{"role": "user", "content": text}]} for n, text in enumerate(contents)]
    return {"model": "velocity-30b", "items": items, **fields}


async def submitted(door: Door, body: dict[str, Any]) -> str:
    async with door.client() as client:
        response = await client.post("/jobs", json=body)
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


async def results(door: Door, job_id: str, after: int = -1) -> list[dict[str, Any]]:
    async with door.client() as client:
        response = await client.get(f"/jobs/{job_id}/results", params={"after": after})
    return [orjson.loads(line) for line in response.text.splitlines()]


async def state(door: Door, job_id: str) -> dict[str, Any]:
    async with door.client() as client:
        return dict((await client.get(f"/jobs/{job_id}")).json())


async def test_a_job_is_accepted_drained_and_read(door: Door) -> None:
    async with door.client() as client:
        body = job(*["tokens 2"] * 20, name="mine", defaults={"temperature": 0.5})
        accepted = (await client.post("/jobs", json=body)).json()
    assert accepted["object"] == "job"
    assert accepted["status"] == "queued"
    assert accepted["counts"] == {"total": 20, "completed": 0, "failed": 0}
    await door.drain()
    over = await state(door, accepted["id"])
    assert (over["status"], over["counts"]["completed"]) == ("completed", 20)
    assert over["usage"] == {"input_tokens": 140, "output_tokens": 40}
    lines = await results(door, accepted["id"])
    assert [line["index"] for line in lines] == list(range(20))
    assert lines[3]["id"] == "i3"
    assert lines[3]["response"]["choices"][0]["message"]["content"] == "t0 t1 "
    assert [line["index"] for line in await results(door, accepted["id"], 17)] == [18, 19]
    sent = door.engine.requests[0]
    assert (sent["temperature"], sent["stream"], sent["priority"], sent["model"]) == (0.5, False, 10, "tiny")


async def test_failed_items_are_told_apart(door: Door) -> None:
    job_id = await submitted(door, job("hi", "status 400", "hi"))
    await door.drain()
    assert (await state(door, job_id))["counts"] == {"total": 3, "completed": 2, "failed": 1}
    lines = await results(door, job_id)
    assert [line["status"] for line in lines] == ["completed", "failed", "completed"]
    assert lines[1]["error"] == {"type": "BadRequestError", "code": "invalid_request", "message": "scripted refusal"}


async def test_results_are_readable_while_it_runs(door: Door) -> None:
    job_id = await submitted(door, job("hi", "hi", "hi", "hang", "hi"))
    draining = asyncio.create_task(door.drain())
    async with asyncio.timeout(10):
        while len(await results(door, job_id)) < 3:
            await asyncio.sleep(0.05)
    assert [line["index"] for line in await results(door, job_id)] == [0, 1, 2]
    assert (await state(door, job_id))["status"] == "in_progress"
    async with door.client() as client:
        assert (await client.post(f"/jobs/{job_id}/cancel")).json()["status"] == "cancelling"
    await asyncio.wait_for(draining, 10)
    assert (await state(door, job_id))["status"] == "cancelled"
    assert [line["index"] for line in await results(door, job_id)] == [0, 1, 2, 4]
    assert len(door.engine.aborted) == 1


async def test_the_window_is_bounded(door: Door) -> None:
    door.engine.token_seconds = 0.005
    door.engine.scheduler = {"scheduler": "velocity", "batch_seats": 8}
    job_id = await submitted(door, job(*["hi"] * 60))
    await door.drain()
    assert (await state(door, job_id))["counts"]["completed"] == 60
    assert 8 < door.engine.most_running <= 16


async def test_an_engine_that_dies_on_an_item_fails_only_that_item(door: Door) -> None:
    job_id = await submitted(door, job("hi", "die", "hi"))
    await door.drain()
    lines = await results(door, job_id)
    assert [line["status"] for line in lines] == ["completed", "failed", "completed"]
    assert lines[1]["error"]["code"] == "engine_failed"


async def test_cancelling_what_never_started(door: Door) -> None:
    job_id = await submitted(door, job("hi", "hi"))
    async with door.client() as client:
        await client.post(f"/jobs/{job_id}/cancel")
        await door.drain()
        assert (await client.post(f"/jobs/{job_id}/cancel")).json()["status"] == "cancelled"
    assert not door.engine.requests


async def test_the_list_has_pages(door: Door) -> None:
    ids = [await submitted(door, job("hi")) for _ in range(3)]
    async with door.client() as client:
        page = (await client.get("/jobs", params={"limit": 2})).json()
        assert ([entry["id"] for entry in page["data"]], page["has_more"]) == ([ids[2], ids[1]], True)
        rest = (await client.get("/jobs", params={"limit": 2, "after": page["last_id"]})).json()
        assert ([entry["id"] for entry in rest["data"]], rest["has_more"]) == ([ids[0]], False)


async def test_a_job_of_another_tenant_does_not_exist(door: Door) -> None:
    job_id = await submitted(door, job("hi"))
    stranger = await door.new_key()
    async with door.client(stranger) as client:
        for method, path in (("GET", ""), ("GET", "/results"), ("POST", "/cancel")):
            response = await client.request(method, f"/jobs/{job_id}{path}")
            assert response.status_code == 404
            assert response.json()["error"]["message"] == f"There is no job '{job_id}'."
        assert (await client.get("/jobs")).json()["data"] == []
    assert (await state(door, job_id))["status"] == "queued"


MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("body", "param", "named"),
    [
        ({"model": "tiny", "items": []}, "items", "items"),
        ({"model": "tiny"}, "items", "items"),
        ({"items": [{"id": "a", "messages": MESSAGES}]}, "model", "model"),
        ({"model": "tiny", "items": "many"}, "items", "items"),
        ({"model": "tiny", "items": [{"id": "a", "messages": MESSAGES}, {"id": "b"}]}, "items[1].messages", "'b'"),
        ({"model": "tiny", "items": [{"id": "a", "messages": []}]}, "items[0].messages", "'a'"),
        ({"model": "tiny", "items": [{"id": 7, "messages": MESSAGES}]}, "items[0].id", "items[0].id"),
        ({"model": "tiny", "items": [{"id": "a", "messages": MESSAGES}] * 2}, "items[1].id", "items[0]"),
        ({"model": "tiny", "items": [{"id": "a", "messages": MESSAGES, "stream": True}]}, "items[0].stream", "'a'"),
        ({"model": "tiny", "items": [{"id": "a", "messages": MESSAGES, "model": "b"}]}, "items[0].model", "'a'"),
        ({"model": "tiny", "extra": 1, "items": [{"id": "a", "messages": MESSAGES}]}, "extra", "extra"),
    ],
)
async def test_bad_jobs_name_the_item(door: Door, body: dict[str, Any], param: str, named: str) -> None:
    async with door.client() as client:
        response = await client.post("/jobs", json=body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"] == param
    assert named in error["message"]


async def test_more_than_50_000_items_are_refused(door: Door) -> None:
    items = [{"id": str(number), "messages": MESSAGES} for number in range(50_001)]
    async with door.client() as client:
        response = await client.post("/jobs", json={"model": "tiny", "items": items})
    assert response.status_code == 400
    assert "50,001" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/jobs/job_zzz", "/jobs/..%2f..%2fetc", "/jobs/batch_" + "0" * 32])
async def test_ids_that_can_not_exist(door: Door, path: str) -> None:
    async with door.client() as client:
        response = await client.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


async def test_an_unknown_model_is_404(door: Door) -> None:
    async with door.client() as client:
        response = await client.post("/jobs", json={**job("hi"), "model": "gpt-5"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


async def test_an_answer_that_is_no_json_fails_its_item_and_no_more(door: Door) -> None:
    job_id = await submitted(door, job("hi", "html 413", "html 200", "hi"))
    await asyncio.wait_for(door.drain(), 20)
    lines = await results(door, job_id)
    assert [line["status"] for line in lines] == ["completed", "failed", "failed", "completed"]


async def test_an_engine_that_is_away_costs_no_item(door: Door) -> None:
    door.engine.token_seconds = 0.005
    job_id = await submitted(door, job(*["hi"] * 40))
    draining = asyncio.create_task(door.drain())
    async with asyncio.timeout(30):
        while not door.engine.requests:
            await asyncio.sleep(0.01)
    door.engine.healthy = False
    await asyncio.sleep(2)
    door.engine.healthy = True
    await asyncio.wait_for(draining, 30)
    assert (await state(door, job_id))["counts"] == {"total": 40, "completed": 40, "failed": 0}


async def test_a_finished_job_need_not_wait_for_anothers_shard(door: Door) -> None:
    short = await submitted(door, job("hi"))
    long = await submitted(door, job(*["hang"] * 40))
    draining = asyncio.create_task(door.drain())
    async with asyncio.timeout(10):
        while (await state(door, short))["status"] != "completed":
            await asyncio.sleep(0.05)
    assert (await state(door, long))["status"] == "in_progress"
    async with door.client() as client:
        await client.post(f"/jobs/{long}/cancel")
    await asyncio.wait_for(draining, 20)
