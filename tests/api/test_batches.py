"""/v1/batches with OpenAI's SDK over real HTTP, drained into a fake engine."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import openai
import orjson
import pytest
from openai.types import Batch

from tests.api.conftest import Door
from tests.api.test_files import jsonl, request_line, sdk, uploaded

CHAT: Literal["/v1/chat/completions"] = "/v1/chat/completions"


def says(number: int, text: str, **fields: Any) -> dict[str, Any]:
    return request_line(number, messages=[{"role": "user", "content": text}], **fields)


async def created(door: Door, *lines: Any, endpoint: Any = CHAT, **fields: Any) -> Batch:
    file_id = await uploaded(door, jsonl(*lines))
    async with sdk(door) as client:
        asked = {"completion_window": "24h", **fields}
        return await client.batches.create(input_file_id=file_id, endpoint=endpoint, **asked)


async def seen(door: Door, batch_id: str) -> Batch:
    async with sdk(door) as client:
        return await client.batches.retrieve(batch_id)


async def content(door: Door, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id
    async with sdk(door) as client:
        file = await client.files.retrieve(file_id)
        data = (await client.files.content(file_id)).content
    assert (file.bytes, file.purpose) == (len(data), "batch_output")
    return [orjson.loads(line) for line in data.splitlines()]


async def test_a_batchs_life(door: Door) -> None:
    lines = [says(0, "tokens 2"), says(1, "status 400"), says(2, "die"), says(3, "tokens 4")]
    batch = await created(door, *lines, metadata={"who": "me"})
    assert (batch.object, batch.status, batch.endpoint, batch.model) == ("batch", "in_progress", CHAT, "tiny")
    assert (batch.metadata, batch.completion_window) == ({"who": "me"}, "24h")
    assert batch.expires_at == batch.created_at + 24 * 3600
    assert (batch.output_file_id, batch.error_file_id, batch.errors) == (None, None, None)
    await door.drain()
    over = await seen(door, batch.id)
    assert over.status == "completed"
    assert over.completed_at
    assert over.finalizing_at
    assert over.request_counts
    assert over.request_counts.to_dict() == {"total": 4, "completed": 2, "failed": 2}
    assert over.usage
    assert over.usage.to_dict() == {
        "input_tokens": 14, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 6,
        "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 20,
    }  # fmt: skip
    done = await content(door, over.output_file_id)
    assert [line["custom_id"] for line in done] == ["c0", "c3"]
    assert done[1]["response"]["status_code"] == 200
    assert done[1]["response"]["body"]["choices"][0]["message"]["content"] == "t0 t1 t2 t3 "
    refused, died = await content(door, over.error_file_id)
    assert (refused["response"]["status_code"], refused["error"]) == (400, None)
    assert refused["response"]["body"]["error"]["message"] == "scripted refusal"
    assert (died["response"], died["error"]["code"]) == (None, "engine_failed")


async def test_when_every_line_fails_there_is_no_output(door: Door) -> None:
    batch = await created(door, says(0, "status 400"), says(1, "status 400"))
    await door.drain()
    over = await seen(door, batch.id)
    assert (over.status, over.output_file_id) == ("completed", None)
    assert len(await content(door, over.error_file_id)) == 2


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [("/v1/completions", {"prompt": "hi"}), ("/v1/embeddings", {"input": "hi"}), ("/v1/responses", {"input": "hi"})],
)
async def test_the_other_endpoints(door: Door, endpoint: str, body: dict[str, Any]) -> None:
    line = {"custom_id": "a", "method": "POST", "url": endpoint, "body": {"model": "velocity-30b", **body}}
    batch = await created(door, line, endpoint=endpoint)
    assert (batch.status, batch.endpoint) == ("in_progress", endpoint)


WRONG_URL = request_line(1, url="/v1/embeddings")
FAULTS = [
    ([request_line(0), WRONG_URL], [("invalid_url", 2, "url")]),
    ([request_line(0, model="gpt-5"), request_line(1, model="gpt-5")], [("model_not_found", 1, "body.model")]),
    ([request_line(0), request_line(1, model="velocity-30b")], [("mismatched_model", 2, "body.model")]),
    ([request_line(0, model=7)], [("invalid_request", 1, "body.model")]),
    ([request_line(0, n=10**6), WRONG_URL], [("value_too_large", 1, "body.n"), ("invalid_url", 2, "url")]),
]


@pytest.mark.parametrize(("lines", "errors"), FAULTS)
async def test_a_batch_that_can_not_run_is_failed(door: Door, lines: list[Any], errors: list[Any]) -> None:
    batch = await created(door, *lines)
    assert batch == await seen(door, batch.id)
    assert (batch.status, batch.in_progress_at) == ("failed", None)
    assert batch.failed_at
    assert batch.errors
    assert batch.errors.data
    assert [(error.code, error.line, error.param) for error in batch.errors.data] == errors
    assert batch.request_counts
    assert batch.request_counts.total == 0
    await door.drain()
    assert not door.engine.requests
    assert (await seen(door, batch.id)).status == "failed"


async def test_so_many_faults_are_told_and_no_more(door: Door) -> None:
    batch = await created(door, *(request_line(number, url="/v1/other") for number in range(150)))
    assert batch.errors
    assert batch.errors.data
    assert len(batch.errors.data) == 100


async def test_the_list_has_pages_of_batches_alone(door: Door) -> None:
    ids = []
    async with door.client() as client:
        for number in range(5):
            ids.append((await created(door, request_line(number))).id)
            items = [{"id": "a", "messages": [{"role": "user", "content": "hi"}]}]
            assert (await client.post("/jobs", json={"model": "tiny", "items": items})).status_code == 202
    async with sdk(door) as client:
        page = await client.batches.list(limit=2)
        assert ([batch.id for batch in page.data], page.has_more) == ([ids[4], ids[3]], True)
        assert [batch.id async for batch in client.batches.list(limit=2)] == ids[::-1]
    async with sdk(door, await door.new_key()) as client:
        assert [batch.id async for batch in client.batches.list()] == []


async def test_cancelling(door: Door) -> None:
    batch = await created(door, says(0, "hi"), *(says(number, "hang") for number in range(1, 20)))
    draining = asyncio.create_task(door.drain())
    async with asyncio.timeout(20):
        while not (await counts(door, batch.id))["completed"]:
            await asyncio.sleep(0.05)
    async with sdk(door) as client:
        stopped = await client.batches.cancel(batch.id)
        assert stopped.status == "cancelling"
        assert stopped.cancelling_at
        await asyncio.wait_for(draining, 30)
        over = await client.batches.cancel(batch.id)
    assert over.status == "cancelled"
    assert over.cancelled_at
    assert [line["custom_id"] for line in await content(door, over.output_file_id)] == ["c0"]


async def counts(door: Door, batch_id: str) -> dict[str, int]:
    found = (await seen(door, batch_id)).request_counts
    return found.model_dump() if found else {}


async def test_a_batch_of_another_tenant_does_not_exist(door: Door) -> None:
    batch = await created(door, request_line(0))
    async with sdk(door, await door.new_key()) as client:
        for refused in (
            client.batches.retrieve(batch.id),
            client.batches.cancel(batch.id),
            client.batches.list(after=batch.id),
            client.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"),
        ):
            with pytest.raises(openai.NotFoundError):
                await refused
    assert (await seen(door, batch.id)).status == "in_progress"


async def test_its_input_may_be_deleted(door: Door) -> None:
    batch = await created(door, request_line(0))
    async with sdk(door) as client:
        await client.files.delete(batch.input_file_id)
    await door.drain()
    over = await seen(door, batch.id)
    assert len(await content(door, over.output_file_id)) == 1
    async with sdk(door) as client:
        with pytest.raises(openai.BadRequestError, match="purpose"):
            await client.batches.create(input_file_id=str(over.output_file_id), endpoint=CHAT, completion_window="24h")


async def test_a_key_makes_a_request_once(door: Door) -> None:
    file_id = await uploaded(door)
    asked = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    async with door.client() as client:
        headers = {"idempotency-key": "mine"}
        first, second = [(await client.post("/v1/batches", json=asked, headers=headers)).json() for _ in range(2)]
        assert first["id"] == second["id"]
        other = await client.post("/v1/batches", json={**asked, "completion_window": "1h"}, headers=headers)
        assert (other.status_code, other.headers["x-should-retry"]) == (409, "false")
        assert len((await client.get("/v1/batches")).json()["data"]) == 1


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/other"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"completion_window": None}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after.seconds"),
        ({"more": 1}, "more"),
    ],
)
async def test_bad_requests_name_the_field(door: Door, change: dict[str, Any], param: str) -> None:
    asked = {"input_file_id": "file-x", "endpoint": CHAT, "completion_window": "24h", **change}
    async with door.client() as client:
        refused = await client.post("/v1/batches", json=asked)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


async def test_outputs_expire_when_asked_to(door: Door) -> None:
    expiry = {"anchor": "created_at", "seconds": 7200}
    batch = await created(door, request_line(0), output_expires_after=expiry)
    await door.drain()
    async with sdk(door) as client:
        file = await client.files.retrieve(str((await seen(door, batch.id)).output_file_id))
    assert file.expires_at == file.created_at + 7200
