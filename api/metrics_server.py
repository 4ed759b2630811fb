"""GET /metrics on a port of its own, so that it is never reachable where clients are by mistake.

One of several api processes serves it on a unix socket instead, to the parent that adds them up.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from socket import socket

import uvicorn
from prometheus_client.registry import Collector
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api.asgi import Receive, Scope, Send, header, send_error, send_whole
from api.errors import CLOSE, ApiError, internal_error, to_api_error
from api.metrics import rendered
from engine import log
from engine.errors import VelocityError
from engine.ports import listen

Authenticate = Callable[[bytes | None], Awaitable[object]]
"""Takes the Authorization header; raises a VelocityError if it does not allow to read metrics."""
Ask = Callable[[], Awaitable[None]]
"""Awaited before each answer, so that what is collected then is of now."""

_CONNECTIONS = 16
"""At one time; more are cut off. A Prometheus needs one."""
_CONNECTION_SECONDS = 30.0
"""Lifetime of a connection, whoever is slow: a scraper that trickles its request, or one that does not read."""

logger = log.get(__name__)


class _Connection(HttpToolsProtocol):
    """uvicorn waits without end for a request's head and for a response to leave; a scrape has one deadline for all."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        super().connection_made(transport)
        self._deadline = self.loop.call_later(_CONNECTION_SECONDS, transport.abort)
        if len(self.connections) > _CONNECTIONS:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)


class _Server(uvicorn.Server):
    """uvicorn's server as a guest of the process: signals belong to the host."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Scrape:
    """The one route."""

    def __init__(self, metrics: Collector, authenticate: Authenticate | None = None, ask: Ask | None = None) -> None:
        self._metrics = metrics
        self._authenticate = authenticate
        self._ask = ask

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        try:
            body, content_type = await self._answer(scope)
        except VelocityError as error:
            await send_error(send, to_api_error(error), [CLOSE])
        except Exception:  # the process edge: what fails here must not end up in uvicorn's words
            logger.exception("metrics_failed")
            await send_error(send, internal_error(), [CLOSE])
        else:
            await send_whole(send, 200, [(b"content-type", content_type.encode("latin-1")), CLOSE], body)

    async def _answer(self, scope: Scope) -> tuple[bytes, str]:
        if self._authenticate:
            await self._authenticate(header(scope, b"authorization"))
        if scope["path"] != "/metrics" or scope["method"] != "GET":
            raise ApiError(404, "Only GET /metrics is here.", code="not_found")
        if self._ask:
            await self._ask()
        return rendered(self._metrics, (header(scope, b"accept") or b"").decode("latin-1"))


@asynccontextmanager
async def serve_metrics(
    metrics: Collector, host: str, port: int, authenticate: Authenticate, ask: Ask | None = None
) -> AsyncIterator[int]:
    """Serve GET /metrics in the running loop; yields the port. Raises StartError if the port can't be used.

    On a loopback address anyone may read; on any other each request has to pass `authenticate`.
    """
    with listen(host, port, "the metrics", "VELOCITY_METRICS_PORT") as bound:
        address, number = bound.getsockname()[:2]
        private = ipaddress.ip_address(address).is_loopback
        async with _running(_Server(_config(_Scrape(metrics, None if private else authenticate, ask))), [bound]):
            logger.info("metrics_listening", host=host, port=number)
            yield number


@asynccontextmanager
async def serve_metrics_on(path: Path, metrics: Collector) -> AsyncIterator[None]:
    """Serve GET /metrics on a unix socket, to anyone who may enter its directory."""
    async with _running(_Server(_config(_Scrape(metrics), str(path)))):
        yield


@asynccontextmanager
async def _running(server: _Server, sockets: list[socket] | None = None) -> AsyncIterator[None]:
    serving = asyncio.create_task(server.serve(sockets=sockets))
    try:
        while not server.started:
            if serving.done():
                serving.result()
            await asyncio.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        await serving


def _config(app: _Scrape, path: str | None = None) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        uds=path,
        http=_Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
