"""One bulk item at the engine: sent whole, tried again where that can help, always ending in a Record."""

from __future__ import annotations

import asyncio
import random

import orjson

from engine.client import Answer, Endpoint, EngineClient
from engine.errors import EngineError, EngineUnreachable
from workers.job import Item, Lease, Record
from workers.settings import WorkerSettings

_TRIES = 3
_BACKOFF_FIRST = 0.5
_BACKOFF_MOST = 30.0
_ENGINE_PAUSE = 1.0
_RETRYABLE = frozenset({408, 409, 429, 500, 502, 503, 504})


class Requester:
    """Sends items with `stream: false` and the bulk priority."""

    def __init__(self, engine: EngineClient, settings: WorkerSettings) -> None:
        self._engine = engine
        self._timeout = settings.request_timeout
        self._priority = settings.bulk_priority

    async def run(self, item: Item, lease: Lease) -> Record:
        """The item's outcome. A connection that can't be made is no try: the item waits until the engine is back."""
        request_id = f"{lease.job}-{item.index}"
        body = orjson.dumps({**item.body, "stream": False, "priority": self._priority})
        fault = ""
        for attempt in range(_TRIES):
            if attempt:
                await asyncio.sleep(random.uniform(0, min(_BACKOFF_MOST, _BACKOFF_FIRST * 2**attempt)))  # noqa: S311 - jitter
            try:
                answer = await self._answer(body, request_id)
            except EngineError as error:
                fault = str(error)
                continue
            if answer.status not in _RETRYABLE:
                return _record(item, request_id, answer)
            fault = f"The engine answered {answer.status}."
        return Record(
            item.index, item.id, 502, request_id,
            error={"code": "engine_failed", "message": f"Failed after {_TRIES} tries. Last: {fault}"},
        )  # fmt: skip

    async def _answer(self, body: bytes, request_id: str) -> Answer:
        while True:
            try:
                return await self._engine.call(Endpoint.CHAT, body, timeout=self._timeout, request_id=request_id)
            except EngineUnreachable:
                while not await self._engine.healthy():
                    await asyncio.sleep(_ENGINE_PAUSE)


def _record(item: Item, request_id: str, answer: Answer) -> Record:
    content = answer.json()
    if answer.status == 200:
        return Record(item.index, item.id, 200, request_id, body=content)
    error = content.get("error") if isinstance(content, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return Record(
        item.index, item.id, answer.status, request_id,
        error={"code": "invalid_request", "message": str(message or f"The engine answered {answer.status}.")},
    )  # fmt: skip
