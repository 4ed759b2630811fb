"""`velocity bench coserve` in front of a fake engine, with a real Redis and a pump that drains."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from api.bench.canary import Canary
from api.bench.http import HttpCaller
from api.bench.jobs import JobLoad
from api.bench.load import OpenLoad, Prompts, Sizes, Steady, bulk, open_loop, steady
from api.cli.client import VelocityClient
from api.keys import Scope
from tests.api.conftest import Door

SIZES = Sizes(prompt=(2, 4), output=(3, 3))
QUICK = ("--seconds", "1", "--lead", "0.3", "--rounds", "1")


@asynccontextmanager
async def working(door: Door) -> AsyncIterator[None]:
    """A worker at work meanwhile."""
    stop = threading.Event()

    async def drain() -> None:
        while not stop.is_set():
            await door.drain(stop)
            await asyncio.sleep(0.05)

    task = asyncio.create_task(drain())
    try:
        yield
    finally:
        stop.set()
        await task


async def command(door: Door, *arguments: str, key: str = "", model: str = "tiny") -> subprocess.CompletedProcess[str]:
    """`velocity bench coserve …` as a person runs it."""
    env = os.environ | {"VELOCITY_URL": door.url, "VELOCITY_API_KEY": key or door.key, "COLUMNS": "200"}
    words = [sys.executable, "-m", "api.cli.main", "bench", "coserve", "--model", model, *arguments]
    return await asyncio.to_thread(
        subprocess.run, words, env=env, capture_output=True, text=True, timeout=120, check=False
    )


async def jobs_of(door: Door) -> list[dict[str, object]]:
    async with door.client() as client:
        return list((await client.get("/jobs")).json()["data"])


async def test_the_command_prints_a_table_and_leaves_no_job(door: Door, tmp_path: Path) -> None:
    door.engine.token_seconds = 0.02
    async with working(door):
        ran = await command(door, *QUICK, "--duty", "50,100", "--plot", str(tmp_path / "run.png"))
    assert ran.returncode == 0, ran.stderr
    for row in ("| A |", "| B |", "| V |", "TTFT p95, V / A", "bulk goes on"):
        assert row in ran.stdout
    assert "[5/5] round 1" in ran.stderr
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert await jobs_of(door) == []
    chats = [request for request in door.engine.requests if request.get("stream")]
    said = {request["messages"][0]["content"] for request in chats}
    assert len(said) == len(chats) > 10  # nobody asks what was asked before


async def test_a_key_that_may_not_is_refused_before_anything_runs(door: Door) -> None:
    for scopes, lacking in (((Scope.CHAT,), "jobs"), ((Scope.JOBS,), "chat")):
        ran = await command(door, *QUICK, key=await door.new_key(scopes=scopes))
        assert ran.returncode == 1
        assert f"lacks the scope '{lacking}'" in ran.stderr
        assert "Traceback" not in ran.stderr
    unknown = await command(door, *QUICK, "--duty", "50,90")
    assert "There is no duty 90" in unknown.stderr
    nobody = await command(door, *QUICK, model="nobody")
    assert "does not exist" in nobody.stderr


async def test_ctrl_c_ends_it_and_removes_its_job(door: Door) -> None:
    door.engine.token_seconds = 0.02
    env = os.environ | {"VELOCITY_URL": door.url, "VELOCITY_API_KEY": door.key}
    words = ["bench", "coserve", "--model", "tiny", "--seconds", "60", "--lead", "0.3", "--duty", "10"]
    process = subprocess.Popen(
        [sys.executable, "-m", "api.cli.main", *words, "--rounds", "2"],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    async with working(door), asyncio.timeout(60):
        while not door.engine.requests:
            await asyncio.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = await asyncio.to_thread(process.communicate)
    assert process.returncode == 1, output
    assert await jobs_of(door) == []


async def test_a_job_counts_what_was_committed_in_the_block(door: Door) -> None:
    door.engine.token_seconds = 0.01
    over = asyncio.Event()
    async with working(door), VelocityClient(door.url, door.key) as client:
        load = JobLoad(client, "tiny", SIZES, Prompts(1))
        zero = time.monotonic() + 0.5
        work = asyncio.create_task(load.run(zero, 1.5, over.is_set))
        await asyncio.sleep(2.5)
        over.set()
        await work
    times = [at for at, _ in load.done]
    assert times == sorted(times)
    assert any(0 < at <= 1.5 for at in times)
    assert all(one.output > 0 and one.input > 0 for _, one in load.done)
    assert load.failed == 0
    assert await jobs_of(door) == []


async def test_a_failing_item_is_counted(door: Door) -> None:
    over = asyncio.Event()
    async with working(door), VelocityClient(door.url, door.key) as client:
        load = JobLoad(client, "tiny", SIZES, Prompts(1, ["status 400"]))
        work = asyncio.create_task(load.run(time.monotonic(), 1.0, over.is_set))
        async with asyncio.timeout(30):
            while not load.failed:
                await asyncio.sleep(0.05)
        over.set()
        await work
    assert load.done == []


async def test_streams_are_timed_from_when_they_were_due(door: Door) -> None:
    door.engine.token_seconds = 0.02
    async with HttpCaller(door.url, "tiny", door.key) as caller:
        zero = time.monotonic()
        load = OpenLoad(SIZES, rate=20.0)
        seen = await open_loop(caller, load, Prompts(1), seconds=0.5, seed=1, zero=zero)
        always = await steady(caller, Steady(SIZES, 2, 0.05), Prompts(2), seconds=0.4, zero=time.monotonic())
        late = await caller.stream(Prompts(3).body(SIZES, "tiny", None, stream=True), -5.0, time.monotonic())
    assert [one.due for one in seen] == load.arrivals(0.5, 1)
    for one in (*seen, *always):
        assert not one.error
        assert (one.tokens, len(one.gaps)) == (3, 2)
        assert one.first + sum(one.gaps) - one.last < 1e-6
    assert len(always) >= 4
    assert late.ttft > 5


@pytest.mark.parametrize(
    ("words", "reason"),
    [("status 400", "400: "), ("trouble 2", "it broke"), ("break 2", "closed the connection"), ("tokens 0", "no text")],
)
async def test_what_fails_is_kept_as_an_error(door: Door, words: str, reason: str) -> None:
    body = Prompts(1, [words]).body(Sizes((1, 1), (3, 3)), "tiny", None, stream=True)
    async with HttpCaller(door.url, "tiny", door.key) as caller:
        seen = await caller.stream(body, 0.0, time.monotonic())
        assert reason in seen.error
        assert (seen.compact()["ttft"] is None) == (not seen.tokens)
        if words.startswith("status"):
            assert (await caller.whole({**body, "stream": False})).output == 0


async def test_a_window_is_kept_full_and_dropped_at_the_end(door: Door) -> None:
    door.engine.token_seconds = 0.02
    over = asyncio.Event()
    async with HttpCaller(door.engine.url, "tiny") as caller:
        sending = bulk(caller, SIZES, Prompts(1), window=5, zero=time.monotonic(), over=over.is_set)
        work = asyncio.create_task(sending)
        await asyncio.sleep(0.5)
        assert door.engine.most_running == 5
        over.set()
        done = await work
    assert len(done) >= 10
    assert {one.output for _, one in done} == {3}
    async with asyncio.timeout(10):
        while door.engine.running:
            await asyncio.sleep(0.01)


async def test_a_server_that_is_away_is_an_error_and_no_exception() -> None:
    async with HttpCaller("http://127.0.0.1:9", "tiny") as caller:
        body = Prompts(1).body(SIZES, "tiny", None, stream=True)
        assert "ConnectError" in (await caller.stream(body, 0.0, time.monotonic())).error
        assert (await caller.whole(body)).output == 0


async def test_the_canary_notices_when_it_stood_still() -> None:
    with Canary() as canary:
        began = time.monotonic()
        process = canary.process
        assert process
        await asyncio.sleep(0.5)
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(0.3)
        process.send_signal(signal.SIGCONT)
        async with asyncio.timeout(10):
            while not any(lost > 0.25 for _, lost in canary.between(began, time.monotonic())):
                await asyncio.sleep(0.01)
        assert canary.between(began - 2, began - 1) == []
    assert process.poll() is not None
