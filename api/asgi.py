"""The ASGI types that are used here, and how an error leaves over them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from api.errors import JSON_TYPE, ApiError, Header

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
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
    return next((value for key, value in scope["headers"] if key == name), None)


async def read_body(receive: Receive, limit: int, seconds: float) -> bytes:
    """The whole request body.

    Raises ApiError 413 once it is larger than `limit` bytes, 408 if it has not come in time, 400 if the client leaves.
    """
    try:
        async with asyncio.timeout(seconds):
            return await _read_body(receive, limit)
    except TimeoutError:
        close = (b"connection", b"close")
        raise ApiError(
            408, f"The request body did not come within {seconds:g} s.", code="request_timeout", headers=(close,)
        ) from None


async def _read_body(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "The request body ended early.")
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            # The server discards the rest as it comes: if it closed, most clients would see a reset instead of this.
            raise ApiError(413, f"The request body is larger than {limit:,} bytes.", code="request_too_large")
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone. Only after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass
