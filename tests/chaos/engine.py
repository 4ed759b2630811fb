"""A fast fake engine as a process of its own: `python -m tests.chaos.engine PORT LOG`.

Its answer to a prompt follows from the prompt, so that a wrong one shows. It writes down what it began and what it
answered, a line each, without a buffer: what a killed engine had done is known too.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import uvloop

from tests.fake_engine import MODEL, Connection, FakeEngine, serving

SECONDS = 0.05
"""Mean time to an answer."""


def answer_to(prompt: str) -> str:
    """What the engine says to a prompt."""
    return f"answer to {prompt}"


@dataclass
class Logged(FakeEngine):
    """A fake engine that keeps nothing in memory."""

    log: int = -1
    """Descriptor of the log."""
    scheduler: dict[str, Any] | None = field(default_factory=lambda: {"scheduler": "velocity", "batch_seats": 24})
    """It decides for itself: three workers keep 16 requests each there, whether people are there or not."""

    def note(self, what: str, prompt: str) -> None:
        """One line of the log."""
        os.write(self.log, f"{what} {prompt}\n".encode())


class _Quick(Connection):
    engine: Logged

    async def generate(self, request: dict[str, Any]) -> None:
        prompt = str(request["messages"][-1]["content"])
        self.engine.note("began", prompt)
        await asyncio.sleep(random.uniform(0, 2 * SECONDS))  # noqa: S311 - so that answers come out of order
        message = {"role": "assistant", "content": answer_to(prompt)}
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        body = {"id": "x", "object": "chat.completion", "created": 1, "model": MODEL, "choices": choices}
        self.answer(200, orjson.dumps({**body, "usage": usage}))
        self.engine.note("answered", prompt)


def executions(log: Path) -> tuple[Counter[str], int]:
    """How often each prompt was begun, and the number of answers."""
    lines = [line.partition(" ") for line in log.read_text().splitlines()] if log.exists() else []
    return Counter(prompt for what, _, prompt in lines if what == "began"), sum(line[0] == "answered" for line in lines)


async def _serve(port: int, log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    async with serving(Logged(log=file), _Quick, port):
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), Path(sys.argv[2])))
