"""The interactive path: a bare ASGI callable that copies the engine's bytes to the client as they arrive.

key (at the gate) → body → model → limit → engine ──► first byte (pings while waiting) ──► bytes … end
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

import orjson

from api import shape
from api.asgi import Receive, Scope, Send, disconnected, read_body, send_error, send_whole
from api.engine_watch import EngineWatch
from api.errors import Header, from_engine, to_api_error
from api.keys import Key
from api.limits import Limits
from api.settings import ApiSettings
from api.usage import Usage, UsageFilter, is_preamble
from engine import log
from engine.client import Answer, Endpoint, EngineClient
from engine.connection import EngineConnection
from engine.errors import EngineError, EngineTimeout, VelocityError

_STREAM_HEADERS: tuple[Header, ...] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
_PING = b": ping\n\n"
_LAST_WORDS = 5.0
"""Seconds that an error message may take to leave."""

_ERROR_EVENT = b'data: {"error":'
"""How vLLM reports a failure in mid-stream, after which it ends the stream as if nothing had happened."""

T = TypeVar("T")

logger = log.get(__name__)


class _ToldByEngine(EngineError):
    """The engine has written an error into its stream."""


@dataclass(slots=True)
class _Relay:
    """One request on its way: where it goes and what is known of it so far."""

    send: Send
    request: shape.EngineRequest
    headers: list[Header]
    began: float
    usage: Usage = field(default_factory=Usage)
    status: int = 0
    """Status that the client was given; 0 until then."""
    first_byte: float | None = None
    writing: bool = False
    """Whether the client is being waited for, and not the engine."""

    async def start(self) -> None:
        """Send the 200 of a stream, once."""
        if not self.status:
            self.status = 200
            headers = [*_STREAM_HEADERS, *self.headers]
            await self.send({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, data: bytes) -> None:
        """Some bytes of the stream's body."""
        if data:
            self.writing = True
            await self.send({"type": "http.response.body", "body": data, "more_body": True})
            self.writing = False


class Passthrough:
    """Chat completions, completions, responses and embeddings."""

    def __init__(self, settings: ApiSettings, engine: EngineClient, watch: EngineWatch, limits: Limits) -> None:
        self._settings = settings
        self._engine = engine
        self._watch = watch
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()
        key: Key = scope["state"]["key"]
        request_id: str = scope["state"]["request_id"]
        endpoint = Endpoint(scope["path"])
        body = await read_body(receive, self._settings.max_body_bytes)
        content = shape.parse(body)
        model = await self._watch.resolve(content.get("model"))
        request = shape.interactive(endpoint, content, model, self._settings.default_max_tokens)
        admission = await self._limits.admit(key)
        relay = _Relay(send, request, list(admission.headers), began)
        outcome = "aborted"
        try:
            outcome = await self._run(relay, receive, request_id)
        finally:
            logger.info(
                "request", request_id=request_id, key=key.id, traffic="interactive", endpoint=endpoint.value,
                model=request.model, stream=request.stream, status=relay.status, outcome=outcome,
                ttft_ms=relay.first_byte and round((relay.first_byte - began) * 1000, 1),
                duration_ms=round((time.monotonic() - began) * 1000, 1),
                input_tokens=relay.usage.input_tokens, output_tokens=relay.usage.output_tokens,
            )  # fmt: skip

    async def _run(self, relay: _Relay, receive: Receive, request_id: str) -> str:
        """Relay the answer; a client that leaves ends the upstream request at once. Returns how it went."""
        work = self._stream if relay.request.stream else self._whole
        relaying = asyncio.create_task(self._relay(relay, request_id, work))
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({relaying, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not relaying.done():
                return "client_left"
            return relaying.result()
        finally:
            relaying.cancel()
            gone.cancel()
            await asyncio.gather(relaying, gone, return_exceptions=True)

    async def _relay(
        self, relay: _Relay, request_id: str, work: Callable[[_Relay, EngineConnection], Awaitable[str]]
    ) -> str:
        try:
            async with asyncio.timeout(self._settings.total_timeout) as clock:
                async with self._engine.exchange(relay.request.endpoint, relay.request.body, request_id) as upstream:
                    return await work(relay, upstream)
        except (EngineError, TimeoutError) as error:
            if isinstance(error, TimeoutError) and not clock.expired():
                raise
            if relay.writing:
                return "client_stalled"  # there is nobody to tell
            if isinstance(error, _ToldByEngine):
                return "engine_error"  # told already; only the clean end is withheld
            fault = error if isinstance(error, EngineError) else EngineTimeout("The request took too long in all.")
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORDS):
                    await self._fail(relay, fault)
            return type(fault).__name__

    async def _fail(self, relay: _Relay, fault: VelocityError) -> None:
        """Before the head a proper status; after it an error chunk and no clean end, which would look like success."""
        error = to_api_error(fault)
        if not relay.status:
            relay.status = error.status
            await send_error(relay.send, error, relay.headers)
            return
        await relay.write(b"data: " + error.body() + b"\n\n")
        # The response is left incomplete, so the server closes the connection instead of ending the body.

    async def _whole(self, relay: _Relay, upstream: EngineConnection) -> str:
        head = await upstream.head()  # comes with the whole answer: the total time is its limit
        answer = Answer(head.status, await upstream.rest())
        relay.first_byte = time.monotonic()
        if answer.status != 200:
            return await self._refused(relay, answer)
        relay.status = 200
        with suppress(orjson.JSONDecodeError):  # the client gets what the engine said, whatever it is
            relay.usage.read(orjson.loads(answer.body))
        content_type = head.get(b"content-type") or b"application/json"
        await send_whole(relay.send, 200, [(b"content-type", content_type), *relay.headers], answer.body)
        return "ok"

    async def _stream(self, relay: _Relay, upstream: EngineConnection) -> str:
        head = await self._wait_pinging(relay, upstream.head(), self._settings.head_wait)
        if head.status != 200:
            return await self._refused(relay, Answer(head.status, await upstream.rest()))
        await relay.start()
        sift = UsageFilter(relay.request.endpoint, relay.usage, hide=relay.request.hide_usage)
        data = await self._wait_pinging(relay, upstream.chunk(), self._settings.ping_interval)
        while is_preamble(relay.request.endpoint, data):
            await relay.write(sift.feed(data))
            data = await self._wait_pinging(relay, upstream.chunk(), self._settings.ping_interval)
        relay.first_byte = time.monotonic()
        await self._copy(relay, upstream, sift, data)
        await relay.write(sift.rest())
        await relay.send({"type": "http.response.body", "body": b""})
        return "ok"

    async def _copy(self, relay: _Relay, upstream: EngineConnection, sift: UsageFilter, data: bytes) -> None:
        """The body from its first token to its end; neither the engine nor the client may stall for too long."""
        patience = self._settings.stall_timeout
        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(patience) as stall:
                while data:
                    await relay.write(sift.feed(data))
                    if _ERROR_EVENT in data:
                        raise _ToldByEngine
                    stall.reschedule(clock() + patience)
                    data = await upstream.chunk()
                    stall.reschedule(clock() + patience)
        except TimeoutError:
            raise EngineTimeout(f"The engine sent nothing for {patience:g} s.") from None

    async def _refused(self, relay: _Relay, answer: Answer) -> str:
        """The engine said no: its status in our shape, or (after pings have begun) an error chunk."""
        error = from_engine(answer)
        await self._fail(relay, error)
        return f"engine_{answer.status}"

    async def _first(self, waiting: Coroutine[object, object, T]) -> T:
        try:
            async with asyncio.timeout(self._settings.first_token_timeout):
                return await waiting
        except TimeoutError:
            raise EngineTimeout(f"No answer began within {self._settings.first_token_timeout:g} s.") from None

    async def _wait_pinging(self, relay: _Relay, waiting: Coroutine[object, object, T], patience: float) -> T:
        """Wait; after `patience` seconds answer 200, and ping, so that clients and proxies do not give up."""
        task = asyncio.create_task(self._first(waiting))
        try:
            while not (await asyncio.wait({task}, timeout=patience))[0]:
                await relay.start()
                await relay.write(_PING)
                patience = self._settings.ping_interval
            return task.result()
        finally:
            task.cancel()
