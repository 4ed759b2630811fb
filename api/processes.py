"""Several api processes behind one port: a parent binds it, starts them, restarts what dies, and adds up their metrics.

All accept from the parent's one socket, so that a connection goes to whoever is free. Sockets of their own on the same
port (SO_REUSEPORT) would share connections out by a hash, and a few long streams would end up in one process.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from socket import socket

import uvloop

from api.fast_redis import FastRedis
from api.key_store import Keys
from api.metrics import Metrics
from api.metrics_server import serve_metrics
from api.server import may_scrape, serve_on
from api.settings import ApiSettings
from api.summed_metrics import SummedMetrics
from engine import log
from engine.child import Child, ChildSpec
from engine.errors import SettingsError, StartError
from engine.ports import listen
from engine.stopping import run_until_signal
from workers.errors import PreflightError

_START_SECONDS = 60.0
_STOP_SECONDS = 5.0
"""Beyond what running requests may take: to settle them, and to close what is open."""
_PATH_MOST = 107
"""Bytes of a unix socket's address."""

logger = log.get(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """What the parent gives to one process: its number, the socket's descriptor, a directory that is only theirs."""

    number: int
    listener: int
    directory: Path

    @property
    def arguments(self) -> list[str]:
        """Of the command that is such a process."""
        return ["--worker", str(self.number), "--listener", str(self.listener), "--directory", str(self.directory)]

    def metrics(self, pid: int) -> Path:
        """The socket of its metrics, there as soon as it serves; after a restart it is another."""
        return self.directory / f"{self.number}-{pid}.sock"

    @property
    def fault(self) -> Path:
        """Where it says why a restart would not help."""
        return self.directory / f"{self.number}.fault"


def work(settings: ApiSettings, place: Place) -> None:
    """Be one of several processes, until SIGTERM. A fault that no restart mends is left to the parent to say."""
    try:
        with socket(fileno=place.listener) as bound:
            uvloop.run(serve_on(bound, settings, place.metrics(os.getpid())))
    except (SettingsError, PreflightError) as error:
        place.fault.write_text(str(error))
        sys.exit(os.EX_CONFIG)


async def serve(settings: ApiSettings) -> None:
    """Serve with as many processes as `api_workers` says until SIGINT or SIGTERM; a second one ends them at once.

    Raises StartError if they don't come up, or SettingsError with what one of them found that no restart mends.
    """
    with (
        listen(settings.host, settings.port, "the api") as bound,
        tempfile.TemporaryDirectory(prefix="velocity-api-", ignore_cleanup_errors=True) as private,
    ):
        places = [Place(number, bound.fileno(), Path(private)) for number in range(1, settings.api_workers + 1)]
        if len(os.fsencode(places[-1].metrics(1 << 22))) > _PATH_MOST:
            raise StartError(f"The name of the directory {private} is too long for sockets in it. Set TMPDIR.")
        workers = {place: _worker(settings, place) for place in places}
        async with _metrics(settings, workers):  # first, so that a port in use is said at once
            logger.info("api_starting", host=settings.host, port=bound.getsockname()[1], workers=len(workers))
            await run_until_signal(_run([*workers.values()], bound))


def _worker(settings: ApiSettings, place: Place) -> Child:
    async def ready() -> bool:
        return _address(place, child) is not None

    def fault() -> SettingsError | None:
        return SettingsError(place.fault.read_text()) if place.fault.exists() else None

    child = Child(
        ChildSpec(
            name=f"api worker {place.number}",
            command=[sys.executable, "-m", "api.cli.main", "api", *place.arguments],
            ready=ready,
            start_seconds=_START_SECONDS,
            stop_seconds=settings.shutdown_seconds + _STOP_SECONDS,
            restarts=sys.maxsize,  # the others go on meanwhile
            descriptors=(place.listener,),
            own_output=False,
            fault=fault,
        )
    )
    return child


async def _run(workers: Sequence[Child], bound: socket) -> None:
    """Until it is cancelled, or one is beyond rescue."""
    tasks = [asyncio.create_task(_keep(worker)) for worker in workers]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            logger.error("api_ending", reason=str(task.exception()))  # said once more when what runs has ended
            task.result()
    finally:
        bound.close()  # or the kernel would take connections in that nobody accepts
        await _end(workers, tasks)


async def _keep(worker: Child) -> None:
    await worker.start()
    await worker.supervise()


async def _end(workers: Sequence[Child], tasks: Sequence[asyncio.Task[None]]) -> None:
    """Let what runs end. If this is cancelled, by a second signal, they get a second one too, and end at once."""
    for task in tasks:
        task.cancel()
    try:
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in workers))
    except asyncio.CancelledError:
        try:
            await asyncio.gather(*(worker.stop() for worker in workers))
        finally:
            for worker in workers:
                worker.kill()
        raise


@asynccontextmanager
async def _metrics(settings: ApiSettings, workers: dict[Place, Child]) -> AsyncIterator[None]:
    """The sums of all, on their own port if they have one. Scrapers' keys are looked up by this process."""
    if settings.metrics_port is None:
        yield
        return
    own = Metrics()
    sums = SummedMetrics(own, {str(place.number): partial(_address, place, child) for place, child in workers.items()})
    redis = FastRedis(settings.redis_url, settings.limiter_timeout, own)
    scraper = may_scrape(Keys(redis, settings.data_dir, open_mode=settings.open))
    try:
        async with serve_metrics(sums, settings.metrics_host, settings.metrics_port, scraper, sums.ask):
            yield
    finally:
        await redis.aclose()


def _address(place: Place, worker: Child) -> Path | None:
    """Where its metrics are; None while it starts, or is dead."""
    if worker.pid is None:
        return None
    path = place.metrics(worker.pid)
    return path if path.exists() else None
