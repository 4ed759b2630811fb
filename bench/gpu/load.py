"""Load for one engine: open-loop streams, closed-loop streams, and a window of bulk requests.

Every time is seconds of the monotonic clock, counted from the start of the block. An open-loop request is timed from
the moment it was *due*, so that a client that falls behind makes latencies worse, never better. A gap is the time
between two pieces of text as the client sees them.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

WORDS = 4000
"""Prompts draw from the first words, which every shape's tokenizer knows."""


@dataclass(frozen=True)
class Sizes:
    """How long requests are, in tokens; both ends included."""

    prompt: tuple[int, int]
    output: tuple[int, int]


@dataclass(frozen=True)
class OpenLoad:
    """Poisson arrivals at `rate` per second during the first `on` seconds of each `period`."""

    sizes: Sizes
    rate: float
    on: float
    period: float

    def arrivals(self, seconds: float, seed: int) -> list[float]:
        """The due times of one block. The same seed gives the same arrivals, whatever the arm."""
        rng = random.Random(seed)
        due: list[float] = []
        busy = 0.0
        while True:
            busy += rng.expovariate(self.rate)
            at = (busy // self.on) * self.period + busy % self.on
            if at >= seconds:
                return due
            due.append(at)


@dataclass
class Stream:
    """One streamed request as its client saw it."""

    due: float
    first: float = 0.0
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str = ""

    @property
    def ttft(self) -> float:
        """Seconds from the due time to the first text."""
        return self.first - self.due


@dataclass
class Prompts:
    """Prompts that never repeat: the prefix cache must not flatter an arm."""

    rng: random.Random

    def body(self, sizes: Sizes, model: str, priority: int | None, *, stream: bool) -> dict[str, Any]:
        """A chat request of random length within `sizes`."""
        words = " ".join(f"w{self.rng.randint(4, WORDS - 1)}" for _ in range(self.rng.randint(*sizes.prompt)))
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": words}],
            "max_tokens": self.rng.randint(*sizes.output),
            "temperature": 0.7,
            "ignore_eos": True,
            "stream": stream,
        }
        if priority is not None:
            body["priority"] = priority
        return body


class Client:
    """One connection pool to the engine's chat endpoint."""

    def __init__(self, url: str, model: str) -> None:
        self._url = f"{url}/v1/chat/completions"
        self.model = model
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(total=600),
        )

    async def close(self) -> None:
        """Closes every connection; the engine aborts what was still running on them."""
        await self._session.close()

    async def stream(self, body: dict[str, Any], due: float, zero: float) -> Stream:
        """Sends a streamed request now and notes when each piece of text arrived."""
        seen = Stream(due=due)
        try:
            async with self._session.post(self._url, json=body) as reply:
                if reply.status != 200:
                    seen.error = f"{reply.status}: {(await reply.text())[:200]}"
                    return seen
                async for line in reply.content:
                    if b'"content":"' in line and b'"content":""' not in line:
                        _note(seen, time.monotonic() - zero)
        except (aiohttp.ClientError, TimeoutError) as error:
            seen.error = repr(error)
        if not seen.tokens and not seen.error:
            seen.error = "no text"
        return seen

    async def whole(self, body: dict[str, Any]) -> int:
        """Sends a request without streaming; returns the tokens that it brought (0 if it failed)."""
        try:
            async with self._session.post(self._url, json=body) as reply:
                answer = await reply.json()
                return int(answer["usage"]["completion_tokens"]) if reply.status == 200 else 0
        except (aiohttp.ClientError, TimeoutError):
            return 0


def _note(seen: Stream, now: float) -> None:
    if seen.tokens:
        seen.gaps.append(now - seen.last)
    else:
        seen.first = now
    seen.last = now
    seen.tokens += 1


async def open_loop(
    client: Client, load: OpenLoad, *, seconds: float, seed: int, salt: int, zero: float, priority: int | None
) -> list[Stream]:
    """Runs one block of open-loop arrivals; returns when the last of them has finished."""
    prompts = Prompts(random.Random(salt))
    running: list[asyncio.Task[Stream]] = []
    for due in load.arrivals(seconds, seed):
        body = prompts.body(load.sizes, client.model, priority, stream=True)
        await asyncio.sleep(max(0.0, zero + due - time.monotonic()))
        running.append(asyncio.create_task(client.stream(body, due, zero)))
    return list(await asyncio.gather(*running))


async def closed_loop(
    client: Client, sizes: Sizes, *, users: int, rounds: int, salt: int, zero: float, priority: int | None
) -> list[Stream]:
    """`users` people who all start together and send `rounds` requests each, one after the other."""
    prompts = Prompts(random.Random(salt))

    async def user() -> list[Stream]:
        return [
            await client.stream(prompts.body(sizes, client.model, priority, stream=True), time.monotonic() - zero, zero)
            for _ in range(rounds)
        ]

    return [seen for person in await asyncio.gather(*(user() for _ in range(users))) for seen in person]


async def bulk(
    client: Client, sizes: Sizes, *, window: int, salt: int, zero: float, over: Callable[[], bool], priority: int | None
) -> list[tuple[float, int]]:
    """Keeps `window` requests in flight until `over()`; returns (time, tokens) of each one that completed.

    What is still running at the end is dropped with its connection and counts for nothing.
    """
    prompts = Prompts(random.Random(salt))
    done: list[tuple[float, int]] = []

    async def worker() -> None:
        while True:
            tokens = await client.whole(prompts.body(sizes, client.model, priority, stream=False))
            done.append((time.monotonic() - zero, tokens))
            if not tokens:
                await asyncio.sleep(0.2)

    workers = [asyncio.create_task(worker()) for _ in range(window)]
    while not over():
        await asyncio.sleep(0.05)
    for task in workers:
        task.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    return done
