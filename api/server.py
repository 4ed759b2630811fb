"""The api process: `velocity api`."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import signal
import typing
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from socket import socket

import uvicorn

from api.app import build
from api.connection import protocol
from api.errors import lacks
from api.gateway import Gateway
from api.key_store import Keys
from api.keys import Scope
from api.metrics_server import Authenticate, serve_metrics, serve_metrics_on
from api.settings import ApiSettings
from engine import log
from engine.ports import listen

_GARBAGE = 20_000
"""Objects made and not freed after which Python looks for cycles; its own 700 come together in one request."""

logger = log.get(__name__)


class Server(uvicorn.Server):
    """uvicorn's server, which after a signal returns instead of raising it again: what is open gets closed."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM lets running requests end, the second does not."""
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, self._stop, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _stop(self, number: int) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        logger.info("stopping", signal=signal.Signals(number).name)


async def serve(settings: ApiSettings) -> None:
    """Serve until SIGINT or SIGTERM. Raises StartError if the port can't be used."""
    with listen(settings.host, settings.port, "the api") as bound:
        await serve_on(bound, settings)


async def serve_on(bound: socket, settings: ApiSettings, metrics_path: Path | None = None) -> None:
    """Serve on this socket until SIGINT or SIGTERM, and the metrics on their port, or on a unix socket at that path."""
    if settings.open:
        logger.warning("open_mode", meaning="Anyone who can reach this address can use it: no keys are checked.")
    async with Gateway.opened(settings) as gateway, _metrics(gateway, metrics_path):
        server = Server(config(gateway))
        _tidy_up()
        logger.info("api_listening", host=settings.host, port=bound.getsockname()[1])
        await server.serve(sockets=[bound])


def _tidy_up() -> None:
    """After the start: what lives as long as the process is not looked through again and again, and the memory that
    was needed for a moment goes back.
    """
    typing.clear_overloads()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GARBAGE, 10, 10)
    with suppress(OSError, AttributeError):  # glibc's alone has it
        ctypes.CDLL(None).malloc_trim(0)


@asynccontextmanager
async def _metrics(gateway: Gateway, path: Path | None) -> AsyncIterator[None]:
    """The metrics on a unix socket, or on their own port if they have one."""
    settings = gateway.settings
    if path is not None:
        async with serve_metrics_on(path, gateway.metrics):
            yield
    elif settings.metrics_port is not None:
        scraper = may_scrape(gateway.keys)
        async with serve_metrics(gateway.metrics, settings.metrics_host, settings.metrics_port, scraper):
            yield
    else:
        yield


def may_scrape(keys: Keys) -> Authenticate:
    """Lets holders of a key with the scope `metrics` pass."""

    async def authenticate(authorization: bytes | None) -> None:
        key = await keys.authenticate(authorization, without_redis=True)
        if not key.may(Scope.METRICS):
            raise lacks(Scope.METRICS)

    return authenticate


def config(gateway: Gateway) -> uvicorn.Config:
    """How uvicorn runs: httptools and uvloop, no access log (the request log says more), nothing at import."""
    return uvicorn.Config(
        build(gateway),
        http=protocol(),  # type: ignore[arg-type] # any callable that makes protocols will do
        loop="uvloop",
        ws="none",  # its handler would log addresses, and at DEBUG every header
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here asks where a request came from
        timeout_keep_alive=75,  # longer than a proxy keeps its side (deploy/nginx.conf: 60 s)
        timeout_graceful_shutdown=round(gateway.settings.shutdown_seconds),
    )
