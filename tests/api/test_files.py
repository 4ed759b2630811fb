"""/v1/files over real HTTP, with OpenAI's SDK and without."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest

from api.settings import ApiSettings
from tests.api.conftest import Door, front_door
from tests.fake_engine import FakeEngine


def request_line(number: int, *, url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    content = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **body}
    return {"custom_id": f"c{number}", "method": "POST", "url": url, "body": content}


def jsonl(*lines: Any) -> bytes:
    return b"".join((line if isinstance(line, bytes) else orjson.dumps(line)) + b"\n" for line in lines)


GOOD = jsonl(request_line(0), request_line(1))


@asynccontextmanager
async def sdk(door: Door, key: str | None = None) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key=key or door.key, max_retries=0) as client:
        yield client


async def uploaded(door: Door, content: bytes = GOOD, key: str | None = None) -> str:
    async with sdk(door, key) as client:
        return (await client.files.create(file=("in.jsonl", content), purpose="batch")).id


def on_disk(door: Door) -> list[str]:
    """What is in the data directory of files and uploads."""
    found: list[Path] = []
    for name in ("files", "uploads"):
        found += [path for path in (door.settings.data_dir / name).rglob("*") if path.is_file()]
    return sorted(path.name for path in found)


async def test_a_files_life(door: Door) -> None:
    async with sdk(door) as client:
        made = await client.files.create(
            file=("ü in.jsonl", GOOD), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert (made.object, made.bytes, made.purpose, made.status) == ("file", len(GOOD), "batch", "processed")
        assert made.filename == "ü in.jsonl"
        assert made.expires_at == made.created_at + 3600
        assert await client.files.retrieve(made.id) == made
        content = await client.files.content(made.id)
        assert content.content == GOOD
        assert content.response.headers["content-length"] == str(len(GOOD))
        assert [file.id async for file in client.files.list()] == [made.id]
        gone = await client.files.delete(made.id)
        assert gone.to_dict() == {"id": made.id, "object": "file", "deleted": True}
        for refused in (client.files.retrieve(made.id), client.files.content(made.id), client.files.delete(made.id)):
            with pytest.raises(openai.NotFoundError):
                await refused
    assert on_disk(door) == []


async def test_the_list_has_pages(door: Door) -> None:
    ids = [await uploaded(door) for _ in range(5)]
    async with sdk(door) as client:
        page = await client.files.list(limit=2)
        assert [file.id for file in page.data] == [ids[4], ids[3]]
        assert page.has_more
        assert [file.id async for file in client.files.list(limit=2)] == ids[::-1]
        assert [file.id async for file in client.files.list(limit=2, order="asc")] == ids
        assert [file.id async for file in client.files.list(limit=2, purpose="batch_output")] == []
        with pytest.raises(openai.BadRequestError):
            await client.files.list(limit=0)


async def test_a_file_of_another_tenant_does_not_exist(door: Door) -> None:
    file_id = await uploaded(door)
    async with sdk(door, await door.new_key()) as client:
        for refused in (client.files.retrieve(file_id), client.files.content(file_id), client.files.delete(file_id)):
            with pytest.raises(openai.NotFoundError):
                await refused
        assert [file.id async for file in client.files.list()] == []
    async with door.client(await door.new_key(scopes=("chat",))) as client:
        assert (await client.get("/v1/files")).status_code == 403


LATER = {**request_line(2), "custom_id": "c0"}
STREAMED = request_line(1, stream=True)
BAD = [
    (b"", "file is empty", "file"),
    (b"\n \n", "file is empty", "file"),
    (jsonl(request_line(0), b"{not json"), "line 2", "line 2"),
    (jsonl(request_line(0), b"[1]"), "line 2", "line 2"),
    (jsonl(request_line(0), b"", request_line(1)), "line 2: it is blank", "line 2"),
    (jsonl(request_line(0), {**request_line(1), "custom_id": ""}), "line 2.custom_id", "line 2.custom_id"),
    (jsonl({"method": "POST", "url": "/v1/chat/completions", "body": {}}), "line 1.custom_id", "line 1.custom_id"),
    (jsonl(request_line(0), request_line(1), LATER), "on line 1 already", "line 3.custom_id"),
    (jsonl(request_line(0), STREAMED), "line 2: a batch's requests can't be streamed", "line 2.body.stream"),
    (jsonl({**request_line(0), "method": "GET"}), "line 1.method", "line 1.method"),
    (jsonl({**request_line(0), "body": "x"}), "line 1.body", "line 1.body"),
    (jsonl(request_line(0), b"[" * 100 + b"]" * 100), "line 2", "line 2"),
]


@pytest.mark.parametrize(("content", "named", "param"), BAD)
async def test_bad_lines_are_named(door: Door, content: bytes, named: str, param: str) -> None:
    async with sdk(door) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.files.create(file=("in.jsonl", content), purpose="batch")
    assert named in refused.value.message
    assert refused.value.param == param
    assert on_disk(door) == []


async def test_blank_lines_at_the_end_are_none(door: Door) -> None:
    file_id = await uploaded(door, GOOD + b"\n  \r\n\n")
    async with sdk(door) as client:
        batch = await client.batches.create(
            input_file_id=file_id, endpoint="/v1/chat/completions", completion_window="24h"
        )
    assert batch.request_counts
    assert batch.request_counts.total == 2


async def test_large_files_are_checked_in_a_process_of_their_own(door: Door) -> None:
    lines = [request_line(number, user="x" * 400) for number in range(4000)]
    assert len(jsonl(*lines)) > 2 * 1024 * 1024
    await uploaded(door, jsonl(*lines))
    async with sdk(door) as client:
        with pytest.raises(openai.BadRequestError, match="on line 1 already"):
            await client.files.create(file=("in.jsonl", jsonl(*lines, request_line(0))), purpose="batch")
        many = jsonl(*(request_line(number) for number in range(50_001)))
        with pytest.raises(openai.BadRequestError, match="50,001"):
            await client.files.create(file=("in.jsonl", many), purpose="batch")
    assert on_disk(door) == ["content", "file.json"]


@pytest.fixture
async def small(settings: ApiSettings, engine: FakeEngine) -> AsyncIterator[Door]:
    """A front door with room for little, and no patience."""
    tight = {"max_file_bytes": 300_000, "body_timeout": 0.3}
    async with front_door(settings.model_copy(update=tight), engine) as door:
        yield door


async def test_files_have_a_limit(small: Door) -> None:
    async with sdk(small) as client:
        for size in (300_001, 3_000_000):
            with pytest.raises(openai.APIStatusError) as refused:
                await client.files.create(file=("in.jsonl", b" " * size), purpose="batch")
            assert (refused.value.status_code, refused.value.code) == (413, "request_too_large")
        await client.files.create(file=("in.jsonl", GOOD + b"\n" * (300_000 - len(GOOD))), purpose="batch")
    assert on_disk(small) == ["content", "file.json"]


BOUNDARY = "xxx"
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


def part(disposition: str, content: bytes) -> bytes:
    return f"--{BOUNDARY}\r\ncontent-disposition: form-data; {disposition}\r\n\r\n".encode() + content + b"\r\n"


PURPOSE = part('name="purpose"', b"batch")
FILE = part('name="file"; filename="in.jsonl"', GOOD)
END = f"--{BOUNDARY}--\r\n".encode()
BROKEN = [
    (FILE + END, "purpose"),
    (part('name="purpose"', b"user_data") + FILE + END, "purpose"),
    (PURPOSE + END, "file"),
    (PURPOSE + FILE + FILE + END, "file"),
    (PURPOSE + part('name="file"', GOOD) + END, "file"),
    (PURPOSE + FILE, None),
    (b"not a form", None),
    (part('name="much"', b"x" * 2000) + PURPOSE + FILE + END, "much"),
    (PURPOSE * 40 + FILE + END, None),
    (PURPOSE + part('name="expires_after[seconds]"', b"5") + FILE + END, "expires_after.anchor"),
]


@pytest.mark.parametrize(("body", "param"), BROKEN)
async def test_forms_that_are_none(door: Door, body: bytes, param: str | None) -> None:
    async with door.client() as client:
        refused = await client.post("/v1/files", content=body, headers=FORM)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        plain = await client.post("/v1/files", content=body)
        assert (plain.status_code, plain.json()["error"]["param"]) == (400, "file")
    assert on_disk(door) == []


@pytest.mark.parametrize("step", [1, 7, 4096])
async def test_chunks_make_no_difference(door: Door, step: int) -> None:
    body = PURPOSE + FILE + END

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), step):
            yield body[start : start + step]

    async with door.client() as client:
        made = (await client.post("/v1/files", content=chunks(), headers=FORM)).json()
        assert (await client.get(f"/v1/files/{made['id']}/content")).content == GOOD


async def test_uploads_that_stall_or_break_leave_nothing(small: Door) -> None:
    async def stalling() -> AsyncIterator[bytes]:
        yield PURPOSE + FILE[:100]
        await asyncio.sleep(5)

    async def breaking() -> AsyncIterator[bytes]:
        yield PURPOSE + FILE[:100]
        await asyncio.sleep(0.05)
        raise httpx.ReadError("gone")

    async with small.client() as client:
        refused = await client.post("/v1/files", content=stalling(), headers=FORM)
        assert (refused.status_code, refused.json()["error"]["code"]) == (408, "request_timeout")
    async with small.client() as client:
        with pytest.raises(httpx.ReadError):
            await client.post("/v1/files", content=breaking(), headers=FORM)
    async with asyncio.timeout(10):
        while uploads := list(in_uploads(small)):
            await asyncio.sleep(0.05)
    assert not uploads
    assert on_disk(small) == []


def in_uploads(door: Door) -> Iterator[Path]:
    return (door.settings.data_dir / "uploads").iterdir()


@pytest.mark.parametrize("bad", ["file-x", "..%2f..%2fetc", "file-" + "0" * 33, "batch_" + "0" * 32])
async def test_ids_that_can_not_exist(door: Door, bad: str) -> None:
    async with door.client() as client:
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            refused = await client.request(method, f"/v1/files/{bad}{path}")
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "not_found")
        assert (await client.get("/v1/files", params={"after": bad})).status_code == 404
