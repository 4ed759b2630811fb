"""A small client of velocity's own HTTP interface, for the command line."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Self

import httpx
import orjson

from engine.errors import VelocityError


class AnswerError(VelocityError):
    """velocity refused a request, or a stream ended with an error."""


@dataclass(slots=True)
class ChatTiming:
    """How fast a streamed answer was, in seconds from the sending of the request."""

    began: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float = 0.0
    tokens: int = 0
    model: str = ""

    @property
    def summary(self) -> str:
        """One line: TTFT, tokens, tokens per second."""
        if self.first is None:
            return "no token came"
        span = self.last - self.first
        rate = f"{(self.tokens - 1) / span:.1f} tokens/s" if self.tokens > 1 and span > 0 else "one piece"
        return f"{self.model}: first token after {self.first:.2f} s, {self.tokens} tokens, {rate}"


class VelocityClient:
    """Calls one velocity with one key. Raises AnswerError, or httpx.TransportError when nothing answers."""

    def __init__(self, url: str, key: str) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.url = url
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=httpx.Timeout(60, read=600))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def json(self, method: str, path: str, **options: Any) -> Any:
        """One call, answered with JSON."""
        response = await self._http.request(method, path, **options)
        if response.status_code >= 400:
            raise AnswerError(_reason(response.status_code, response.content))
        return response.json()

    async def chat(self, body: dict[str, Any], timing: ChatTiming) -> AsyncIterator[str]:
        """The pieces of a streamed chat answer; `timing` is filled while they come."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code >= 400:
                raise AnswerError(_reason(response.status_code, await response.aread()))
            async for line in _lines(response):
                if not line.startswith(b"data: ") or line == b"data: [DONE]":
                    continue
                event = orjson.loads(line[6:])
                if "error" in event:
                    raise AnswerError(event["error"]["message"])
                timing.model = event["model"]
                if usage := event.get("usage"):
                    timing.tokens = usage["completion_tokens"]
                for choice in event["choices"]:
                    if text := choice["delta"].get("content"):
                        timing.last = time.monotonic() - timing.began
                        timing.first = timing.last if timing.first is None else timing.first
                        yield text

    async def results(self, job: str, after: int = -1) -> AsyncIterator[dict[str, Any]]:
        """Finished items of a job."""
        async with self._http.stream("GET", f"/jobs/{job}/results", params={"after": after}) as response:
            if response.status_code >= 400:
                raise AnswerError(_reason(response.status_code, await response.aread()))
            async for line in _lines(response):
                yield orjson.loads(line)


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Lines ended by a newline and nothing else: JSON may hold what Unicode calls line ends."""
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line
    if rest:
        yield rest


def _reason(status: int, body: bytes) -> str:
    try:
        return str(orjson.loads(body)["error"]["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return f"velocity answered {status}."
