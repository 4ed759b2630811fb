"""One connection to Redis that many requests share: what they ask in one turn of the event loop leaves in one packet.

redis-py lends a connection to each command and makes a task and timers for it; on the interactive path that costs more
than the engine's own first token on a fast machine. Here a call is a packed command, a future, and a place in a queue.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from hashlib import sha1
from typing import Any, cast

import hiredis
from redis.asyncio import ConnectionPool, SSLConnection, UnixDomainSocketConnection

from workers.errors import LedgerFull, LedgerUnavailable

_SOON = 0.002
"""Seconds for which a call that nobody waits for waits for another one, to leave in the same packet."""

_GRACE = 0.02
"""Seconds more for a call whose time is over, in case that it was not Redis that was slow."""

Word = str | bytes | int | float
_pack = cast("Callable[[tuple[Word, ...]], bytes]", hiredis.pack_command)  # its stub knows tuples of one alone


class Script:
    """A Lua script, and the digest by which Redis knows it once it has run it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.digest = sha1(text.encode(), usedforsecurity=False).hexdigest()


@dataclass(slots=True)
class _Call:
    future: asyncio.Future[Any]
    at: float
    script: Script | None = None
    args: tuple[Word, ...] = ()


class _Refused(Exception):
    """An error that Redis answered with."""


class RedisPipe:
    """Calls in the order in which they were made. Every one ends within `timeout` seconds; none is repeated."""

    def __init__(self, url: str, timeout: float) -> None:
        pool = ConnectionPool.from_url(url)  # redis-py reads the address, so that its options mean what they always do
        self._to = pool.make_connection()  # type: ignore[no-untyped-call] # redis-py has no type there
        self._timeout = timeout
        self._wire: _Wire | None = None
        self._connecting: asyncio.Task[_Wire] | None = None

    async def call(self, *command: Word) -> Any:
        """One command's answer. Raises LedgerUnavailable, and LedgerFull when Redis has no memory left."""
        return await (self._ready() or await self._connected()).ask(command)

    def run(self, script: Script, *args: Word) -> Awaitable[Any]:
        """A script's answer; it names no keys. Raises as `call` does."""
        wire = self._ready()
        return wire.run(script, args) if wire else self._run(script, args)

    def post(self, script: Script, *args: Word) -> asyncio.Future[Any]:
        """As `run`, for what nobody waits for: it leaves before whatever is asked next, or in a moment."""
        wire = self._ready()
        return wire.run(script, args, soon=True) if wire else asyncio.ensure_future(self._run(script, args))

    async def _run(self, script: Script, args: tuple[Word, ...]) -> Any:
        return await (await self._connected()).run(script, args)

    async def aclose(self) -> None:
        """Drop the connection; what is still waited for fails."""
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        if self._wire is not None:
            self._wire.end("The connection to Redis was closed.")

    def _ready(self) -> _Wire | None:
        return self._wire if self._wire is not None and self._wire.open else None

    async def _connected(self) -> _Wire:
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect())
            self._connecting.add_done_callback(self._connection_tried)
        return await asyncio.shield(self._connecting)

    def _connection_tried(self, task: asyncio.Task[_Wire]) -> None:
        self._connecting = None
        if not task.cancelled() and task.exception() is None:
            self._wire = task.result()

    async def _connect(self) -> _Wire:
        loop = asyncio.get_running_loop()
        to, wire = self._to, _Wire(self._timeout)
        try:
            async with asyncio.timeout(self._timeout):
                if isinstance(to, UnixDomainSocketConnection):
                    await loop.create_unix_connection(lambda: wire, to.path)
                else:
                    tls = to.ssl_context.get() if isinstance(to, SSLConnection) else None
                    await loop.create_connection(lambda: wire, to.host, to.port, ssl=tls)
                await self._greet(wire)
        except (OSError, TimeoutError) as error:
            raise LedgerUnavailable(f"Redis did not answer: {error or 'no connection in time'}") from None
        finally:
            if not wire.greeted:
                wire.end("")
        return wire

    async def _greet(self, wire: _Wire) -> None:
        if self._to.password:
            await wire.ask(("AUTH", *filter(None, (self._to.username, self._to.password))))
        if self._to.db:
            await wire.ask(("SELECT", self._to.db))
        wire.greeted = True


class _Wire(asyncio.Protocol):
    """One connection's life."""

    def __init__(self, timeout: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout = timeout
        self._reader = hiredis.Reader(replyError=_Refused)
        self._transport: asyncio.Transport | None = None
        self._calls: deque[_Call] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._late: _Call | None = None
        """The first call, if its time was over at the last look."""
        self._unsent: list[bytes] = []
        self._flushes = False
        """Whether what is unsent leaves in this turn of the loop."""
        self._flushes_later = False
        """Whether a timer sends what is there then; it is not moved, since that costs more than a look for nothing."""
        self.greeted = False
        """Whether Redis knows who we are, and may be asked."""

    @property
    def open(self) -> bool:
        """Whether it can be written to."""
        return self._transport is not None

    def ask(self, command: tuple[Word, ...]) -> asyncio.Future[Any]:
        """One command's answer."""
        return self._send(_pack(command), _Call(self._loop.create_future(), time.monotonic()))

    def run(self, script: Script, args: tuple[Word, ...], *, soon: bool = False) -> asyncio.Future[Any]:
        """A script's answer; Redis is given its text only if it does not know it. `soon`: with the next that leaves."""
        packed = _pack(("EVALSHA", script.digest, 0, *args))
        return self._send(packed, _Call(self._loop.create_future(), time.monotonic(), script, args), soon=soon)

    def end(self, why: str) -> None:
        """Close it; whoever waits gets LedgerUnavailable."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._calls:
            _set_error(self._calls.popleft().future, LedgerUnavailable(why))

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._reader.feed(data)
            while (answer := self._reader.gets()) is not False:
                self._answered(self._calls.popleft(), answer)
        except (hiredis.ProtocolError, IndexError):
            self.end("Redis answered something that is not Redis's protocol.")

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.end(f"Redis did not answer: {exc or 'it closed the connection'}")

    # --- inside

    def _send(self, packed: bytes, call: _Call, *, soon: bool = False) -> asyncio.Future[Any]:
        if self._transport is None:
            _set_error(call.future, LedgerUnavailable("Redis did not answer: the connection is closed"))
            return call.future
        self._calls.append(call)
        self._unsent.append(packed)
        if soon:
            if not self._flushes_later:
                self._flushes_later = True
                self._loop.call_later(_SOON, self._flush_later)
        elif not self._flushes:
            self._flushes = True
            self._loop.call_soon(self._flush)
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout, self._look)
        return call.future

    def _flush(self) -> None:
        """All that was asked in this turn of the loop leaves in one packet."""
        self._flushes = False
        packed = b"".join(self._unsent)
        self._unsent.clear()
        if packed and self._transport is not None:
            self._transport.write(packed)

    def _flush_later(self) -> None:
        self._flushes_later = False
        self._flush()

    def _look(self) -> None:
        """One timer for all: the first call in the queue is the one that has waited for longest."""
        self._timer = None
        if not self._calls:
            return
        left = self._calls[0].at + self._timeout - time.monotonic()
        if left <= 0 and self._late is self._calls[0]:
            self.end(f"Redis did not answer within {self._timeout:g} s.")
            return
        if left <= 0:  # if it was the loop that was busy, the answer is there, and is read before the next look
            self._late, left = self._calls[0], _GRACE
        self._timer = self._loop.call_later(left, self._look)

    def _answered(self, call: _Call, answer: Any) -> None:
        if not isinstance(answer, _Refused):
            if not call.future.done():
                call.future.set_result(answer)
            return
        why = str(answer)
        if call.script is not None and why.startswith("NOSCRIPT"):
            again = _Call(call.future, call.at)
            self._send(_pack(("EVAL", call.script.text, 0, *call.args)), again)
            return
        if why.startswith("OOM ") or "-OOM " in why:  # the latter from scripts before Redis 7
            _set_error(call.future, LedgerFull("Redis has no memory left: nothing was written."))
            return
        _set_error(call.future, LedgerUnavailable(f"Redis did not answer: {why}"))
        if why.startswith(("READONLY", "LOADING", "MASTERDOWN")):  # another one may be the primary now
            self.end(f"Redis did not answer: {why}")


def _set_error(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # also one that nobody waits for any more is no news for the loop's exception handler
