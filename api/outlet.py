"""What leaves for one client, and whether it is still there: called from the event loop's callbacks, not from tasks.

A switch to a task for every token costs more than all else that is done for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from api.asgi import Begun, Departure, Message, Receive, Send
from api.errors import Header

EXTENSION = "velocity.outlet"
"""Name of the ASGI extension by which a server offers an outlet of its own, for one request."""


class Outlet(Protocol):
    """Sends in order. What is written while it is `blocked` leaves with `drained`; whoever writes must await that."""

    @property
    def blocked(self) -> bool:
        """Whether the client has to take something first."""

    def watch(self, left: Callable[[], None]) -> None:
        """Call `left` once the client has gone; after the body was read, and until `unwatch`."""

    def unwatch(self) -> None:
        """It is of no interest any more."""

    def start(self, status: int, headers: list[Header]) -> bool:
        """The head of a stream. False, here and below, if it has not left yet. Raises what the server raises."""

    def write(self, data: bytes) -> bool:
        """A part of the stream."""

    def end(self) -> bool:
        """The end of the stream."""

    def whole(self, status: int, headers: list[Header], body: bytes) -> bool:
        """A complete answer."""

    async def drained(self) -> None:
        """Until everything has left."""


class DirectOutlet(Outlet, Protocol):
    """What a server offers under `EXTENSION`."""

    def body(self, limit: int) -> bytes | None:
        """The request's body, once, if all of it is there and no larger than `limit`; else it is to be received."""


class AsgiOutlet:
    """Over ASGI, of any server. `send` is a coroutine, but one that runs to its end at once unless the client reads too
    slowly: it is run by hand, and left to a task when it has to wait.
    """

    __slots__ = ("_departure", "_queue", "_receive", "_rest", "_send")

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._rest: Begun[None] | None = None
        self._queue: list[Message] = []
        self._departure: Departure | None = None

    @property
    def blocked(self) -> bool:
        """Of Outlet, as all below."""
        return self._rest is not None

    def watch(self, left: Callable[[], None]) -> None:
        """Of Outlet."""
        self._departure = Departure(self._receive, left)

    def unwatch(self) -> None:
        """Of Outlet."""
        if self._departure is not None:
            self._departure.close()

    def start(self, status: int, headers: list[Header]) -> bool:
        """Of Outlet."""
        return self._pass({"type": "http.response.start", "status": status, "headers": headers})

    def write(self, data: bytes) -> bool:
        """Of Outlet."""
        return self._pass({"type": "http.response.body", "body": data, "more_body": True})

    def end(self) -> bool:
        """Of Outlet."""
        return self._pass({"type": "http.response.body", "body": b""})

    def whole(self, status: int, headers: list[Header], body: bytes) -> bool:
        """Of Outlet."""
        self.start(status, [*headers, (b"content-length", b"%d" % len(body))])
        return self._pass({"type": "http.response.body", "body": body})

    async def drained(self) -> None:
        """Of Outlet."""
        while self._rest is not None:
            try:
                await self._rest
            finally:
                self._rest = None
            while self._queue and self._rest is None:
                self._pass(self._queue.pop(0))

    def _pass(self, message: Message) -> bool:
        if self._rest is not None:
            self._queue.append(message)
            return False
        sending = Begun(self._send(message))
        if not sending.done:
            self._rest = sending
        return sending.done
