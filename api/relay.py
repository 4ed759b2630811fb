"""One interactive request on its way: what the client is sent, and what is known for limits, log and metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import TypeVar

from api import shape
from api.asgi import Send, send_error
from api.errors import Header, to_api_error
from api.limits.leases import Admission, State
from api.limits.limiter import Used
from api.metrics import Gaps
from api.settings import ApiSettings
from api.usage import Usage
from engine.errors import EngineTimeout, VelocityError

_STREAM_HEADERS: tuple[Header, ...] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
_PING = b": ping\n\n"

T = TypeVar("T")


@dataclass(slots=True)
class Relay:
    """One request on its way: where it goes and what is known of it so far."""

    send: Send
    request: shape.EngineRequest
    admission: Admission
    settings: ApiSettings
    began: float = field(default_factory=time.monotonic)
    bulk: bool = False
    """Whether bulk work was at the engine when it began."""
    usage: Usage = field(default_factory=Usage)
    gaps: Gaps = field(default_factory=Gaps)
    status: int = 0
    """Status that the client was given; 0 until then."""
    entered: float | None = None
    """When it was sent to the engine."""
    first_byte: float | None = None
    refused: bool = False
    """Whether the engine, or the line, did not take it."""
    writing: bool = False
    """Whether the client is being waited for, and not the engine."""

    async def start(self) -> None:
        """Send the 200 of a stream, once."""
        if not self.status:
            self.status = 200
            headers = [*_STREAM_HEADERS, *self.admission.headers]
            await self.send({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, data: bytes) -> None:
        """Some bytes of the stream's body."""
        if data:
            self.writing = True
            await self.send({"type": "http.response.body", "body": data, "more_body": True})
            self.writing = False

    async def fail(self, fault: VelocityError) -> None:
        """Before the head a proper status; after it an error chunk and no clean end, which would look like success."""
        error = to_api_error(fault)
        if not self.status:
            self.status = error.status
            own = [] if any(name.startswith(b"x-ratelimit-") for name, _ in error.headers) else self.admission.headers
            await send_error(self.send, error, [*own])
            return
        await self.write(b"data: " + error.body() + b"\n\n")
        # The response is left incomplete, so the server closes the connection instead of ending the body.

    async def wait_pinging(self, waiting: Coroutine[object, object, T], patience: float) -> T:
        """Wait; after `patience` seconds answer 200, and ping, so that clients and proxies do not give up."""
        task = asyncio.create_task(self._first(waiting))
        try:
            while not (await asyncio.wait({task}, timeout=patience))[0]:
                await self.start()
                await self.write(_PING)
                patience = self.settings.ping_interval
            return task.result()
        finally:
            task.cancel()

    async def _first(self, waiting: Coroutine[object, object, T]) -> T:
        try:
            async with asyncio.timeout(self.settings.first_token_timeout):
                return await waiting
        except TimeoutError:
            raise EngineTimeout(f"No answer began within {self.settings.first_token_timeout:g} s.") from None

    @property
    def used(self) -> Used:
        """What the limits and the usage are told. An aborted stream's tokens are counted by its events."""
        usage, request = self.usage, self.request
        if self.entered is None:
            return Used(0, ran=self.admission.state is State.LEASED, refused=self.refused)
        if usage.known:
            return Used(usage.input_tokens + usage.output_tokens, usage.input_tokens, usage.output_tokens)
        if self.refused:
            return Used(0)
        output = min(max(0, usage.events - 1), request.output_most)  # the first event of a chat has no token
        if self.first_byte is None and not request.stream:
            return Used(None, request.input_estimate)  # nobody knows how far the engine had come
        return Used(request.input_estimate + output, request.input_estimate, output)
