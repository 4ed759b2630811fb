"""One bulk item at the engine: sent whole, tried again where that can help, always ending in a Record."""

from __future__ import annotations

import asyncio
import random

import orjson

from engine.client import Answer, Endpoint, EngineClient
from engine.errors import EngineError, EngineProtocolError, EngineUnreachable
from workers.job import Item, Lease, Record
from workers.settings import WorkerSettings
from workers.window import Place

_TRIES = 3
_BACKOFF_MOST = 30.0
_BACKOFF_GROWTH = 8
_ENGINE_PAUSE = 1.0
_ENGINE_DEATHS = 3
_RETRYABLE = frozenset({408, 409, 429, 500, 502, 503, 504})
_AWAY = frozenset({500, 502, 503, 504})
"""With these, and failing its health check, the engine is away rather than unable to do this item."""


class Requester:
    """Sends items with `stream: false` and the bulk priority.

    When the engine dies, everything in flight is suspect. Suspects run again one at a time, so that the one that really
    kills the engine takes no others along; who was there at three deaths in this way is given up.
    """

    def __init__(self, engine: EngineClient, settings: WorkerSettings) -> None:
        self._engine = engine
        self._timeout = settings.request_timeout
        self._priority = settings.bulk_priority
        self._backoff = settings.retry_backoff
        self._suspects = asyncio.Lock()

    async def run(self, item: Item, lease: Lease, place: Place) -> Record:
        """The item's outcome. An engine that is away costs no try: the item waits until it is back.

        Nor does giving the place back, which ends what is at the engine; it is sent again when there is a place.
        """
        request_id = f"{lease.job}-{item.index}"
        body = {**item.body, "stream": False}
        if lease.endpoint != Endpoint.EMBEDDINGS:
            body["priority"] = self._priority
        call = _Call(Endpoint(lease.endpoint), orjson.dumps(body), request_id, place)
        answer = await place.run(lambda: self._final(call))
        if answer is not None:
            return _record(item, request_id, answer)
        code, message = "engine_failed", f"Failed after {_TRIES} tries. Last: {call.fault}"
        if call.deaths >= _ENGINE_DEATHS:
            code, message = "engine_crashed", f"The engine died {call.deaths} times while it worked on this item."
        return Record(item.index, item.id, 502, request_id, error={"code": code, "message": message})

    async def _final(self, call: _Call) -> Answer | None:
        """The answer that counts; None if the item is given up. Cancelled and called again, it goes on counting."""
        while call.tries < _TRIES and call.deaths < _ENGINE_DEATHS:
            if call.deaths:
                async with self._suspects:
                    await self._until_healthy()
                    answer = await self._send(call)
            else:
                answer = await self._send(call)
            if answer is not None:
                return answer
            if call.away:
                call.deaths += call.died
                await self._until_healthy()
                continue
            call.tries += 1
            if call.tries < _TRIES:
                longest = min(_BACKOFF_MOST, self._backoff * _BACKOFF_GROWTH ** (call.tries - 1))
                await asyncio.sleep(random.uniform(0, longest))  # noqa: S311 - jitter
        return None

    async def _until_healthy(self) -> None:
        while not await self._engine.healthy():
            await asyncio.sleep(_ENGINE_PAUSE)

    async def _send(self, call: _Call) -> Answer | None:
        """The engine's final answer, or None if another try may help: `call` then says why."""
        call.away = call.died = False
        try:
            with call.place.working():
                answer = await self._engine.call(
                    call.endpoint, call.body, timeout=self._timeout, request_id=call.request_id
                )  # fmt: skip
        except EngineUnreachable:
            call.away = True
        except EngineError as error:
            call.fault = str(error)
            call.away = call.died = not await self._engine.healthy()
        else:
            if answer.status not in _RETRYABLE:
                return answer
            call.fault = f"The engine answered {answer.status}."
            call.away = call.died = answer.status in _AWAY and not await self._engine.healthy()
        return None


class _Call:
    """What is sent for an item, and what became of its tries."""

    def __init__(self, endpoint: Endpoint, body: bytes, request_id: str, place: Place) -> None:
        self.endpoint = endpoint
        self.body = body
        self.request_id = request_id
        self.place = place
        self.tries = 0
        self.deaths = 0
        self.fault = ""
        self.away = False
        """The engine is not there: to be sent again when it is."""
        self.died = False
        """It was there when the item was sent."""


def _record(item: Item, request_id: str, answer: Answer) -> Record:
    """The record of a final answer; also of a 200 that is not what it should be."""
    try:
        content = answer.json()
        if answer.status == 200 and isinstance(content, dict):
            return Record(item.index, item.id, 200, request_id, body=content)
        said = {name: str(value) for name, value in content["error"].items() if name in {"type", "param"} and value}
        message = str(content["error"]["message"])
    except (EngineProtocolError, KeyError, TypeError, AttributeError):
        said, message = {}, f"The engine answered {answer.status} with something that nobody understands."
    error = {**said, "code": "invalid_request" if answer.status < 500 else "engine_failed", "message": message}
    return Record(item.index, item.id, answer.status, request_id, error=error)
