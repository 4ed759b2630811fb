"""VELOCITY_API_WORKERS: real processes behind one port, that serve, count, limit, die and end like one."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from api.fast_redis import FastRedis
from api.key_store import Keys
from api.keys import Scope, Terms
from api.metrics import Metrics
from engine.ports import free_port, listen
from tests.conftest import redis_server
from tests.e2e.test_api_process import CHAT, chat
from tests.fake_engine import FakeEngine, fake_engine
from workers import redis_keys
from workers.redis import connect

WORKERS = 2
OPEN = {"VELOCITY_OPEN": "1"}


@dataclass
class Api:
    """A parent and its workers."""

    process: asyncio.subprocess.Process
    port: int
    metrics_port: int
    log: Path

    @property
    def pids(self) -> list[int]:
        """The workers that live."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(word) for word in children.read_text().split()]

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What all of them logged; the last line may not be whole yet."""
        return [orjson.loads(line) for line in self.log.read_bytes().splitlines(keepends=True) if line.endswith(b"}\n")]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == name]

    def client(self, key: str = "x") -> httpx.AsyncClient:
        """Each request of it is a connection of its own."""
        limits = httpx.Limits(max_keepalive_connections=0)
        headers = {"authorization": f"Bearer {key}"}
        return httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=60, limits=limits)

    async def metrics(self, key: str = "x") -> dict[tuple[str, ...], float]:
        """Every sample by its name and the values of its labels, in alphabetic order."""
        async with httpx.AsyncClient(headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
            answer = await client.get(f"http://127.0.0.1:{self.metrics_port}/metrics")
        assert answer.status_code == 200
        families = text_string_to_metric_families(answer.text)
        return {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in families
            for sample in family.samples
        }

    async def until(self, found: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not found():
                assert self.process.returncode is None, self.log.read_text()
                await asyncio.sleep(0.02)


@asynccontextmanager
async def several(engine: FakeEngine, redis_url: str, directory: Path, **env: str) -> AsyncIterator[Api]:
    """`velocity api` with several workers, all of which serve; ended whatever happens."""
    port, metrics_port, log = free_port(), free_port(), directory / "log"
    given = {
        "VELOCITY_ENGINE_URL": engine.url, "VELOCITY_REDIS_URL": redis_url, "VELOCITY_LOG_JSON": "1",
        "VELOCITY_DATA_DIR": str(directory / "data"), "VELOCITY_PORT": str(port),
        "VELOCITY_METRICS_PORT": str(metrics_port),
        "VELOCITY_API_WORKERS": str(WORKERS),
    }  # fmt: skip
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "api.cli.main", "api", env=os.environ | given | env, stderr=output
        )
    api = Api(process, port, metrics_port, log)
    try:
        await api.until(lambda: len(api.events("api_listening")) == WORKERS)
        yield api
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(60):
                assert await process.wait() == 0


async def new_key(redis_url: str, data: Path, **terms: Any) -> str:
    redis = FastRedis(redis_url, 5, Metrics())
    _, text = await Keys(redis, data).create(Terms(name="test", **terms))
    await redis.aclose()
    return text


@pytest.fixture(scope="module")
async def engine() -> AsyncIterator[FakeEngine]:
    async with fake_engine() as running:
        yield running


@pytest.fixture(autouse=True)
def engine_at_rest(engine: FakeEngine) -> None:
    engine.token_seconds, engine.most_running = 0.0, 0


@pytest.fixture(scope="module")
async def shared(
    engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Api, Callable[..., Any]]]:
    """One for the tests that leave it as they found it, on a Redis of its own, and how to make keys for it."""
    directory = tmp_path_factory.mktemp("shared")
    with redis_server() as (url, _):
        async with several(engine, url, directory, VELOCITY_METRICS_HOST="0.0.0.0") as api:
            yield api, partial(new_key, url, directory / "data")


Shared = tuple[Api, Callable[..., Any]]


async def test_requests_are_spread_and_every_line_says_by_whom(shared: Shared) -> None:
    api, key = shared
    async with api.client(await key()) as client, asyncio.timeout(30):
        while {line["worker"] for line in api.events("request")} != {1, 2}:
            answers = await asyncio.gather(*(client.post(CHAT, json=chat("tokens 2")) for _ in range(20)))
            assert {answer.status_code for answer in answers} == {200}
        assert (await client.get("/health")).json()["engine"] == "ok"
    assert {line["process"] for line in api.lines} == {"api"}
    assert len(api.pids) == WORKERS


async def test_slots_are_counted_over_all(shared: Shared, engine: FakeEngine) -> None:
    api, key = shared
    engine.token_seconds = 0.01
    async with api.client(await key(concurrency=3)) as client:
        answers = await asyncio.gather(*(client.post(CHAT, json=chat("tokens 3", stream=True)) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert engine.most_running == 3


async def test_requests_per_minute_are_counted_over_all(shared: Shared) -> None:
    api, key = shared
    began = time.monotonic()
    async with api.client(await key(rpm=6, burst=10)) as client:
        answers = await asyncio.gather(*(client.post(CHAT, json=chat("tokens 1")) for _ in range(40)))
    statuses = [answer.status_code for answer in answers]
    assert 10 <= statuses.count(200) <= 10 + 1 + (time.monotonic() - began) / 10
    assert statuses.count(200) + statuses.count(429) == 40


async def test_only_a_key_of_that_scope_reads_the_metrics_of_a_public_address(shared: Shared) -> None:
    api, key = shared
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{api.metrics_port}") as client:
        assert (await client.get("/metrics")).status_code == 401
        other = await client.get("/metrics", headers={"authorization": f"Bearer {await key()}"})
    assert other.status_code == 403
    values = await api.metrics(await key(scopes=(Scope.METRICS,)))
    assert values[("velocity_engine_up",)] == 1
    assert {name[1:] for name in values if name[0] == "process_open_fds"} == {("1",), ("2",), ("parent",)}


async def test_who_dies_comes_back_and_stays_in_the_sums(engine: FakeEngine, clean_redis: str, tmp_path: Path) -> None:
    """Until what is wrong can't be mended by a restart."""
    answered = ("velocity_http_requests_total", *sorted((CHAT, "200", "POST")))
    took = ("velocity_request_duration_seconds_count", *sorted((CHAT, "false")))
    async with several(engine, clean_redis, tmp_path, **OPEN) as api, api.client() as client:
        seen: list[dict[tuple[str, ...], float]] = []

        async def watch() -> None:
            while True:
                seen.append(await api.metrics())
                await asyncio.sleep(0.05)

        async def send(count: int) -> None:
            statuses = await asyncio.gather(*(client.post(CHAT, json=chat("tokens 1")) for _ in range(count)))
            assert {answer.status_code for answer in statuses} == {200}

        async def counted(total: int, left: int = 0) -> None:
            async with asyncio.timeout(10):  # a request is counted when its answer has left
                while (seen[-1].get(answered), seen[-1].get(took)) != (total, total + left):
                    await asyncio.sleep(0.01)

        watching = asyncio.create_task(watch())
        await api.until(lambda: bool(seen))
        await send(40)
        await counted(40)
        holding = [asyncio.create_task(client.post(CHAT, json=chat("hang"))) for _ in range(6)]
        await api.until(lambda: seen[-1][("velocity_requests_in_flight",)] == 6)
        for task in holding:
            task.cancel()
        await asyncio.gather(*holding, return_exceptions=True)
        await counted(40, left=6)
        killed = api.pids[0]
        os.kill(killed, signal.SIGKILL)
        await api.until(lambda: killed not in api.pids)
        await send(10)  # by the one that is left
        await api.until(lambda: len(api.events("child_restarted")) == 1)
        await send(20)
        await counted(70, left=6)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

        redis = connect(clean_redis, 5)
        await redis.set(redis_keys.DATA, "data_00000000000000000000000000")
        await redis.aclose()
        os.kill(api.pids[0], signal.SIGKILL)
        async with asyncio.timeout(30):
            assert await api.process.wait() == 1
    assert api.log.read_text().count("\nerror: The data directory") == 1
    for before, after in pairwise(seen):
        counts = {name for name in before if name[0].endswith(("_total", "_bucket", "_count", "_sum"))}
        assert not {name for name in counts if after.get(name, -1) < before[name]}


async def test_the_first_signal_lets_streams_end_the_second_does_not(
    engine: FakeEngine, clean_redis: str, tmp_path: Path
) -> None:
    engine.token_seconds = 0.05
    async with several(engine, clean_redis, tmp_path, **OPEN) as api, api.client() as client:
        streams = [asyncio.create_task(client.post(CHAT, json=chat("tokens 20", stream=True))) for _ in range(8)]
        endless = [asyncio.create_task(client.post(CHAT, json=chat("stall 1", stream=True))) for _ in range(4)]
        await api.until(lambda: engine.running == 12)
        api.process.send_signal(signal.SIGTERM)
        await api.until(lambda: len(api.events("Shutting down")) >= WORKERS)
        with pytest.raises(httpx.ConnectError):
            await client.get("/health")
        for stream in asyncio.as_completed(streams):
            assert (await stream).text.endswith("data: [DONE]\n\n")
        api.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):  # VELOCITY_SHUTDOWN_SECONDS are 30
            assert await api.process.wait() == 0
        for answer in await asyncio.gather(*endless, return_exceptions=True):
            assert isinstance(answer, httpx.TransportError)
    assert not engine.running
    listen("127.0.0.1", api.port, "a test").close()


@pytest.fixture
def short_path() -> Iterator[str]:
    """Where a killed parent may leave its sockets; pytest's own directories are too long for their names."""
    with tempfile.TemporaryDirectory(prefix="velocity-test-") as path:
        yield path


async def test_a_killed_parent_leaves_nobody_behind(
    engine: FakeEngine, clean_redis: str, tmp_path: Path, short_path: str
) -> None:
    engine.token_seconds = 0.05
    async with several(engine, clean_redis, tmp_path, TMPDIR=short_path, **OPEN) as api, api.client() as client:
        pids = api.pids
        stream = asyncio.create_task(client.post(CHAT, json=chat("tokens 20", stream=True)))
        await api.until(lambda: engine.running == 1)
        api.process.kill()
        assert (await stream).text.endswith("data: [DONE]\n\n")
        async with asyncio.timeout(20):
            while any(alive(pid) for pid in pids):
                await asyncio.sleep(0.05)
    listen("127.0.0.1", api.port, "a test").close()


def alive(pid: int) -> bool:
    """Whether it runs; a dead one may lie about until somebody has asked for its exit status."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
