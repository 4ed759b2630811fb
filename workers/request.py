"""One bulk item at the engine: sent whole, tried again where that can help, always ending in a Record."""

from __future__ import annotations

import asyncio
import random

import orjson

from engine.client import Answer, Endpoint, EngineClient
from engine.errors import EngineError, EngineProtocolError, EngineUnreachable
from workers.job import Item, Lease, Record
from workers.settings import WorkerSettings

_TRIES = 3
_BACKOFF_MOST = 30.0
_BACKOFF_GROWTH = 8
_ENGINE_PAUSE = 1.0
_RETRYABLE = frozenset({408, 409, 429, 500, 502, 503, 504})
_AWAY = frozenset({500, 502, 503, 504})
"""With these, and failing its health check, the engine is away rather than unable to do this item."""


class Requester:
    """Sends items with `stream: false` and the bulk priority."""

    def __init__(self, engine: EngineClient, settings: WorkerSettings) -> None:
        self._engine = engine
        self._timeout = settings.request_timeout
        self._priority = settings.bulk_priority
        self._backoff = settings.retry_backoff

    async def run(self, item: Item, lease: Lease) -> Record:
        """The item's outcome. An engine that is away costs no try: the item waits until it is back."""
        request_id = f"{lease.job}-{item.index}"
        body = orjson.dumps({**item.body, "stream": False, "priority": self._priority})
        fault = ""
        tries = 0
        while tries < _TRIES:
            try:
                answer = await self._engine.call(Endpoint.CHAT, body, timeout=self._timeout, request_id=request_id)
                if answer.status not in _RETRYABLE:
                    return _record(item, request_id, answer)
                fault = f"The engine answered {answer.status}."
                away = answer.status in _AWAY and not await self._engine.healthy()
            except EngineUnreachable:
                away = True
            except EngineError as error:
                fault, away = str(error), False
            if away:
                while not await self._engine.healthy():
                    await asyncio.sleep(_ENGINE_PAUSE)
                continue
            tries += 1
            longest = min(_BACKOFF_MOST, self._backoff * _BACKOFF_GROWTH ** (tries - 1))
            await asyncio.sleep(random.uniform(0, longest))  # noqa: S311 - jitter
        return Record(
            item.index, item.id, 502, request_id,
            error={"code": "engine_failed", "message": f"Failed after {_TRIES} tries. Last: {fault}"},
        )  # fmt: skip


def _record(item: Item, request_id: str, answer: Answer) -> Record:
    """The record of a final answer. Raises EngineProtocolError if a 200 is not what it should be."""
    if answer.status == 200:
        content = answer.json()
        if not isinstance(content, dict):
            raise EngineProtocolError("The engine answered 200 with something that is not an object.")
        return Record(item.index, item.id, 200, request_id, body=content)
    try:
        error = answer.json()["error"]
        message = str(error["message"])
    except (EngineProtocolError, KeyError, TypeError):
        message = f"The engine answered {answer.status}."
    return Record(item.index, item.id, answer.status, request_id, error={"code": "invalid_request", "message": message})
