"""The one door to vLLM over HTTP: every path of the engine that velocity uses is named here; no other is called."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, Self
from urllib.parse import urlsplit

import orjson

from engine.connection import EngineConnection, read_buffer
from engine.errors import EngineError, EngineProtocolError, EngineTimeout, EngineUnreachable, SettingsError
from engine.protection import EngineProtection, Policy, assumed, told
from engine.settings import EngineSettings


class Endpoint(StrEnum):
    """The engine's paths that clients may reach through velocity: an allow-list."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    RESPONSES = "/v1/responses"
    EMBEDDINGS = "/v1/embeddings"


_HEALTH = "/health"
_MODELS = "/v1/models"
_SCHEDULER = "/velocity/scheduler"
_IDLE_CONNECTIONS = 256
_IDLE_SECONDS = 3.0
"""Below vLLM's keep-alive of 5 s, so that a request is never written into a connection that is just being closed."""


@dataclass(frozen=True, slots=True)
class Model:
    """A name that the engine answers to. The first name with a given root is the true one, later ones are aliases."""

    id: str
    root: str
    max_model_len: int | None
    created: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete, non-streamed answer of the engine."""

    status: int
    body: bytes

    def json(self) -> Any:
        """The parsed body. Raises EngineProtocolError if it is not JSON."""
        try:
            return orjson.loads(self.body)
        except orjson.JSONDecodeError:
            raise EngineProtocolError(f"The engine answered {self.status} with something that is not JSON.") from None


@dataclass(frozen=True, slots=True)
class EngineModels:
    """The engine's models, by every name that it answers to."""

    models: tuple[Model, ...]
    _true: dict[str, Model] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        by_root: dict[str, Model] = {}
        for model in self.models:
            self._true.setdefault(model.id, by_root.setdefault(model.root, model))

    def find(self, name: str) -> Model | None:
        """The true model behind a name or an alias; None if the engine has no such model."""
        return self._true.get(name)


class EngineClient:
    """Kept-alive connections to one engine. One per process and event loop; close it with `aclose()`."""

    def __init__(
        self, url: str, *, connect_timeout: float = 2.0, api_key: str | None = None, policy: Policy = "auto"
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        parts = urlsplit(self.url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise SettingsError(f"The engine's address {url!r} is not an http:// or https:// address.")
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._prefix = parts.path.rstrip("/")
        self._connect_timeout = connect_timeout
        self._policy = policy
        common = f"host: {parts.netloc.rsplit('@')[-1]}\r\naccept-encoding: identity\r\n"
        if api_key:
            common += f"authorization: Bearer {api_key}\r\n"
        self._common = common.encode()
        self._heads: dict[str, bytes] = {}
        """How a request to a path begins; each of the paths has one method."""
        self._idle: list[EngineConnection] = []
        self._buffer = read_buffer()

    @classmethod
    def of(cls, settings: EngineSettings) -> Self:
        """The client of the engine that the settings name."""
        secret = settings.engine_api_key
        key = secret.get_secret_value() if secret else None
        return cls(
            settings.engine_url, connect_timeout=settings.connect_timeout, api_key=key, policy=settings.engine_policy
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the idle connections; those in use belong to their owners."""
        while self._idle:
            self._idle.pop().close()

    @asynccontextmanager
    async def exchange(
        self, endpoint: Endpoint, body: bytes, request_id: str | None = None, traceparent: bytes | None = None
    ) -> AsyncIterator[EngineConnection]:
        """Send one POST and lend the connection: await `head()`, then `chunk()` until b"".

        On the way out the connection goes back to the pool if its answer was read to the end, else it is closed,
        which makes the engine abort the request. Raises EngineUnreachable if no connection could be made.
        """
        connection = await self.begin(endpoint, body, request_id, traceparent)
        try:
            yield connection
        finally:
            self.end(connection)

    def begin(
        self, endpoint: Endpoint, body: bytes, request_id: str | None = None, traceparent: bytes | None = None
    ) -> Awaitable[EngineConnection]:
        """The same without a context manager: whoever gets the connection owes it to `end`."""
        return self._sent(self._request("POST", endpoint, len(body), request_id, traceparent), body)

    def end(self, connection: EngineConnection) -> None:
        """Take the connection back, or close it if its answer was not read to the end."""
        if connection.reusable and len(self._idle) < _IDLE_CONNECTIONS:
            self._idle.append(connection)
        else:
            connection.close()

    async def call(
        self, endpoint: Endpoint, body: bytes, *, timeout: float, request_id: str | None = None
    ) -> Answer:  # the parameter is seconds, and the caller's whole budget
        """One POST, answered in full within `timeout` seconds; any HTTP status is an answer, not an error."""
        try:
            async with asyncio.timeout(timeout), self.exchange(endpoint, body, request_id) as connection:
                return await _answer(connection)
        except TimeoutError:
            raise EngineTimeout(f"The engine gave no answer within {timeout:g} s.") from None

    async def healthy(self, timeout: float = 2.0) -> bool:
        """Whether the engine says that it can serve."""
        try:
            return (await self._get(_HEALTH, timeout)).status == 200
        except EngineError:
            return False

    async def models(self, timeout: float = 5.0) -> EngineModels:
        """The models the engine serves. Raises EngineError."""
        answer = await self._get(_MODELS, timeout)
        if answer.status != 200:
            raise EngineProtocolError(f"The engine answered {answer.status} when asked for its models.")
        try:
            return EngineModels(
                tuple(
                    Model(card["id"], card.get("root") or card["id"], card.get("max_model_len"), card.get("created", 0))
                    for card in answer.json()["data"]
                )
            )
        except (KeyError, TypeError) as error:
            raise EngineProtocolError("The engine's list of models has an unknown form.") from error

    async def protection(self, timeout: float = 2.0) -> EngineProtection:
        """What keeps bulk work from slowing people down in there. Raises EngineError if the engine does not answer.

        An engine without velocity's door, whatever it answers instead, is what VELOCITY_ENGINE_POLICY says of it.
        """
        answer = await self._get(_SCHEDULER, timeout)
        with suppress(EngineProtocolError):
            if answer.status == 200 and (found := told(answer.json())):
                return found
        return assumed(self._policy)

    async def _get(self, path: str, timeout: float) -> Answer:
        try:
            async with asyncio.timeout(timeout):
                connection = await self._sent(self._request("GET", path, 0, None))
                try:
                    return await _answer(connection)
                finally:
                    self.end(connection)
        except TimeoutError:
            raise EngineTimeout(f"The engine gave no answer within {timeout:g} s.") from None

    def _request(
        self, method: str, path: str, length: int, request_id: str | None, traceparent: bytes | None = None
    ) -> bytes:
        head = self._heads.get(path)
        if head is None:
            head = self._heads[path] = f"{method} {self._prefix}{path} HTTP/1.1\r\n".encode() + self._common
        if method == "POST":
            head += b"content-type: application/json\r\ncontent-length: %d\r\n" % length
        if request_id:
            head += b"x-request-id: %s\r\n" % request_id.encode()
        if traceparent:
            head += b"traceparent: %s\r\n" % traceparent
        return head + b"\r\n"

    async def _sent(self, head: bytes, body: bytes = b"") -> EngineConnection:
        """A connection on which the request was written and is being answered.

        A kept-alive connection may have been closed by the engine while it was idle; since that shows before a byte
        was written, another is taken.
        """
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and connection.idle_seconds < _IDLE_SECONDS:
                break
            connection.close()
        else:
            connection = await self._connect()
        try:
            await connection.send(head, body)
        except BaseException:  # cancelled in the middle of a request: the connection is of no more use
            connection.close()
            raise
        return connection

    async def _connect(self) -> EngineConnection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout):
                _, connection = await loop.create_connection(
                    partial(EngineConnection, self._buffer),
                    self._host,
                    self._port,
                    ssl=self._tls,
                    server_hostname=self._host if self._tls else None,
                )
        except (OSError, TimeoutError) as error:
            raise EngineUnreachable(f"No connection to the engine at {self.url}: {error or 'timeout'}.") from None
        return connection


async def _answer(connection: EngineConnection) -> Answer:
    head = await connection.head()
    return Answer(head.status, await connection.rest())
