"""Everything on one machine, as child processes: Redis, engine, worker, api. What dies is restarted."""

from __future__ import annotations

import asyncio
import fcntl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TextIO

import httpx
import orjson

from api import redis_server
from api.settings import ApiSettings
from engine.child import Child, ChildSpec
from engine.client import EngineClient
from engine.errors import StartError
from engine.ports import free_port, require_free
from workers.errors import LedgerUnavailable
from workers.ledger import Ledger
from workers.preflight import Preflight
from workers.redis import answers, connect

Say = Callable[[str], None]
Ready = Callable[[], Awaitable[bool]]
STATE_FILE = "up.json"
_HEALTH_SECONDS = 60.0
_TELL_SECONDS = 15.0


class Stack:
    """The processes of `velocity up`. `settings` is completed with the addresses of what it starts itself."""

    def __init__(self, settings: ApiSettings, say: Say, *, own_redis: bool, own_engine: bool) -> None:
        self.logs = settings.data_dir / "logs"
        self._say = say
        self._children: list[Child] = []
        self._redis: ChildSpec | None = None
        self._own_engine = own_engine
        if own_redis:
            url, self._redis = redis_server.child(settings.data_dir, self.logs / "redis.log", say)
            settings = settings.model_copy(update={"redis_url": url})
        if own_engine:
            settings = settings.model_copy(update={"engine_url": f"http://127.0.0.1:{free_port()}"})
        self.settings = settings
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self.url = f"http://{host}:{settings.port}"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Stack]:
        """All processes up and healthy inside, all ended after. Raises StartError that names what did not come up."""
        try:
            for folder in (self.logs, self.settings.data_dir / redis_server.FOLDER):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartError(f"The data directory {self.settings.data_dir} can't be used: {error.strerror}.") from None
        with (self.settings.data_dir / "up.lock").open("w") as lock:
            _lock(lock, self.settings.data_dir)
            require_free(self.settings.host, self.settings.port, "the api")
            state = self.settings.data_dir / STATE_FILE
            try:
                if self._redis:
                    await self._up(self._redis)
                where = {"url": self.url, "redis_url": self.settings.redis_url, "engine_url": self.settings.engine_url}
                state.write_bytes(orjson.dumps(where))  # from here on, other commands find this Redis
                await self._start()
                yield self
            finally:
                state.unlink(missing_ok=True)
                await self._stop()
                if self._redis:
                    redis_server.remove_socket(self.settings.data_dir)

    async def _stop(self) -> None:
        """Who depends on others ends first: api and worker, then the engine, then Redis."""
        order: list[list[Child]] = [
            [child for child in self._children if child.spec.name in names]
            for names in (("api", "worker", "quarantine"), ("engine",), ("redis",))
        ]
        busy = max((child.spec.stop_seconds for child in order[0]), default=0)
        if busy:
            self._say(f"ending; what is running has up to {busy:.0f} s (a second Ctrl-C ends it at once)")
        try:
            for children in order:
                await asyncio.gather(*(child.stop() for child in children))
        except asyncio.CancelledError:
            for child in self._children:
                child.kill()
            raise

    async def supervise(self) -> None:
        """Restart what dies, until one is beyond rescue (raises StartError) or this is cancelled."""
        tasks = [asyncio.create_task(child.supervise()) for child in self._children]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _start(self) -> None:
        await self._require_given()
        starting = [asyncio.create_task(self._up(spec)) for spec in self._specs()]
        try:
            await asyncio.gather(*starting)
        finally:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
        await self._require_health()

    async def _up(self, spec: ChildSpec) -> None:
        began = time.monotonic()
        child = Child(spec)
        self._children.append(child)
        waiting = asyncio.create_task(self._tell_time(spec, began))
        try:
            await child.start()
        finally:
            waiting.cancel()
        self._say(f"{spec.name} is up after {time.monotonic() - began:.1f} s")

    async def _tell_time(self, spec: ChildSpec, began: float) -> None:
        """Long work shows that it goes on."""
        while True:
            await asyncio.sleep(_TELL_SECONDS)
            self._say(f"{spec.name} is starting, {time.monotonic() - began:.0f} s so far")

    def _specs(self) -> list[ChildSpec]:
        settings = self.settings
        env = {
            "VELOCITY_REDIS_URL": settings.redis_url,
            "VELOCITY_ENGINE_URL": settings.engine_url,
            "VELOCITY_DATA_DIR": str(settings.data_dir),
            "VELOCITY_CACHE_DIR": str(settings.cache_dir),
            "VELOCITY_PROFILE": settings.profile,
            "VELOCITY_HOST": settings.host,
            "VELOCITY_PORT": str(settings.port),
            "VELOCITY_OPEN": "1" if settings.open else "0",
            "VELOCITY_LOG_JSON": "1",
        }

        def spec(
            name: str, arguments: list[str], ready: Ready, start: float, stop: float, line: Say | None
        ) -> ChildSpec:
            return ChildSpec(
                name=name, command=[sys.executable, "-m", "api.cli.main", *arguments], ready=ready, env=env,
                start_seconds=start, stop_seconds=stop, log_file=self.logs / f"{name}.log", line=line,
                restarts=settings.engine_restarts, tell=self._say,
            )  # fmt: skip

        stop_worker = settings.drain_seconds + 10
        stop_api = settings.shutdown_seconds + (5 if settings.api_workers == 1 else 10)  # a parent waits for its own
        specs = [
            spec("worker", ["worker"], self._worker_ready, 60, stop_worker, None),
            spec("quarantine", ["worker", "--lane", "quarantine"], self._worker_ready, 60, stop_worker, None),
            spec("api", ["api"], self._api_ready, 60, stop_api, None),
        ]
        if self._own_engine:
            engine = spec(
                "engine", ["engine", "serve"], self._engine_ready, settings.engine_start_timeout, 30, self._tell
            )
            specs.insert(0, engine)
        return specs

    def _tell(self, line: str) -> None:
        """Pass on what a person wants to know of the engine, from its log."""
        try:
            event = orjson.loads(line)
        except orjson.JSONDecodeError:
            return
        match event.get("event"):
            case "preparing_model":
                self._say(f"engine: {event['stage']} ({event['percent']} %)")
            case "child_died":
                self._say(f"engine: vLLM died ({event['ending']}); restarting in {event['restart_in_seconds']:g} s")
            case "child_restarted":
                self._say("engine: vLLM is back")

    async def _engine_ready(self) -> bool:
        async with EngineClient.of(self.settings) as engine:
            return await engine.healthy()

    async def _worker_ready(self) -> bool:
        redis = connect(self.settings.redis_url, 1.0)
        try:
            return await Ledger(redis).beat() > 0
        except LedgerUnavailable:
            return False
        finally:
            await redis.aclose()

    async def _api_ready(self) -> bool:
        return bool(await self._health())  # it is up, whatever it says of the others

    async def _health(self) -> dict[str, str]:
        """What /health says; empty while the api does not answer."""
        async with httpx.AsyncClient() as client:
            try:
                return dict((await client.get(f"{self.url}/health")).json())
            except (httpx.TransportError, ValueError):
                return {}

    async def _require_given(self) -> None:
        """What was named instead of started must be there."""
        if not self._redis and not await answers(self.settings.redis_url):
            raise StartError(f"Redis does not answer at {self.settings.redis_url}. Start it, or leave out --redis-url.")
        redis = connect(self.settings.redis_url, 1.0)
        try:
            await Preflight(redis, self.settings.data_dir, owner=False).check()
        finally:
            await redis.aclose()
        if not self._own_engine and not await self._engine_ready():
            raise StartError(
                f"The engine does not answer at {self.settings.engine_url}. Start it, or leave out --engine-url."
            )

    async def _require_health(self) -> None:
        """Every part is up; the api must see that too."""
        deadline = time.monotonic() + _HEALTH_SECONDS
        while time.monotonic() < deadline:
            if (await self._health()).get("status") in {"ok", "degraded"}:
                return
            await asyncio.sleep(0.2)
        parts = {"engine": await self._engine_ready(), "redis": await answers(self.settings.redis_url)}
        down = ", ".join(name for name, up in parts.items() if not up) or "the api"
        raise StartError(f"velocity is not healthy after {_HEALTH_SECONDS:g} s: {down} is down. Logs: {self.logs}")


def _lock(file: TextIO, data_dir: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise StartError(f"velocity is running on {data_dir} already. End it, or choose another --data.") from None
