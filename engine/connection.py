"""One kept-alive HTTP/1.1 connection to the engine: request bytes out, body chunks in, as they arrive.

idle ── send() ──► waiting for the head ── head() ──► body ── chunk() … b"" ──► idle again
  └────────────────────────── close() or any error ──────────────────────────► closed
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import httptools

from engine.errors import EngineError, EngineLost, EngineProtocolError

HIGH_WATER = 256 * 1024
"""Unread body bytes at which reading from the engine pauses: the memory bound of one stream."""

_COPIED_MOST = 16 * 1024
"""Bytes of a body up to which it is copied behind its head, so that both leave in one packet."""


_READ_MOST = 64 * 1024
"""Bytes that are read at once: more would stand before `HIGH_WATER` can hold them up."""


def read_buffer() -> memoryview:
    """What `EngineConnection`s read into."""
    return memoryview(bytearray(_READ_MOST))


@dataclass(slots=True)
class Head:
    """Status line and headers of an answer: of each (lower-case) name the first."""

    status: int
    headers: dict[bytes, bytes] = field(default_factory=dict)

    def get(self, name: bytes) -> bytes | None:
        """A header's value."""
        return self.headers.get(name)


class EngineConnection(asyncio.BufferedProtocol):
    """Speaks one request at a time. Not safe for concurrent requests: the pool hands it to one owner.

    What it reads is passed on before the next read, so that all connections of a loop may share one `buffer`.
    """

    def __init__(self, buffer: memoryview | None = None) -> None:
        self._buffer = buffer or read_buffer()
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._head = Head(0)
        self._head_done = False
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._complete = True
        self._error: EngineError | None = None
        self._paused = False
        self._take: Callable[[bytes], bool] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._writing_paused = False
        self._cut = False
        """Whether the answer came before the request had left: then nothing else may follow on the connection."""
        self._idle_since = 0.0

    # --- what the owner calls

    @property
    def reusable(self) -> bool:
        """Whether another request may be sent: the last answer is complete and read, and the connection is kept.

        Unread bytes would be the next request's, and with it somebody else's.
        """
        kept = self._error is None and self._transport is not None and not self._cut
        return self._complete and not self._chunks and kept

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last answer was complete."""
        return self._loop.time() - self._idle_since

    async def send(self, head: bytes, body: bytes = b"") -> None:
        """Write one whole request."""
        transport = self._open_transport()
        self._head, self._head_done, self._complete = Head(0), False, False
        self._resume()
        if len(body) > _COPIED_MOST:
            transport.write(head)
            transport.write(body)
        else:
            transport.write(head + body)
        while self._writing_paused and not self._head_done:  # an early answer need not wait for what it refuses
            await self._wait()
        self._cut = self._writing_paused

    async def head(self) -> Head:
        """Wait for the answer's status and headers. Raises EngineLost or EngineProtocolError."""
        while not self._head_done:
            await self._wait()
        return self._head

    async def chunk(self) -> bytes:
        """All body bytes that have arrived, at least one; b"" at the end of the body."""
        while not self._chunks:
            if self._complete:
                return b""
            await self._wait()
        data = self._unread()
        self._resume()
        return data

    async def pour(self, take: Callable[[bytes], bool]) -> bool:
        """Hand what comes to `take` at once, in the event loop's own callback: no task is switched to for it.

        Returns True at the end of the body, and False after `take` has: it wants no more for now, and the engine is not
        read until this is called anew. `take` must not raise.
        """
        if self._chunks and not take(await self.chunk()):
            return False
        self._resume()
        self._take = take
        try:
            while self._take is not None and not self._complete:
                await self._wait()
            return self._take is not None
        finally:
            self._take = None

    async def rest(self) -> bytes:
        """The body from here to its end."""
        parts: list[bytes] = []
        while data := await self.chunk():
            parts.append(data)
        return b"".join(parts)

    def close(self) -> None:
        """Drop the connection at once; the engine aborts what it was generating for it."""
        self._fail(EngineLost("The connection to the engine was closed."))
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in behaviour, not by inheritance

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - of BufferedProtocol
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._complete:  # bytes that nobody asked for
            self.close()
            return
        try:
            self._parser.feed_data(self._buffer[:nbytes])
        except httptools.HttpParserError as error:
            self._pour()  # what was valid is passed on first
            self._fail(EngineProtocolError(f"The engine's answer is not valid HTTP: {error}"))
            self.close()
        else:
            self._pour()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        ends_with_connection = self._head_done and self._head.get(b"content-length") is None and not self._chunked()
        if exc is None and ends_with_connection and not self._complete:
            self.on_message_complete()
        self._fail(EngineLost("The engine closed the connection before its answer was complete."))

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._wake()

    # --- httptools callbacks

    def on_message_begin(self) -> None:
        if self._complete:  # the parser takes this for an error, as it is one
            raise EngineProtocolError("There is more than one answer.")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head.headers.setdefault(name.lower(), value)

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # 100-continue and early hints are not the answer
            self._head = Head(0)
            return
        self._head.status = status
        self._head_done = True
        self._wake()

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)
        if self._take is not None:  # handed over when all of what came has been parsed
            return
        self._buffered += len(body)
        if self._buffered > HIGH_WATER:
            self._pause()
        self._wake()

    def on_message_complete(self) -> None:
        if not self._head_done:  # the end of an interim answer
            return
        self._complete = True
        self._idle_since = self._loop.time()
        if not self._parser.should_keep_alive() and self._transport is not None:
            self._transport.close()
            self._transport = None
        self._wake()

    # --- inside

    def _pour(self) -> None:
        if self._take is None or not self._chunks:
            return
        if not self._take(self._unread()):
            self._take = None
            self._pause()
            self._wake()

    def _unread(self) -> bytes:
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._buffered = 0
        return data

    def _pause(self) -> None:
        if not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    def _chunked(self) -> bool:
        return b"chunked" in (self._head.get(b"transfer-encoding") or b"")

    def _open_transport(self) -> asyncio.Transport:
        if self._transport is None:
            raise EngineLost("The engine closed an idle connection.")
        return self._transport

    def _fail(self, error: EngineError) -> None:
        if self._error is None:
            self._error = error
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        if self._error is not None and not self._complete:
            raise self._error
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
