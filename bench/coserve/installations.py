"""Complete installations side by side, each with an engine, a Redis, a worker and an api of its own.

Only one of them gets load at a time; the others are idle, which takes memory and next to no processor time.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import aiohttp

from api.bench.blocks import Counted, Target
from bench.bulk import engine_counts
from engine import embedded, profile
from engine.ports import free_port
from engine.settings import EngineSettings
from workers.ledger import Ledger
from workers.redis import connect

MODEL = "velocity-30b"
_VELOCITY = [sys.executable, "-m", "api.cli.main"]
_ROOT = Path(__file__).resolve().parents[2]
_ENGINE_SECONDS, _UP_SECONDS, _STOP_SECONDS = 900.0, 120.0, 60.0
_KEPT = ("dtype", "max-model-len", "enforce-eager")
"""Flags of the profile that have nothing to do with scheduling; arm A' has these alone."""


@dataclass
class Installation:
    """One of them. `kind`: V with velocity's scheduler, S with vLLM's own and the same flags, D with vLLM's flags."""

    kind: str
    folder: Path
    window: int
    kv_gib: int
    engine_port: int = field(default_factory=free_port)
    port: int = field(default_factory=free_port)

    @property
    def engine_url(self) -> str:
        """Of vLLM."""
        return f"http://127.0.0.1:{self.engine_port}"

    @property
    def control(self) -> Path:
        """The scheduler's dial and report."""
        return self.folder / "scheduler"

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.folder / "data"

    def environment(self) -> dict[str, str]:
        """For its engine and its velocity."""
        return os.environ | {
            "VELOCITY_ENGINE_URL": self.engine_url,
            "VELOCITY_COSERVING": "1" if self.kind == "V" else "0",
            "VELOCITY_SCHEDULER_DIR": str(self.control),
            "VELOCITY_BULK_WINDOW": str(self.window),
            "VELOCITY_LOG_JSON": "1",
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_gib),
        }

    def engine_command(self, model: Path) -> list[str]:
        """Velocity's own launcher, but for the one that shows vLLM's defaults."""
        if self.kind != "D":
            return [*_VELOCITY, "engine", "serve", "--profile", "cpu"]
        cpu = profile.load("cpu")
        plain = cpu.model_copy(update={"flags": {name: cpu.flags[name] for name in _KEPT}, "tool_call_parser": None})
        arguments = plain.vllm_args(str(model), "127.0.0.1", self.engine_port, coserving=False)
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments]

    def target(self, key: str) -> Target:
        """For the blocks."""
        where = json.loads((self.data / "up.json").read_text())
        ours = self.kind == "V"
        return Target(
            self.kind, where["url"], key, MODEL, self.engine_url, self.control if ours else None,
            None if ours else partial(_given_back, where["redis_url"], self.engine_url),
        )  # fmt: skip


async def _given_back(redis_url: str, engine_url: str) -> Counted:
    """Seconds of bulk requests that the worker ended early, and of all requests that the engine has answered."""
    redis = connect(redis_url, 5.0)
    try:
        _, lost = await Ledger(redis).given_back()
    finally:
        await redis.aclose()
    async with aiohttp.ClientSession() as session:
        counts = await engine_counts.read(session, engine_url)
    return {"lost": lost, "done": counts.request_seconds}


@contextmanager
def installed(
    kinds: list[str], out: Path, *, window: int, kv_gib: int, say: Callable[[str], None]
) -> Iterator[dict[str, Target]]:
    """All of them up and healthy; ended whatever happens. Raises SystemExit with the end of the log of what failed."""
    cpu = profile.load("cpu")
    model = asyncio.run(embedded.prepare(cpu.checkpoint, EngineSettings().cache_dir, lambda *_: None))
    found = [Installation(kind, out / kind, window, kv_gib) for kind in kinds]
    with ExitStack() as stack:
        engines = [stack.enter_context(_process(one, "engine", one.engine_command(model))) for one in found]
        began = time.monotonic()
        for one, engine in zip(found, engines, strict=True):
            _wait(one, "engine", engine, _ENGINE_SECONDS, partial(_healthy, one.engine_url))
            say(f"engine {one.kind} is up after {time.monotonic() - began:.0f} s")
        targets = {one.kind: stack.enter_context(fronted(one)) for one in found}
        say("all installations are ready")
        yield targets


@contextmanager
def fronted(one: Installation) -> Iterator[Target]:
    """Its velocity (Redis, workers, api) in front of its engine, which runs already."""
    command = [*_VELOCITY, "up", "--port", str(one.port), "--data", str(one.data)]
    with _process(one, "up", [*command, "--engine-url", one.engine_url]) as up:
        _wait(one, "up", up, _UP_SECONDS, partial(_says_ready, one.folder / "up.log"))
        yield one.target(_new_key(one))


@contextmanager
def _process(one: Installation, name: str, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """In a group of its own, so that Ctrl-C reaches it in our order and not at once; its output in a log."""
    one.control.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    environment = one.environment() | {"PYTHONPATH": path}
    if one.kind == "D":  # it is started without the launcher that knows these
        environment = profile.load("cpu").env | environment
    with (one.folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
        finally:  # also when it is interrupted once more
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait(
    one: Installation, name: str, process: subprocess.Popen[bytes], seconds: float, ready: Callable[[], bool]
) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            log = (one.folder / f"{name}.log").read_text(errors="replace")
            raise SystemExit(f"{name} of {one.kind} did not come up. The end of its log:\n{log[-4000:]}")
        time.sleep(0.5)


def _says_ready(log: Path) -> bool:
    return "ready" in log.read_text(errors="replace")


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as reply:  # noqa: S310 - our own engine
            return bool(reply.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def _new_key(one: Installation) -> str:
    command = [*_VELOCITY, "keys", "create", "bench", "--scope", "chat", "--scope", "jobs", "--json"]
    environment = os.environ | {"VELOCITY_DATA_DIR": str(one.data)}
    made = subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
    return str(json.loads(made.stdout)["key"])
