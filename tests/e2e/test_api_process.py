"""Several real api processes on one Redis: what a killed one held comes back, and what all of them do together."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.ports import free_port
from tests.fake_engine import FakeEngine, fake_engine
from workers import redis_keys
from workers.redis import connect

CHAT = "/v1/chat/completions"


def chat(content: str, **fields: object) -> dict[str, object]:
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 100, **fields}


@dataclass
class Site:
    """A fake engine, a Redis and a data directory, on which api processes can be started."""

    engine: FakeEngine
    redis_url: str
    data: Path

    @property
    def env(self) -> dict[str, str]:
        return os.environ | {
            "VELOCITY_ENGINE_URL": self.engine.url, "VELOCITY_REDIS_URL": self.redis_url,
            "VELOCITY_DATA_DIR": str(self.data), "VELOCITY_LOG_JSON": "1",
        }  # fmt: skip

    async def velocity(self, *words: str) -> str:
        """Another velocity command on the same installation."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "api.cli.main", *words, env=self.env, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate()
        assert process.returncode == 0
        return output.decode()

    async def key(self, *options: str) -> str:
        return str(orjson.loads(await self.velocity("keys", "create", "test", "--json", *options))["key"])

    @asynccontextmanager
    async def api(self, **env: str) -> AsyncIterator[Api]:
        """A `velocity api` that answers; ended whatever happens."""
        port = free_port()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "api.cli.main", "api", env=self.env | {"VELOCITY_PORT": str(port)} | env,
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            api = Api(f"http://127.0.0.1:{port}", process)
            async with asyncio.timeout(60), httpx.AsyncClient() as client:
                while True:
                    try:
                        if (await client.get(f"{api.url}/health")).status_code == 200:
                            break
                    except httpx.TransportError:
                        assert process.returncode is None
                    await asyncio.sleep(0.1)
            yield api
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(process.wait(), 60)


@dataclass
class Api:
    """One api process."""

    url: str
    process: asyncio.subprocess.Process

    def client(self, key: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, headers={"authorization": f"Bearer {key}"}, timeout=60)


@pytest.fixture
async def site(clean_redis: str, tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_engine() as engine:
        yield Site(engine, clean_redis, tmp_path)


async def leases(site: Site, key: str) -> int:
    redis = connect(site.redis_url, 5)
    count = await redis.zcard(redis_keys.leases(key.split("_")[1]))
    await redis.aclose()
    return int(count)


async def test_a_killed_process_gives_its_slots_back(site: Site) -> None:
    key = await site.key("--concurrency", "2")
    async with site.api() as doomed, site.api() as other, doomed.client(key) as lost, other.client(key) as client:
        streams = [asyncio.create_task(lost.post(CHAT, json=chat("hang", stream=True))) for _ in range(2)]
        async with asyncio.timeout(20):
            while site.engine.running < 2:
                await asyncio.sleep(0.01)
        assert await leases(site, key) == 2
        doomed.process.kill()
        answer = await client.post(CHAT, json=chat("tokens 2"))  # it waits in the line for a slot
        assert answer.status_code == 200  # within VELOCITY_QUEUE_WAIT, 20 s; the lease is 15 s
        for stream in streams:
            with pytest.raises(httpx.TransportError):
                await stream
    assert len(site.engine.aborted) == 2  # the engine was told by the broken connections


async def test_a_key_revoked_on_the_command_line_is_stopped_under_load(site: Site) -> None:
    key = await site.key()
    async with site.api() as one, site.api() as two, one.client(key) as first, two.client(key) as second:
        stop = asyncio.Event()
        answers: list[tuple[float, int]] = []

        async def load(client: httpx.AsyncClient) -> None:
            while not stop.is_set():
                response = await client.post(CHAT, json=chat("tokens 2"))
                answers.append((time.monotonic(), response.status_code))

        loads = [asyncio.create_task(load(client)) for client in (first, second) for _ in range(4)]
        stalled = asyncio.create_task(second.post(CHAT, json=chat("stall 1", stream=True)))
        async with asyncio.timeout(30):
            while len(answers) < 200:
                await asyncio.sleep(0.05)
        await site.velocity("keys", "revoke", key.split("_")[1])
        revoked = time.monotonic()
        async with asyncio.timeout(20):
            with pytest.raises(httpx.RemoteProtocolError):
                await stalled
        ended = time.monotonic() - revoked
        stop.set()
        await asyncio.gather(*loads)
        assert {status for _, status in answers} == {200, 401}
        last = max(at for at, status in answers if status == 200) - revoked
        assert last < 5
        assert ended < 15  # at the next renewal, which is every five seconds


async def test_metrics_are_on_their_own_port(site: Site) -> None:
    key = await site.key()
    port = str(free_port())
    site.engine.token_seconds = 0.01
    async with site.api(VELOCITY_METRICS_PORT=port) as api, api.client(key) as client:
        assert (await client.get("/metrics")).status_code == 404
        for stream in (True, False):
            assert (await client.post(CHAT, json=chat("tokens 5", stream=stream))).status_code == 200
        async with asyncio.timeout(20):  # a request is counted when its answer has left
            while 'status="200"} 2.0' not in (text := (await client.get(f"http://127.0.0.1:{port}/metrics")).text):
                await asyncio.sleep(0.05)
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["velocity_http_requests_total", *sorted((CHAT, "200", "POST"))] == 2
    assert samples["velocity_ttft_seconds_count", *sorted((CHAT, "no"))] == 2
    assert samples["velocity_tokens_total", "interactive", "output"] == 10
    assert samples["velocity_stream_outcomes_total", "ok"] == 2
    assert samples[("velocity_requests_in_flight",)] == 0
    assert samples[("velocity_engine_up",)] == 1
    assert samples["velocity_redis_seconds_count", "admit"] == 2
    assert samples["velocity_itl_seconds_count", "no"] >= 1
    assert key.split("_")[1] not in text
    table = await site.velocity("usage")
    assert all(word in table for word in (key.split("_")[1], "test", "interactive"))


async def test_ten_thousand_streams_that_were_left_hold_nothing(site: Site) -> None:
    key = await site.key("--concurrency", "100000", "--tpm", "900000000")
    raw = orjson.dumps(chat("stall 1", stream=True))
    async with site.api() as api, api.client(key) as client:
        host = urlsplit(api.url)
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-length: {len(raw)}\r\n\r\n"

        async def leave(count: int) -> None:
            for _ in range(count):
                reader, writer = await asyncio.open_connection(host.hostname, host.port)
                writer.write(head.encode() + raw)
                await reader.readuntil(b"t0")
                writer.transport.abort()

        await asyncio.gather(*(leave(500) for _ in range(20)))
        async with asyncio.timeout(30):
            while await leases(site, key) or site.engine.running:
                await asyncio.sleep(0.1)
        day = (await client.get("/v1/usage")).json()["data"][0]["interactive"]
    assert day["requests"] == 10_000
    assert len(site.engine.aborted) == 10_000
    redis = connect(site.redis_url, 5)
    left = [name async for name in redis.scan_iter(f"{redis_keys.ROOT}request:*")]
    await redis.aclose()
    assert not left


async def test_four_times_too_much_is_served_as_well_as_just_enough(site: Site) -> None:
    """The engine takes 4 at a time, and 16 come: what is refused says when, and nothing else fails."""
    site.engine.token_seconds = 0.02
    key = await site.key()
    async with site.api(VELOCITY_GLOBAL_CONCURRENCY="4", VELOCITY_QUEUE_WAIT="1") as api, api.client(key) as client:
        statuses: list[int] = []

        async def come(requests: int) -> None:
            for _ in range(requests):
                response = await client.post(CHAT, json=chat("tokens 5", stream=True))
                ended = response.text.endswith("data: [DONE]\n\n")
                statuses.append(200 if ended else response.status_code)
                if response.status_code == 503:
                    assert int(response.headers["retry-after"]) >= 1
                    assert response.json()["error"]["code"] == "overloaded"

        await asyncio.gather(*(come(20) for _ in range(4)))
        enough = statuses.copy()
        statuses.clear()
        async with asyncio.timeout(120):
            await asyncio.gather(*(come(20) for _ in range(16)))
    assert set(enough) == {200}
    assert set(statuses) <= {200, 503}
    assert statuses.count(200) >= len(statuses) / 4
    assert site.engine.most_running <= 4
