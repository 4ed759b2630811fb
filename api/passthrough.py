"""The interactive path: a bare ASGI callable that copies the engine's bytes to the client as they arrive.

key (at the gate) → body → model → limits (→ line) → engine ──► first byte (pings while waiting) ──► bytes … end
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

import orjson

from api import shape
from api.asgi import Receive, Scope, Send, read_body
from api.bulk_watch import BulkWatch
from api.engine_watch import EngineWatch
from api.errors import ApiError, from_engine, lacks
from api.key_store import Keys
from api.keys import Key
from api.keys import Scope as KeyScope
from api.limits.leases import Admission, State
from api.limits.limiter import KeyChanged, Limiter, Used
from api.lookout import Lookout
from api.metrics import Metrics
from api.outlet import EXTENSION, AsgiOutlet, DirectOutlet
from api.relay import Relay
from api.settings import ApiSettings
from api.tracing import Span, Tracer
from engine import log
from engine.client import Answer, Endpoint, EngineClient
from engine.connection import EngineConnection
from engine.errors import EngineTimeout, VelocityError

_LONG = 128 * 1024
"""Bytes of a body from which on it waits its turn."""

_LAST_WORDS = 5.0
"""Seconds that an error message may take to leave."""

_ENDPOINTS = {endpoint.value: endpoint for endpoint in Endpoint}
_OPERATIONS = {
    Endpoint.CHAT: "chat",
    Endpoint.COMPLETIONS: "text_completion",
    Endpoint.RESPONSES: "chat",
    Endpoint.EMBEDDINGS: "embeddings",
}

logger = log.get(__name__)


class Passthrough:
    """Chat completions, completions, responses and embeddings."""

    def __init__(
        self, settings: ApiSettings, engine: EngineClient, watch: EngineWatch, keys: Keys, limiter: Limiter,
        metrics: Metrics, tracer: Tracer, bulk: BulkWatch,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._engine = engine
        self._watch = watch
        self._keys = keys
        self._limiter = limiter
        self._metrics = metrics
        self._tracer = tracer
        self._bulk = bulk
        self._loop = asyncio.get_running_loop()
        soonest = min(
            settings.head_wait, settings.ping_interval, settings.stall_timeout, settings.first_token_timeout,
            settings.total_timeout,
        )  # fmt: skip
        self._long = asyncio.Lock()
        self._lookout = Lookout(min(1.0, max(0.01, soonest / 10)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()
        state = scope["state"]
        endpoint = _ENDPOINTS[scope["path"]]
        offered: DirectOutlet | None = scope.get("extensions", {}).pop(EXTENSION, None)
        body = offered.body(self._settings.max_body_bytes) if offered else None
        if body is None:
            body = await read_body(receive, self._settings.max_body_bytes, self._settings.body_timeout)
        span = self._tracer.begin(scope["path"], state["head"].get(b"traceparent"))
        try:
            if len(body) > _LONG:
                await self._turn()
            request, admission = await self._let_in(scope, endpoint, shape.parse(body), len(body))
        except BaseException:
            span.end("refused")
            raise
        outlet = offered or AsgiOutlet(receive, send)
        relay = Relay(outlet, request, admission, self._settings, self._lookout, began, self._bulk.requests > 0)
        outcome = "aborted"
        try:
            outcome = await self._run(relay, span)
        finally:
            used, state["status"] = relay.used, relay.status
            self._limiter.settle(admission, used)
            self._account(relay, used, outcome, span)

    async def _turn(self) -> None:
        """Before a step that takes a millisecond and more: one in each turn of the loop, other people's tokens between.

        No thread: the JSON parser keeps the interpreter for itself, so that the event loop would wait all the same.
        """
        async with self._long:
            await asyncio.sleep(0)

    async def _let_in(
        self, scope: Scope, endpoint: Endpoint, content: dict[str, Any], length: int
    ) -> tuple[shape.EngineRequest, Admission]:
        """The request as the engine gets it, and its admission; once more if the key has changed meanwhile."""
        state = scope["state"]
        while True:
            key: Key = state["key"]
            model = await self._watch.resolve(content.get("model"), key)
            if length > _LONG:
                await self._turn()
            request = shape.interactive(endpoint, content, model, key, self._settings, length)
            cost = request.input_estimate + request.output_most
            try:
                return request, await self._limiter.admit(key, state["request_id"], cost)
            except KeyChanged:
                state["key"] = await self._keys.authenticate(state["head"].get(b"authorization"))
                if not state["key"].may(KeyScope.CHAT):
                    raise lacks(KeyScope.CHAT) from None

    def _account(self, relay: Relay, used: Used, outcome: str, span: Span) -> None:
        """One line in the log, the metrics and the span: never what was asked or answered."""
        now, began, usage, request = time.monotonic(), relay.began, relay.usage, relay.request
        ttft = relay.first_byte and relay.first_byte - began
        waited = relay.entered and relay.entered - began
        endpoint = request.endpoint.value
        logger.info(
            "request", request_id=relay.admission.request, key=relay.admission.key.id, traffic="interactive",
            endpoint=endpoint, model=request.model, stream=request.stream, status=relay.status, outcome=outcome,
            ttft_ms=ttft and round(ttft * 1000, 1), waited_ms=waited and round(waited * 1000, 1),
            duration_ms=round((now - began) * 1000, 1), input_tokens=used.input, output_tokens=used.output,
            finish_reason=usage.finish_reason,
        )  # fmt: skip
        self._metrics.outcome(outcome)
        self._metrics.duration(endpoint, now - began, stream=request.stream)
        if ttft:
            self._metrics.ttft(endpoint, ttft, bulk=relay.bulk)
        if relay.gaps:
            self._metrics.add_gaps(relay.gaps, bulk=relay.bulk)
        if span.recording:
            span.set(
                method="POST", path=endpoint, route=endpoint, operation=_OPERATIONS[request.endpoint],
                model=request.model, stream=request.stream, request_id=relay.admission.request,
                key_id=relay.admission.key.id, status=relay.status, outcome=outcome, input_tokens=used.input,
                output_tokens=used.output, ttft=ttft, waited=waited,
            )  # fmt: skip
        span.end(None if outcome == "ok" else outcome)

    async def _run(self, relay: Relay, span: Span) -> str:
        """Relay the answer; a client that leaves ends the upstream request at once. Returns how it went."""
        task = asyncio.current_task(self._loop)
        assert task is not None  # noqa: S101 - this is a coroutine
        relay.watched(task)
        relay.admission.on_end = lambda: relay.interrupt("revoked")
        relay.outlet.watch(lambda: relay.interrupt("client_left"))
        try:
            return await self._relay(relay, span)
        except asyncio.CancelledError:
            if not relay.interrupted or task.uncancel():
                raise
        except VelocityError as error:
            relay.fault = error
        finally:
            relay.watched(None)
            relay.admission.on_end = None
            relay.outlet.unwatch()
        return await self._broken_off(relay)

    async def _broken_off(self, relay: Relay) -> str:
        """Tell the client, as far as there is one. Returns how it went."""
        fault = relay.fault
        if relay.verdict == "revoked":
            fault = ApiError(401, "This API key has been ended.", code="invalid_api_key")
        if not isinstance(fault, VelocityError) or relay.told:
            return relay.verdict or "engine_error"
        # An engine that broke down is free; one that was kept busy until the time was over is not.
        timeout = isinstance(fault, EngineTimeout)
        relay.refused = relay.first_byte is None and not (relay.entered is not None and timeout) and not relay.verdict
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS):
                await relay.fail(fault)
        if relay.verdict:
            return relay.verdict
        return "refused" if isinstance(fault, ApiError) else type(fault).__name__

    async def _relay(self, relay: Relay, span: Span) -> str:
        request = relay.request
        relay.waits(self._settings.head_wait)
        if relay.admission.state is not State.LEASED:
            await self._limiter.slot(relay.admission)
            relay.waits(self._settings.head_wait)
        relay.entered = time.monotonic()
        upstream = await self._engine.begin(request.endpoint, request.body, relay.admission.request, span.traceparent)
        try:
            return await (self._stream if request.stream else self._whole)(relay, upstream)
        finally:
            self._engine.end(upstream)

    async def _whole(self, relay: Relay, upstream: EngineConnection) -> str:
        head = await upstream.head()  # comes with the whole answer: the total time is its limit
        answer = Answer(head.status, await upstream.rest())
        if answer.status != 200:
            return await self._refused(relay, answer)
        relay.first_byte = time.monotonic()
        with suppress(orjson.JSONDecodeError):  # the client gets what the engine said, whatever it is
            relay.usage.read(orjson.loads(answer.body))
        content_type = head.get(b"content-type") or b"application/json"
        await relay.whole(200, [(b"content-type", content_type)], answer.body)
        return "ok"

    async def _stream(self, relay: Relay, upstream: EngineConnection) -> str:
        head = await upstream.head()
        if head.status != 200:
            return await self._refused(relay, Answer(head.status, await upstream.rest()))
        await relay.start()
        relay.waits(self._settings.ping_interval)
        while not await upstream.pour(relay.take):
            if relay.fault:
                raise relay.fault
            await relay.drained()
            if relay.told:
                return "engine_error"  # told already; only the clean end is withheld
        await relay.end()
        return "ok"

    async def _refused(self, relay: Relay, answer: Answer) -> str:
        """The engine said no: its status in our shape, or (after pings have begun) an error chunk."""
        relay.refused = True
        await relay.fail(from_engine(answer))
        return f"engine_{answer.status}"
