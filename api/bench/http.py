"""Chat requests by HTTP, to velocity or straight to an engine."""

from __future__ import annotations

import time
from typing import Any, Self

import httpx
import orjson

from api.bench.load import Done, Stream

_CHAT = "/v1/chat/completions"
_SECONDS = 600.0
_ERROR_LETTERS = 200


class HttpCaller:
    """A `Caller`. As many connections as there are requests; closing it aborts what still runs."""

    def __init__(self, url: str, model: str, key: str = "") -> None:
        self.model = model
        headers = {"authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=_SECONDS, limits=limits)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def stream(self, body: dict[str, Any], due: float, zero: float) -> Stream:
        """Sends a streamed request now and notes when each piece of text arrived."""
        seen = Stream(due=due)
        rest = b""
        try:
            async with self._http.stream("POST", _CHAT, json=body) as reply:
                if reply.status_code != 200:
                    seen.error = (
                        f"{reply.status_code}: {(await reply.aread())[:_ERROR_LETTERS].decode(errors='replace')}"
                    )
                    return seen
                async for data in reply.aiter_raw():
                    now = time.monotonic() - zero
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        _read(line, seen, now)
        except httpx.HTTPError as error:
            seen.error = seen.error or repr(error)
        if not seen.tokens and not seen.error:
            seen.error = "no text"
        return seen

    async def whole(self, body: dict[str, Any]) -> Done:
        """Sends a request without streaming."""
        try:
            reply = await self._http.post(_CHAT, json=body)
        except httpx.HTTPError:
            return Done(0)
        if reply.status_code != 200:
            return Done(0)
        usage = orjson.loads(reply.content)["usage"]
        return Done(usage["completion_tokens"], usage["prompt_tokens"])


def _read(line: bytes, seen: Stream, now: float) -> None:
    """One line of server-sent events."""
    if not line.startswith(b"data: {"):
        return
    event = orjson.loads(line[6:])
    if error := event.get("error"):
        seen.error = str(error.get("message", error))[:_ERROR_LETTERS]
    delta = event["choices"][0]["delta"] if event.get("choices") else {}
    if delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning"):
        seen.note(now)
