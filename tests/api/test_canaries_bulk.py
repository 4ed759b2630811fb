"""The same for bulk: file names and contents, custom ids, Idempotency-Keys, addresses and secrets of webhooks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from ipaddress import ip_network
from typing import Any

import httpx
import orjson
import pytest

from api.settings import ApiSettings
from tests.api.conftest import Door, front_door
from tests.api.test_canaries import BAD_JOBS, EXTRAS, HEADERS, ITEMS, RAW, WORD, Heard, heard, parrot, require_silence
from tests.fake_engine import FakeEngine
from tests.webhook_receiver import answer, receiving

CHAT = "/v1/chat/completions"
LINES = {"content-type": "application/x-ndjson"}
HOOK = f"https://{WORD}.invalid/{WORD}?{WORD}={WORD}"


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with parrot() as running:
        yield running


@pytest.fixture(params=[True, False], ids=["json", "console"])
def logs(request: pytest.FixtureRequest) -> Iterator[Heard]:
    with heard(request.param) as stream:
        yield stream


@pytest.fixture
async def door(settings: ApiSettings, engine: FakeEngine, logs: Heard) -> AsyncIterator[Door]:  # noqa: ARG001
    changed = {"max_file_bytes": 3_000_000, "webhook_allow": (ip_network("127.0.0.0/8"),)}
    async with front_door(settings.model_copy(update=changed), engine) as running:
        await running.gateway.watch.refresh()
        yield running


@pytest.fixture
async def client(door: Door) -> AsyncIterator[httpx.AsyncClient]:
    async with door.client() as client:
        client.headers.update(HEADERS)
        client.timeout = httpx.Timeout(60)  # large inputs are read by another process, which has to begin
        yield client


def jsonl(*lines: Any) -> bytes:
    return b"\n".join(line if isinstance(line, bytes) else orjson.dumps(line) for line in lines)


def line(number: int, script: str = "hi", **more: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": [{"role": WORD, "content": f"{script} {WORD}"}], **EXTRAS}
    return {"custom_id": f"{WORD}{number}", "method": "POST", "url": CHAT, "body": body, WORD: WORD, **more}


async def upload(client: httpx.AsyncClient, content: bytes) -> httpx.Response:
    files = {"file": (f"{WORD}.jsonl", content, f"text/{WORD}")}
    return await client.post("/v1/files", data={"purpose": "batch", WORD: WORD}, files=files)


def attempted(logs: Heard) -> bool:
    """Whether the log says what came of a job's webhook."""
    return "attempts" in logs.getvalue()


async def test_jobs_as_lines(door: Door, client: httpx.AsyncClient, logs: Heard) -> None:
    head = {"model": "tiny", "name": WORD, "metadata": {WORD: WORD}, "defaults": {WORD: WORD}, "webhook": HOOK}
    named = {**LINES, "idempotency-key": f"a {WORD}"}
    first = await client.post("/jobs", content=jsonl(head, *ITEMS), headers=named)
    assert first.status_code == 202, first.text
    assert (await client.post("/jobs", content=jsonl(head, *ITEMS), headers=named)).json()["id"] == first.json()["id"]
    assert (await client.post("/jobs", content=jsonl(head, ITEMS[0]), headers=named)).status_code == 409
    for key in (f"{WORD}\t{WORD}".encode(), WORD.encode() * 99, f"{WORD}ü".encode()):
        refused = await client.post("/jobs", json={}, headers={b"idempotency-key": key})
        assert refused.status_code == 400
    for bad in BAD_JOBS:
        items = bad["items"] if isinstance(bad["items"], list) else [bad["items"]]
        lines = jsonl({**head, **{name: value for name, value in bad.items() if name != "items"}}, *items)
        assert (await client.post("/jobs", content=lines, headers=LINES)).status_code < 500
    for raw in RAW:
        for content in (raw, jsonl(head, raw), jsonl(head, ITEMS[0], raw)):
            assert (await client.post("/jobs", content=content, headers=LINES)).status_code == 400
    for wrong in ({"webhook": f"ftp://{WORD}"}, {"webhook": f"https://{WORD}@{WORD}/"}, {"completion_window": WORD},
                  {"metadata": WORD}, {"priority": WORD}, {"endpoint": WORD}, {"max_error_rate": WORD}):  # fmt: skip
        refused = await client.post("/jobs", content=jsonl({**head, **wrong}, *ITEMS), headers=LINES)
        assert refused.status_code == 400, wrong
    require_silence(logs, door, events=("/jobs",))


async def test_what_becomes_of_a_job(door: Door, client: httpx.AsyncClient, logs: Heard) -> None:
    body = {"model": "tiny", "name": WORD, "items": ITEMS, "metadata": {WORD: WORD}, "webhook": HOOK}
    job = (await client.post("/jobs", json=body)).json()["id"]
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        reading = group.create_task(client.get(f"/jobs/{job}/events", timeout=60))
        group.create_task(door.drain())
    assert reading.result().text.count(WORD) > len(ITEMS)
    last = await client.get(f"/jobs/{job}/events", headers={"last-event-id": WORD})
    assert last.status_code == 400
    retried = (await client.post(f"/jobs/{job}/retry", content=WORD)).json()["id"]
    await asyncio.wait_for(door.drain(), 60)
    for name in (job, retried):
        assert WORD in (await client.get(f"/jobs/{name}/results")).text
        assert WORD in (await client.get(f"/jobs/{name}")).text
    async with asyncio.timeout(30):
        while not attempted(logs):
            await asyncio.sleep(0.05)
    assert (await client.delete(f"/jobs/{job}")).status_code == 200
    require_silence(logs, door, events=("job_finished", job, retried, "shard_over"))


async def test_files(door: Door, client: httpx.AsyncClient, logs: Heard) -> None:
    made = await upload(client, jsonl(line(0), line(1)))
    assert made.status_code == 200, made.text
    file = made.json()["id"]
    for path in ("", "/content", f"/{WORD}"):
        await client.get(f"/v1/files/{file}{path}")
    for query in (f"after={WORD}", f"after={file}", f"limit={WORD}", f"purpose={WORD}", f"order={WORD}", WORD):
        await client.get(f"/v1/files?{query}")
    for method in ("GET", "DELETE", "PUT"):
        await client.request(method, f"/v1/files/{WORD}")
    word = WORD.encode()
    contents = [b"", word, *RAW, jsonl(line(0), line(0)), jsonl({WORD: WORD}), jsonl(line(0, method=WORD)),
                jsonl(line(0), line(1, body=WORD)), jsonl(line(0, body={"stream": WORD})), word * 900_000,
                jsonl(line(0), line(1, body={WORD: WORD * 250_000}, url=[WORD]))]  # fmt: skip
    for content in contents:
        assert 400 <= (await upload(client, content)).status_code < 500
    start, end = b"--" + word + b"\r\n" + b'content-disposition: form-data; name="%s"', b"\r\n--" + word + b"--\r\n"
    for form in (word, start % word, start % word + b"\r\n\r\n" + word * 999, start % b"file" + b"\r\n\r\n" + word,
                 start % b"purpose" + b"; filename=" + word + b"\r\n\r\n" + word + end):  # fmt: skip
        for kind in (f"multipart/form-data; boundary={WORD}", "multipart/form-data", f"text/{WORD}"):
            refused = await client.post("/v1/files", content=form, headers={"content-type": kind})
            assert refused.status_code == 400
    assert (await client.delete(f"/v1/files/{file}")).status_code == 200
    require_silence(logs, door, events=("/v1/files/{file_id}/content",))


async def test_batches(door: Door, client: httpx.AsyncClient, logs: Heard) -> None:
    scripts = ("hi", "status 400", "quote 400", "babble", "die")
    file = (await upload(client, jsonl(*(line(number, script) for number, script in enumerate(scripts))))).json()["id"]
    asked = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h", "metadata": {WORD: WORD}}
    named = {"idempotency-key": WORD}
    batch = (await client.post("/v1/batches", json=asked, headers=named)).json()
    assert (await client.post("/v1/batches", json={**asked, "metadata": {}}, headers=named)).status_code == 409
    wrong: dict[str, Any]
    for wrong in ({"input_file_id": WORD}, {"endpoint": WORD}, {"completion_window": WORD}, {WORD: WORD},
                  {"metadata": {WORD: [WORD]}}, {"output_expires_after": {WORD: WORD}}):  # fmt: skip
        assert 400 <= (await client.post("/v1/batches", json={**asked, **wrong})).status_code < 500, wrong
    models = [line(number, body={"model": model}) for number, model in enumerate(("tiny", [WORD]))]
    for lines in ([line(0, url=f"/{WORD}")], [line(0, body={"model": WORD})], models,
                  [line(0, body={"model": "tiny", "messages": WORD})]):  # fmt: skip
        wrong = {"input_file_id": (await upload(client, jsonl(*lines))).json()["id"]}
        assert (await client.post("/v1/batches", json={**asked, **wrong})).json()["id"]
    await asyncio.wait_for(door.drain(), 60)
    over = (await client.get(f"/v1/batches/{batch['id']}")).json()
    for name in ("output_file_id", "error_file_id"):
        assert WORD in (await client.get(f"/v1/files/{over[name]}/content")).text
    for path in (f"?after={WORD}", f"?limit={WORD}", f"/{WORD}", f"/{WORD}/cancel", f"/{batch['id']}/{WORD}"):
        await client.get(f"/v1/batches{path}")
        await client.post(f"/v1/batches{path}")
    require_silence(logs, door, events=("job_finished", batch["id"]))


async def test_webhooks(door: Door, client: httpx.AsyncClient, logs: Heard) -> None:
    """What a receiver is called, and what it answers, is not for the log either; nor is the secret."""
    secret = (await client.get("/webhooks/secret")).json()["secret"].removeprefix("whsec_")
    for url in (
        HOOK,
        f"ftp://{WORD}",
        f"https://{WORD}:{WORD}@x/",
        f"https://{WORD} {WORD}/",
        [WORD],
        "https://10.0.0.1",
    ):
        told = await client.post(f"/webhooks/test?{WORD}", json={"url": url})
        assert told.status_code == 400 or not told.json()["delivered"], url
    for raw in (*RAW, orjson.dumps({WORD: WORD})):
        assert (await client.post("/webhooks/test", content=raw)).status_code == 400
    said = [answer(404, f"x-{WORD}: {WORD}", f"location: /{WORD}", f"set-cookie: {WORD}=1"), WORD.encode() * 99,
            answer(200, f"content-type: {WORD}", f"content-encoding: {WORD}")]  # fmt: skip
    async with receiving() as receiver:
        url = f"{receiver.url}/{WORD}?{WORD}={WORD}"
        for reply in said:
            receiver.reply = reply
            told = await client.post("/webhooks/test", json={"url": url})
        assert told.json()["delivered"]
        body = {"model": "tiny", "items": ITEMS[:1], "webhook": url, "name": WORD}
        job = (await client.post("/jobs", json=body)).json()["id"]
        await asyncio.wait_for(door.drain(), 60)
        async with asyncio.timeout(30):
            while len(receiver.events) <= len(said):
                await asyncio.sleep(0.05)
    assert WORD.encode() in receiver.events[-1].body
    async with asyncio.timeout(30):
        while not attempted(logs):
            await asyncio.sleep(0.05)
    assert secret not in logs.getvalue()
    assert secret not in door.gateway.metrics.render()[0].decode()
    require_silence(logs, door, events=("/webhooks/test", job))
