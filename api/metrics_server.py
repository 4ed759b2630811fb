"""GET /metrics on a port of its own, so that it is never reachable where clients are by mistake."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api.asgi import Receive, Scope, Send, header, send_error, send_whole
from api.errors import ApiError, Header, internal_error, to_api_error
from api.metrics import Metrics
from engine import log
from engine.errors import VelocityError
from engine.ports import listen

Authenticate = Callable[[bytes | None], Awaitable[object]]
"""Takes the Authorization header; raises a VelocityError if it does not allow to read metrics."""

_CLOSE: Header = (b"connection", b"close")
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

    def __init__(self, metrics: Metrics, authenticate: Authenticate | None) -> None:
        self._metrics = metrics
        self._authenticate = authenticate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        try:
            body, content_type = await self._answer(scope)
        except VelocityError as error:
            await send_error(send, to_api_error(error), [_CLOSE])
        except Exception:  # the process edge: what fails here must not end up in uvicorn's words
            logger.exception("metrics_failed")
            await send_error(send, internal_error(), [_CLOSE])
        else:
            await send_whole(send, 200, [(b"content-type", content_type.encode("latin-1")), _CLOSE], body)

    async def _answer(self, scope: Scope) -> tuple[bytes, str]:
        if self._authenticate:
            await self._authenticate(header(scope, b"authorization"))
        if scope["path"] != "/metrics" or scope["method"] != "GET":
            raise ApiError(404, "Only GET /metrics is here.", code="not_found")
        return self._metrics.render((header(scope, b"accept") or b"").decode("latin-1"))


@asynccontextmanager
async def serve_metrics(metrics: Metrics, host: str, port: int, authenticate: Authenticate) -> AsyncIterator[int]:
    """Serve GET /metrics in the running loop; yields the port. Raises StartError if the port can't be used.

    On a loopback address anyone may read; on any other each request has to pass `authenticate`.
    """
    with listen(host, port, "the metrics", "VELOCITY_METRICS_PORT") as bound:
        address, number = bound.getsockname()[:2]
        private = ipaddress.ip_address(address).is_loopback
        server = _Server(_config(_Scrape(metrics, None if private else authenticate)))
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        try:
            while not server.started:
                if serving.done():
                    serving.result()
                await asyncio.sleep(0.01)
            logger.info("metrics_listening", host=host, port=number)
            yield number
        finally:
            server.should_exit = True
            for connection in list(server.server_state.connections):
                connection.transport.abort()
            await serving


def _config(app: _Scrape) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=_Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
