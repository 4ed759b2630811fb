"""A round trip with two tools: the model asks for the time, then for a calculation, then answers."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

from api.bench.load import Prompts, Sizes, Stream
from bench.gpu.load import Client

_ANSWER = Sizes(prompt=(20, 60), output=(24, 24))
_TOOLS: dict[str, dict[str, list[Any]]] = {
    "get_time": {"zone": ["UTC"]},
    "calculate": {"operation": ["add"], "left": [1, 2, 3], "right": [4, 5, 6]},
}
"""Each parameter with the values that it may have: so few that a model without weights can call them, too."""
_PARTS = (
    "<tool_call>",
    "</tool_call>",
    '{"name": "',
    '", "arguments": ',
    '": "',
    '", "',
    '": ',
    ', "',
    '{"',
    '"}',
    "}}",
)
_NAMES = ("get_time", "calculate", "zone", "UTC", "operation", "add", "left", "right")
PIECES = (*map(chr, range(32, 127)), *_PARTS, *_NAMES)
"""Tokens of which such a call can be made: a tokenizer's usual pieces, and every character for what is between.

No line breaks: blanks are optional in most places, and a model without weights puts in all that it has."""


@dataclass(frozen=True)
class Tools:
    """One person who makes so many round trips, one after the other."""

    rounds: int


async def round_trips(client: Client, shape: Tools, texts: Prompts, zero: float, priority: int | None) -> list[Stream]:
    """Each as one `Stream`: due when its first request is sent, and its last token when the last answer is complete."""
    return [await _round_trip(client, texts, zero, priority) for _ in range(shape.rounds)]


async def _round_trip(client: Client, texts: Prompts, zero: float, priority: int | None) -> Stream:
    seen = Stream(due=time.monotonic() - zero)
    body = texts.body(_ANSWER, client.model, priority, stream=False)
    tools = [_tool(name, parameters) for name, parameters in _TOOLS.items()]
    for name in _TOOLS:
        choice = {"type": "function", "function": {"name": name}}
        asked = body | {"tools": tools, "tool_choice": choice, "max_tokens": 160, "ignore_eos": False}
        answer = await client.answer(asked)
        try:
            called = answer["choices"][0]["message"]["tool_calls"][0]["function"]
            json.loads(called["arguments"])
        except (KeyError, IndexError, TypeError, ValueError):
            seen.error = f"no call of {name}: {json.dumps(answer)[:300]}"
            return seen
        told = f"{called['name']} {called['arguments']}"
        body = body | {"messages": [*body["messages"], {"role": "user", "content": told}]}
    if "choices" not in await client.answer(body):
        seen.error = "no answer"
    seen.note(time.monotonic() - zero)
    return seen


def _tool(name: str, parameters: dict[str, list[Any]]) -> dict[str, Any]:
    properties = {
        field: {"type": "integer" if isinstance(values[0], int) else "string", "enum": values}
        for field, values in parameters.items()
    }
    schema = {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip
    return {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}
