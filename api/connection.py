"""A client's connection: uvicorn's, and a short way out of it for the streaming path.

uvicorn looks at every message of an answer anew, and wakes a task to tell that a client has left. Its inside is used
here, so this is for the versions that it was tried with; with any other the streaming path goes over plain ASGI.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from api.errors import CLOSE, Header
from api.lookout import Lookout
from api.outlet import EXTENSION

_TRIED = ("0.53.", "0.54.")
_IDLE_TICK = 1.0
"""Seconds by which a connection may be idle for longer than allowed."""

_COPIED_MOST = 64 * 1024
"""Bytes of a body up to which it is copied behind its head, so that both leave in one packet."""


def protocol() -> Callable[..., HttpToolsProtocol]:
    """What serves a client's connection with the uvicorn that is installed. To be called in the event loop."""
    if not uvicorn.__version__.startswith(_TRIED):
        return HttpToolsProtocol
    return partial(Connection, Lookout(_IDLE_TICK))


class Connection(HttpToolsProtocol):
    """Offers every request an outlet of its own."""

    def __init__(self, lookout: Lookout, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.departed: Callable[[], None] | None = None
        """Called when the client has gone."""
        self._idle = _Idle(self, lookout)

    def on_headers_complete(self) -> None:
        """A request has begun; its task runs after this."""
        super().on_headers_complete()
        extensions: dict[str, Any] = {EXTENSION: Wire(self, self.cycle)}
        self.scope["extensions"] = extensions

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        super().connection_lost(exc)
        self._idle.cancel()
        if self.departed is not None:
            self.departed()

    def on_response_complete(self) -> None:
        """uvicorn's, but for the timer that it makes, and throws away with the next request."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        else:
            self._idle.begin()
            self.timeout_keep_alive_task = self._idle  # type: ignore[assignment] # it is only ever cancelled


class _Idle:
    """Closes a connection on which nobody has asked anything for uvicorn's `timeout_keep_alive`."""

    __slots__ = ("_connection", "_lookout", "_until")

    def __init__(self, connection: Connection, lookout: Lookout) -> None:
        self._connection = connection
        self._lookout = lookout
        self._until = 0.0

    def begin(self) -> None:
        """From now on."""
        self._until = time.monotonic() + self._connection.timeout_keep_alive
        self._lookout.add(self)

    def cancel(self) -> None:
        """Somebody asks, or has gone."""
        self._lookout.remove(self)

    def look(self, now: float) -> None:
        """Of Watched."""
        if now >= self._until:
            self.cancel()
            self._connection.timeout_keep_alive_handler()


class Wire:
    """The outlet of one request (api.outlet.DirectOutlet), straight to the transport."""

    __slots__ = ("_chunked", "_connection", "_cycle", "_flow", "_head", "_transport")

    def __init__(self, connection: Connection, cycle: RequestResponseCycle) -> None:
        self._connection = connection
        self._cycle = cycle
        self._flow = cycle.flow
        self._transport: asyncio.Transport = cycle.transport
        self._chunked = cycle.scope["http_version"] != "1.0"
        """A client of HTTP/1.0 knows no chunks: its stream ends with the connection."""
        self._head = b""
        """Held for a moment, to leave with the first bytes of the body."""

    def body(self, limit: int) -> bytes | None:
        """Of DirectOutlet."""
        cycle = self._cycle
        if cycle.more_body or len(cycle.body) > limit:
            return None
        body, cycle.body = bytes(cycle.body), bytearray()
        return body

    @property
    def blocked(self) -> bool:
        """Of Outlet, as all below."""
        return self._flow.write_paused

    def watch(self, left: Callable[[], None]) -> None:
        """Of Outlet."""
        self._flow.resume_reading()  # it was paused if the body was large, and who does not read sees nobody leave
        self._connection.departed = left
        if self._transport.is_closing():  # uvicorn tells only the last request of a pipeline
            left()

    def unwatch(self) -> None:
        """Of Outlet."""
        self._connection.departed = None

    def start(self, status: int, headers: list[Header]) -> bool:
        """Of Outlet."""
        framing = b"transfer-encoding: chunked\r\n\r\n" if self._chunked else b"\r\n"
        self._head = self._begin(status, headers) + framing
        self._connection.loop.call_soon(self._flush)
        return not self._flow.write_paused

    def write(self, data: bytes) -> bool:
        """Of Outlet."""
        return self._write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def end(self) -> bool:
        """Of Outlet."""
        self._write(b"0\r\n\r\n" if self._chunked else b"")
        return self._end()

    def whole(self, status: int, headers: list[Header], body: bytes) -> bool:
        """Of Outlet."""
        head = b"%bcontent-length: %d\r\n\r\n" % (self._begin(status, headers), len(body))
        if len(body) > _COPIED_MOST:
            self._write(head)
            self._write(body)
        else:
            self._write(head + body)
        return self._end()

    async def drained(self) -> None:
        """Of Outlet."""
        if self._flow.write_paused and not self._transport.is_closing():
            await self._flow.drain()

    def _begin(self, status: int, headers: list[Header]) -> bytes:
        cycle = self._cycle
        cycle.response_started, cycle.waiting_for_100_continue = True, False
        if CLOSE in headers:
            cycle.keep_alive = False
        elif not cycle.keep_alive:
            headers.append(CLOSE)
        parts: list[bytes] = [STATUS_LINE[status]]
        for name, value in (*cycle.default_headers, *headers):
            parts += (name, b": ", value, b"\r\n")
        return b"".join(parts)

    def _write(self, data: bytes) -> bool:
        if self._head:
            data, self._head = self._head + data, b""
        if not self._transport.is_closing():
            self._transport.write(data)
        return not self._flow.write_paused

    def _flush(self) -> None:
        if self._head:
            self._write(b"")

    def _end(self) -> bool:
        cycle = self._cycle
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            self._transport.close()
        on_response: Callable[[], Any] = cycle.on_response
        on_response()
        return True  # the server's buffers have it; nothing comes after it
