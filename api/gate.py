"""The outermost ASGI layer: a request id for all, no route without a key of its scope, errors as OpenAI has them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain

from api import error_tracking
from api.asgi import App, Message, Receive, Scope, Send, send_error
from api.errors import CLOSE, ApiError, internal_error, lacks, to_api_error
from api.key_store import Keys
from api.keys import Scope as KeyScope
from api.limits.limiter import Limiter
from api.metrics import Metrics, Refusal
from engine import log
from engine.errors import VelocityError
from workers.job import new_id

_PUBLIC = frozenset({"/health"})
_ANY_KEY = None
_ROUTES: dict[str, KeyScope | None] = {
    "/v1/chat/completions": KeyScope.CHAT,
    "/v1/completions": KeyScope.CHAT,
    "/v1/responses": KeyScope.CHAT,
    "/v1/embeddings": KeyScope.CHAT,
    "/v1/models": _ANY_KEY,
    "/v1/usage": _ANY_KEY,
    "/v1/files": KeyScope.JOBS,
    "/v1/batches": KeyScope.JOBS,
    "/openapi.json": _ANY_KEY,
    "/jobs": KeyScope.JOBS,
    "/webhooks": KeyScope.JOBS,
    "/admin": KeyScope.ADMIN,
}
"""Every address and what a key needs for it, with all that is below it. What is not in this table is not there."""

_MOST_HEADERS = 100
_MOST_HEADER_BYTES = 32 * 1024

logger = log.get(__name__)


class Gate:
    """Deny by default: whatever is behind it, only `/health` answers without a key."""

    def __init__(self, app: App, hot: Mapping[str, App], keys: Keys, limiter: Limiter, metrics: Metrics) -> None:
        self.app = app
        self._hot = hot
        self._keys = keys
        self._limiter = limiter
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await _Request(self, scope, receive, send).run()
        else:  # no websockets here
            await send({"type": "websocket.close", "code": 1008})

    async def let_in(self, scope: Scope) -> App:
        """The application that answers. Raises VelocityError."""
        state = scope["state"]
        head = state["head"] = checked_head(scope)
        path: str = scope["path"]
        authorization = head.get(b"authorization")
        if path in _PUBLIC:  # a key is not needed, but whoever has one is told more
            with suppress(VelocityError):
                state["key"] = await self._keys.authenticate(authorization, without_redis=True)
            return self.app
        listed = _listed(path)
        needed = _ROUTES.get(listed or "")
        # Chat goes on for a while without Redis; who would spend more than the engine's time does not.
        without_redis = needed in {_ANY_KEY, KeyScope.CHAT}
        key = await self._keys.authenticate(authorization, without_redis=without_redis, cached=path in self._hot)
        state["key"] = key
        if listed is None:
            raise ApiError(404, f"There is no such address: {scope['method']} {path}.", code="not_found")
        if needed and not key.may(needed):
            raise lacks(needed)
        app = self._hot.get(path, self.app)
        if app is not self.app and scope["method"] != "POST":
            raise ApiError(405, f"Use POST for {path}.", code="method_not_allowed", headers=((b"allow", b"POST"),))
        return app

    async def add_headers(self, scope: Scope, message: Message) -> None:
        """The request id, and how the key's limits stand."""
        state = scope["state"]
        headers = [*message["headers"], (b"x-request-id", state["request_id"].encode())]
        if "key" in state and not any(name.startswith(b"x-ratelimit-") for name, _ in headers):
            headers += await self._limiter.headers(state["key"])
        if upgrades(dict(scope["headers"])):
            headers.append(CLOSE)
        message["headers"] = headers

    def account(self, scope: Scope, status: int, began: float, error: VelocityError | None) -> None:
        """Count the request, and log it unless the streaming path has."""
        route = _route(scope)
        self._metrics.request(route, scope["method"], status)
        refusals = {401: Refusal.UNAUTHORIZED, 403: Refusal.FORBIDDEN, 413: Refusal.TOO_LARGE}
        if error and status in refusals:
            self._metrics.refused(refusals[status])
        state = scope["state"]
        if error is None and (route in self._hot or route in _PUBLIC):
            return
        logger.info(
            "request" if error is None else "refused", request_id=state["request_id"],
            key=state["key"].id if "key" in state else None, route=route, method=scope["method"], status=status,
            duration_ms=round((time.monotonic() - began) * 1000, 1), error=type(error).__name__ if error else None,
            code=to_api_error(error).code if error else None,
        )  # fmt: skip


class _Request:
    """One request on its way through the gate."""

    def __init__(self, gate: Gate, scope: Scope, receive: Receive, send: Send) -> None:
        self._gate = gate
        self._scope = scope
        self._receive = receive
        self._send = send
        self._state = state = scope.setdefault("state", {})
        state["request_id"] = new_id("req")
        state["status"] = 0
        """What the client was told."""

    async def run(self) -> None:
        began = time.monotonic()
        failure: VelocityError | None = None
        try:
            app = await self._gate.let_in(self._scope)
            hot = app is not self._gate.app  # those say themselves what `_send_named` does
            await app(self._scope, self._receive, self._send if hot else self._send_named)
        except VelocityError as error:
            failure = error
            if not self._state["status"]:
                await send_error(self._send_named, to_api_error(error))
        except asyncio.CancelledError:
            raise
        except Exception as error:  # the process edge: a fault of ours must neither leak nor end the server
            request_id = self._state["request_id"]
            logger.exception("request_failed", request_id=request_id, route=_route(self._scope))
            error_tracking.report(error, request_id=request_id)
            if not self._state["status"]:
                await send_error(self._send_named, internal_error())
        finally:
            self._gate.account(self._scope, self._state["status"], began, failure)

    async def _send_named(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._state["status"] = message["status"]
            await self._gate.add_headers(self._scope, message)
        await self._send(message)


def checked_head(scope: Scope) -> dict[bytes, bytes]:
    """The request's headers, of each name the first. Raises ApiError 431, 400 or 415 for a head that no client of ours
    sends.
    """
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    if len(headers) > _MOST_HEADERS or sum(map(len, chain.from_iterable(headers))) > _MOST_HEADER_BYTES:
        raise ApiError(
            431, f"The request has more than {_MOST_HEADERS} headers, or {_MOST_HEADER_BYTES:,} bytes of them.",
            code="headers_too_large", headers=(CLOSE,),
        )  # fmt: skip
    head = dict(reversed(headers))
    hosts = int(b"host" in head) if len(head) == len(headers) else sum(name == b"host" for name, _ in headers)
    if hosts > 1 or (hosts == 0 and scope["http_version"] != "1.0"):
        raise ApiError(400, "A request needs exactly one Host header.", headers=(CLOSE,))
    if head.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        raise ApiError(415, "Send the body as it is, without a Content-Encoding.", code="unsupported_encoding")
    if b"upgrade" in head and upgrades(head) and scope["method"] not in {"GET", "HEAD"}:
        # httptools drops the body of such a request
        raise ApiError(400, "This is HTTP/1.1 alone: send the request without an Upgrade header.")
    return head


def upgrades(head: dict[bytes, bytes]) -> bool:
    """Whether a client asks for another protocol (h2c, a websocket): its connection serves no second request."""
    return bool(head.get(b"upgrade")) and b"upgrade" in head.get(b"connection", b"").lower()


def _listed(path: str) -> str | None:
    """The table's entry that a path is or lies below."""
    if path in _ROUTES:
        return path
    return next((route for route in _ROUTES if path.startswith(route + "/")), None)


def _route(scope: Scope) -> str:
    """The template of the route that answered, for logs and labels: never what the client wrote."""
    path: str = scope["path"]
    if path in _PUBLIC or path in _ROUTES:
        return path
    template = getattr(scope.get("route"), "path", None)
    return template if isinstance(template, str) else "other"
