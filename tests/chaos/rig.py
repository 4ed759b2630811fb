"""All of velocity as processes: Redis behind the proxy, a fake engine, api and workers; and who talks to them."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

import httpx
from redis.asyncio import Redis
from redis.exceptions import RedisError

from api import redis_server
from api.keys import new_text
from engine.ports import listen
from tests.chaos.child import Child
from tests.chaos.front import Front
from tests.chaos.proxy import Proxy

VELOCITY = (sys.executable, "-m", "api.cli.main")
CRASHING_API = (sys.executable, "-m", "tests.chaos.api")
CRASHING_WORKER = (sys.executable, "-m", "tests.chaos.worker")


@dataclass
class Rig:
    """What runs, and where it is."""

    data: Path
    redis_url: str
    """Of Redis itself, without the proxy."""
    redis: Child
    proxy: Proxy
    engine: Child
    executions: Path
    """The engine's log."""
    apis: list[Child]
    workers: list[Child]
    front: Front
    direct: Redis

    @property
    def children(self) -> list[Child]:
        """Every process."""
        return [self.redis, self.engine, *self.apis, *self.workers]

    async def redis_answers(self, seconds: float = 30) -> None:
        """Wait until Redis serves. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while True:
                try:
                    await self.direct.ping()
                except (RedisError, OSError):
                    await asyncio.sleep(0.05)
                else:
                    return

    def heal(self) -> None:
        """Nothing is frozen any more, and nothing gets lost."""
        self.proxy.share = 0.0
        for child in self.children:
            child.signal(signal.SIGCONT)

    def said(self) -> str:
        """What the processes said last, for whoever reads a failure."""
        return "\n".join(f"== {child.name} {child.exits}\n{child.tail()}" for child in self.children)


@asynccontextmanager
async def rig(
    directory: Path,
    *,
    seed: int = 0,
    apis: int = 1,
    workers: int = 1,
    tenants: int = 1,
    api: Sequence[str] = (*VELOCITY, "api"),
    worker: Sequence[str] = (*VELOCITY, "worker"),
    idempotent: bool = True,
    quarantine: bool = False,
    env: dict[str, str] | None = None,
) -> AsyncIterator[Rig]:
    """A whole installation in `directory`, ended whatever happens."""
    data = directory / "data"
    (data / redis_server.FOLDER).mkdir(parents=True)
    redis_url, spec = redis_server.child(data, directory / "redis.log", lambda _: None)
    proxy = Proxy(redis_server.socket_path(data), Random(seed))  # noqa: S311 - a schedule of faults
    text = new_text()[1]
    bootstrap = directory / "bootstrap.key"
    bootstrap.write_text(text)
    log = directory / "executions.log"
    async with AsyncExitStack() as stack:
        stack.callback(redis_server.remove_socket, data)
        await stack.enter_async_context(proxy.listening())
        port, *ports = [_reserved(stack) for _ in range(1 + apis)]
        common = {
            "VELOCITY_REDIS_URL": proxy.url, "VELOCITY_ENGINE_URL": f"http://127.0.0.1:{port}",
            "VELOCITY_DATA_DIR": str(data), "VELOCITY_LEASE_SECONDS": "2", "VELOCITY_SHARD_ITEMS": "8",
            "VELOCITY_REDIS_TIMEOUT": "2", "VELOCITY_BOOTSTRAP_KEY_FILE": str(bootstrap),
            "VELOCITY_DRAIN_SECONDS": "1", "CHAOS_MARKERS": str(directory), **(env or {}),
        }  # fmt: skip
        engine_command = (sys.executable, "-m", "tests.chaos.engine", str(port), str(log))
        lanes = {f"worker-{n}": worker for n in range(workers)}
        if quarantine:
            lanes["quarantine"] = (*worker, "--lane", "quarantine")
        running = Rig(
            data=data, redis_url=redis_url, proxy=proxy, executions=log,
            redis=Child("redis", spec.command, {}, directory), engine=Child("engine", engine_command, {}, directory),
            apis=[
                Child(f"api-{n}", api, {**common, "VELOCITY_PORT": str(at)}, directory) for n, at in enumerate(ports)
            ],
            workers=[Child(name, command, common, directory) for name, command in lanes.items()],
            front=await stack.enter_async_context(Front.to(ports, seed=seed, idempotent=idempotent)),
            direct=Redis.from_url(redis_url, socket_timeout=2),
        )  # fmt: skip
        stack.push_async_callback(running.direct.aclose)
        for child in running.children:
            stack.push_async_callback(child.end)
        running.redis.start()
        await running.redis_answers()
        for child in running.children[1:]:
            child.start()
        await running.front.make_keys(text, tenants)
        yield running


def _reserved(stack: AsyncExitStack) -> int:
    """A port that is given to nobody else, also while the process that is to listen there is down."""
    held = stack.enter_context(listen("127.0.0.1", 0, "a process"))  # it never listens itself
    number: int = held.getsockname()[1]
    return number


@asynccontextmanager
async def explained(running: Rig) -> AsyncIterator[None]:
    """A failure comes with what the processes said."""
    try:
        yield
    except (AssertionError, TimeoutError, httpx.HTTPError) as error:
        error.add_note(running.said())
        raise


async def paused(child: Child, seconds: float) -> None:
    """Freeze a process for so long, unless it is down."""
    pid = child.signal(signal.SIGSTOP)
    await asyncio.sleep(seconds)
    if pid is not None and child.pid == pid:
        with suppress(ProcessLookupError):
            child.signal(signal.SIGCONT)
