"""`velocity up` as an operator meets it, in front of a fake engine: what dies is restarted, what is wrong is said."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator

import httpx
import orjson
import pytest

from engine.ports import free_port, listen
from tests.e2e.conftest import VELOCITY, Up, velocity_up
from tests.fake_engine import fake_engine


@pytest.fixture(scope="module")
def engine_url() -> Iterator[str]:
    """A fake engine on a loop of its own."""
    url: list[str] = []
    started, ended = threading.Event(), threading.Event()

    async def serve() -> None:
        async with fake_engine() as engine:
            url.append(engine.url)
            started.set()
            await asyncio.to_thread(ended.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.wait()
    yield url[0]
    ended.set()
    thread.join()


@pytest.fixture(scope="module")
def up(engine_url: str) -> Iterator[Up]:
    with velocity_up("--engine-url", engine_url) as running:
        yield running


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*VELOCITY, *arguments], env=os.environ | env, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("part", ["worker", "worker --lane quarantine", "redis-server", "main api"])
def test_what_dies_is_restarted(up: Up, part: str) -> None:
    killed = up.pid_of(part)
    os.kill(killed, signal.SIGKILL)
    name = {"redis-server": "redis", "main api": "api", "worker --lane quarantine": "quarantine"}.get(part, part)
    up.wait_for(f"{name} died \\(signal SIGKILL\\)", 10)
    up.wait_for(f"{name} is back", 30)
    assert up.pid_of(part) != killed
    deadline = time.monotonic() + 30
    while httpx.get(f"{up.url}/health").json()["status"] != "ok":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    with up.client() as http:  # keys and jobs are still there; who asks too early after Redis died is told to wait
        while (answer := http.get("/jobs")).status_code != 200:
            assert answer.status_code == 503
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_a_second_one_on_the_same_data_is_refused(up: Up) -> None:
    second = run("up", "--port", str(free_port()), "--data", str(up.data))
    assert second.returncode == 1
    assert "already" in second.stderr


def test_ctrl_c_ends_everything(engine_url: str) -> None:
    with velocity_up("--engine-url", engine_url) as up:
        pids = [up.pid_of(part) for part in ("worker", "redis-server", "main api")]
    assert up.process.returncode == 0
    assert "ended" in up.text
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_killed_up_leaves_nothing_behind(engine_url: str) -> None:
    with velocity_up("--engine-url", engine_url) as up:
        pids = [up.pid_of(part) for part in ("worker", "redis-server", "main api")]
        up.process.kill()
        up.process.wait()
        deadline = time.monotonic() + 20
        while any(_alive(pid) for pid in pids):
            assert time.monotonic() < deadline, "children outlived a killed velocity up"
            time.sleep(0.2)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123 - a zombie that nobody reaps counts as gone
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_port_in_use_is_said(tmp_path: object, engine_url: str) -> None:
    with listen("127.0.0.1", 0, "a test") as taken:
        taken.listen()
        port = taken.getsockname()[1]
        refused = run("up", "--port", str(port), "--data", str(tmp_path), "--engine-url", engine_url)
    assert refused.returncode == 1
    assert f"Port {port}" in refused.stderr
    assert "in use" in refused.stderr


def test_what_was_named_and_is_not_there_is_said(tmp_path: object, engine_url: str) -> None:
    nowhere = free_port()
    no_engine = run(
        "up", "--data", str(tmp_path), "--engine-url", f"http://127.0.0.1:{nowhere}", "--port", str(free_port())
    )
    assert no_engine.returncode == 1
    assert "engine does not answer" in no_engine.stderr
    no_redis = run(
        "up", "--data", str(tmp_path), "--engine-url", engine_url, "--redis-url", f"redis://127.0.0.1:{nowhere}",
        "--port", str(free_port()),
    )  # fmt: skip
    assert no_redis.returncode == 1
    assert "Redis does not answer" in no_redis.stderr


def test_wrong_settings_are_named() -> None:
    wrong = run("api", VELOCITY_PORT="many")
    assert wrong.returncode == 1
    assert "VELOCITY_PORT" in wrong.stderr
    unknown = run("engine", "serve", "--profile", "gpt-5")
    assert unknown.returncode == 1
    assert "velocity-30b" in unknown.stderr


@pytest.mark.parametrize(
    ("arguments", "env", "said"),
    [
        (["worker"], {"VELOCITY_REDIS_URL": "redis://127.0.0.1:9"}, "Redis did not answer"),
        (["worker"], {"VELOCITY_REDIS_URL": "127.0.0.1:6379"}, "VELOCITY_REDIS_URL"),
        (["api"], {"VELOCITY_LOG_LEVEL": "LOUD"}, "VELOCITY_LOG_LEVEL"),
        (["api"], {"VELOCITY_ENGINE_URL": "localhost"}, "localhost"),
        (["api"], {"VELOCITY_OPEN": "1", "VELOCITY_HOST": "0.0.0.0"}, "VELOCITY_OPEN"),
        (["up", "--data", "/proc/nope"], {}, "/proc/nope"),
        (["keys", "create", "x"], {"VELOCITY_REDIS_URL": "redis://127.0.0.1:9"}, "Redis did not answer"),
        (["chat", "hi", "--key", "vk_ü"], {}, "API key"),
    ],
)
def test_failures_are_sentences(arguments: list[str], env: dict[str, str], said: str) -> None:
    failed = run(*arguments, **env)
    assert failed.returncode == 1
    assert said in failed.stderr
    assert "Traceback" not in failed.stderr


def test_foreign_text_is_shown_as_it_is(up: Up) -> None:
    text = "[/x] [bold]\u2028\u0085"
    job = {"name": text, "model": "tiny", "items": [{"id": text, "messages": [{"role": "user", "content": "hi"}]}]}
    submitted = up.velocity("jobs", "submit", "-", "--watch", stdin=orjson.dumps(job).decode())
    assert "[/x]" in up.velocity("jobs", "list").stdout
    (line,) = up.velocity("jobs", "results", submitted.stdout.split()[0]).stdout.encode().splitlines()
    assert orjson.loads(line)["id"] == text


def test_a_job_without_a_success_is_a_failure_to_the_shell(up: Up) -> None:
    job = {"model": "tiny", "items": [{"id": "a", "messages": [{"role": "user", "content": "status 400"}]}]}
    failed = up.velocity("jobs", "submit", "-", "--watch", stdin=orjson.dumps(job).decode(), check=False)
    assert failed.returncode == 1
    assert "No item" in failed.stderr


def test_commands_find_the_velocity_that_runs_on_their_data(up: Up) -> None:
    env = {"VELOCITY_DATA_DIR": str(up.data), "VELOCITY_API_KEY": up.key}
    assert run("jobs", "list", **env).returncode == 0
    chat = run("chat", "tokens 3", "--model", "tiny", **env)
    assert chat.stdout.strip() == "t0 t1 t2"


def test_commands_without_a_server_say_so() -> None:
    nobody = run("chat", "hi", "--url", f"http://127.0.0.1:{free_port()}")
    assert nobody.returncode == 1
    assert "does not answer" in nobody.stderr
    assert run("jobs", "submit", "/nowhere.json").returncode == 1
