"""The ASGI types that are used here, and how an error leaves over them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, MutableMapping
from typing import Any, Generic, TypeVar

from api.errors import CLOSE, JSON_TYPE, ApiError, Header

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
T = TypeVar("T")
App = Callable[[Scope, Receive, Send], Awaitable[None]]


async def send_whole(send: Send, status: int, headers: list[Header], body: bytes) -> None:
    """A complete answer."""
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: ApiError, headers: list[Header] | None = None) -> None:
    """An error answer in OpenAI's shape."""
    await send_whole(send, error.status, [JSON_TYPE, *error.headers, *(headers or [])], error.body())


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first request header of that (lower-case) name."""
    for key, value in scope["headers"]:
        if key == name:
            found: bytes = value
            return found
    return None


async def read_body(receive: Receive, limit: int, seconds: float) -> bytes:
    """The whole request body.

    Raises ApiError 413 once it is larger than `limit` bytes, 408 if it has not come in time, 400 if the client leaves.
    """
    first = Begun(receive())  # most bodies are there already
    if first.done and not first.value.get("more_body", False):
        return _part(first.value, 0, limit)
    try:
        async with asyncio.timeout(seconds):
            return await _read_body(first, receive, limit)
    except TimeoutError:
        raise ApiError(
            408, f"The request body did not come within {seconds:g} s.", code="request_timeout", headers=(CLOSE,)
        ) from None


async def _read_body(first: Begun[Message], receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    message = await first
    while True:
        parts.append(_part(message, size, limit))
        size += len(parts[-1])
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)
        message = await receive()


def _part(message: Message, before: int, limit: int) -> bytes:
    if message["type"] == "http.disconnect":
        raise ApiError(400, "The request body ended early.")
    part: bytes = message.get("body", b"")
    if before + len(part) > limit:
        # The server discards the rest as it comes: if it closed, most clients would see a reset instead of this.
        raise ApiError(413, f"The request body is larger than {limit:,} bytes.", code="request_too_large")
    return part


class Begun(Generic[T]):
    """A coroutine that was begun by hand: `done` at once, or to be awaited like any other."""

    __slots__ = ("_steps", "done", "future", "value")

    def __init__(self, coroutine: Awaitable[T]) -> None:
        self._steps = coroutine.__await__()
        self.done = False
        self.value: T
        self.future: asyncio.Future[Any] | None = None
        """What it waits for."""
        self.step()

    def step(self) -> None:
        """Run it to its end, or to the next thing that it waits for."""
        try:
            self.future = next(self._steps)
        except StopIteration as stop:
            self.done, self.value = True, stop.value

    def close(self) -> None:
        """End it where it is."""
        self._steps.close()
        self.future = None

    def __await__(self) -> Generator[Any, Any, T]:
        while not self.done:
            try:
                yield self.future
            except BaseException as error:  # noqa: BLE001 - thrown into the coroutine that it was meant for
                self._throw(error)
            else:
                self.step()
        return self.value

    def _throw(self, error: BaseException) -> None:
        try:
            self.future = self._steps.throw(error)
        except StopIteration as stop:
            self.done, self.value = True, stop.value


class Departure:
    """Calls `left` once the client has gone; after the body was read, and until `close`. It needs no task for that."""

    __slots__ = ("_left", "_receive", "_receiving")

    def __init__(self, receive: Receive, left: Callable[[], None]) -> None:
        self._receive = receive
        self._left: Callable[[], None] | None = left
        self._receiving = Begun(receive())
        self._look()

    def close(self) -> None:
        """It is of no interest any more."""
        self._left = None
        if self._receiving.future is not None:
            self._receiving.future.remove_done_callback(self._look)
        self._receiving.close()

    def _look(self, awaited: asyncio.Future[Any] | None = None) -> None:
        if self._left is None:
            return
        if awaited is not None:
            self._receiving.step()
        while self._receiving.done:
            if self._receiving.value["type"] == "http.disconnect":
                self._left()
                return
            self._receiving = Begun(self._receive())
        if self._receiving.future is not None:  # None only yields to other tasks, which no server's `receive` does
            self._receiving.future.add_done_callback(self._look)
