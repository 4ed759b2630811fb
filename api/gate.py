"""The outermost ASGI layer: a request id for everyone, no route without a key, errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from api.asgi import App, Message, Receive, Scope, Send, header, send_error
from api.errors import ApiError, internal_error, to_api_error
from api.keys import Keys
from engine import log
from engine.errors import VelocityError
from workers.job import new_id

_PUBLIC = frozenset({"/health"})

logger = log.get(__name__)


class Gate:
    """Deny by default: whatever is behind it, only `/health` answers without a key."""

    def __init__(self, app: App, hot: Mapping[str, App], keys: Keys) -> None:
        self._app = app
        self._hot = hot
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._request(scope, receive, send)
        else:  # no websockets here
            await send({"type": "websocket.close", "code": 1008})

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = new_id("req")
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        started = False

        async def send_named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            path: str = scope["path"]
            if path not in _PUBLIC:
                state["key"] = await self._keys.authenticate(header(scope, b"authorization"))
            app = self._hot.get(path, self._app)
            if app is not self._app and scope["method"] != "POST":
                raise ApiError(405, f"Use POST for {path}.", code="method_not_allowed", headers=((b"allow", b"POST"),))
            await app(scope, receive, send_named)
        except VelocityError as error:
            answer = to_api_error(error)
            logger.info("refused", request_id=request_id, path=scope["path"], status=answer.status, reason=str(error))
            if not started:
                await send_error(send_named, answer)
        except asyncio.CancelledError:
            raise
        except Exception:  # the process edge: a fault of ours must neither leak nor end the server
            logger.exception("request_failed", request_id=request_id, path=scope["path"])
            if not started:
                await send_error(send_named, internal_error())
