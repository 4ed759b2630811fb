"""What leaves for one client: ASGI's `send`, called from the event loop's callbacks as long as the client keeps up.

A switch to a task for every token costs more than all else that is done for it. `send` is a coroutine, but one that
runs to its end at once unless the client reads too slowly: it is run by hand, and left to a task when it has to wait.
"""

from __future__ import annotations

from api.asgi import Begun, Message, Send
from api.errors import Header


class Outlet:
    """Sends in order. What is written while it is `blocked` leaves with `drained`; whoever writes must await that."""

    __slots__ = ("_head", "_queue", "_rest", "_send")

    def __init__(self, head: Send, send: Send) -> None:
        self._head = head
        """Sends the start of an answer, and may add to its headers."""
        self._send = send
        self._rest: Begun[None] | None = None
        self._queue: list[tuple[Send, Message]] = []

    @property
    def blocked(self) -> bool:
        """Whether the client has to take something first."""
        return self._rest is not None

    def start(self, status: int, headers: list[Header]) -> bool:
        """The head of the answer. False, here and below, if it has not left yet. Raises what `send` raises."""
        return self._pass(self._head, {"type": "http.response.start", "status": status, "headers": headers})

    def write(self, data: bytes) -> bool:
        """A part of the body."""
        return self._pass(self._send, {"type": "http.response.body", "body": data, "more_body": True})

    def end(self) -> bool:
        """The end of the body."""
        return self._pass(self._send, {"type": "http.response.body", "body": b""})

    async def drained(self) -> None:
        """Until everything has left."""
        while self._rest is not None:
            try:
                await self._rest
            finally:
                self._rest = None
            while self._queue and self._rest is None:
                self._pass(*self._queue.pop(0))

    def _pass(self, send: Send, message: Message) -> bool:
        if self._rest is not None:
            self._queue.append((send, message))
            return False
        sending = Begun(send(message))
        if not sending.done:
            self._rest = sending
        return sending.done
