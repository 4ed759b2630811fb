"""Finds the token usage in an answer's bytes, without parsing a stream chunk by chunk."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import orjson

from engine.client import Endpoint

_END = b"\n\n"
_USAGE_MARK = {
    # Inside a JSON string the quotes would be escaped, so these bytes can't come from generated text.
    Endpoint.CHAT: b'"choices":[]',
    Endpoint.COMPLETIONS: b'"choices":[]',
    Endpoint.RESPONSES: b"event: response.completed",
    Endpoint.EMBEDDINGS: b"\x00",
}
_HOLD_MOST = 256 * 1024
_FINISHED = b'"finish_reason":"'
_FINISH = re.compile(rb'"finish_reason":"(\w+)"')


_PREAMBLE = (b"event: response.created", b"event: response.in_progress")


def is_preamble(endpoint: Endpoint, data: bytes) -> bool:
    """Whether these bytes come before any token: the responses endpoint opens its streams before the prompt is read."""
    if endpoint is not Endpoint.RESPONSES or not data:
        return False
    return all(event.startswith(_PREAMBLE) for event in data.split(_END) if event)


@dataclass(slots=True)
class Usage:
    """Tokens as the engine counted them."""

    input_tokens: int = 0
    output_tokens: int = 0
    known: bool = False
    """Whether the engine has said them."""
    events: int = 0
    """Events of the stream so far, about one per token."""
    finish_reason: str | None = None

    def read(self, content: Any) -> None:
        """Take the counts of an answer or a usage event, in any of the endpoints' spellings."""
        if not isinstance(content, dict):
            return
        for choice in content.get("choices") or ():
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        usage = content.get("usage") or (content.get("response") or {}).get("usage")
        if not isinstance(usage, dict):
            return
        self.known = True
        self.input_tokens = usage.get("prompt_tokens") or usage.get("input_tokens") or 0
        self.output_tokens = usage.get("completion_tokens") or usage.get("output_tokens") or 0


class UsageFilter:
    """Passes a stream's bytes on unchanged, whole events at a time, but for the usage event if it is to be hidden."""

    def __init__(self, endpoint: Endpoint, usage: Usage, *, hide: bool) -> None:
        self._mark = _USAGE_MARK[endpoint]
        self._usage = usage
        self._hide = hide
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What may go to the client now. An event that is still incomplete is held back until its end arrives."""
        self._usage.events += data.count(_END)
        if _FINISHED in data and (finish := _FINISH.search(data)):
            self._usage.finish_reason = finish[1].decode()
        if not self._held and data.endswith(_END):  # whole events, as the engine writes them
            return self._sift(data) if self._mark in data else data
        if self._held:
            data = self._held + data
        end = data.rfind(_END) + len(_END)
        if end < len(_END):
            if len(data) > _HOLD_MOST:  # no usage event is that long
                self._held = b""
                return data
            self._held = data
            return b""
        self._held = data[end:]
        complete = data[:end] if self._held else data
        return self._sift(complete) if self._mark in complete else complete

    def rest(self) -> bytes:
        """What is held at the end of the stream."""
        held, self._held = self._held, b""
        return held

    def _sift(self, events: bytes) -> bytes:
        kept = []
        for event in events.split(_END)[:-1]:
            if self._mark in event:
                self._read(event)
                if self._hide:
                    continue
            kept.append(event + _END)
        return b"".join(kept)

    def _read(self, event: bytes) -> None:
        data = event[event.find(b"data:") + 5 :]
        try:
            self._usage.read(orjson.loads(data))
        except orjson.JSONDecodeError:
            return  # not the form that was expected: nothing is accounted, the client still gets it
