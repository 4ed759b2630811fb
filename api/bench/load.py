"""Load for one engine: people who come at random, people who are always there, and a window of bulk requests.

Every time is seconds of the monotonic clock, counted from the start of the block. A request that comes at random is
timed from the moment it was *due*, so that a client that falls behind makes latencies worse, never better. A gap is the
time between two pieces of text as the client sees them.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

_ENGLISH = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work number night point home water room mother area money "
    "story fact month lot right study book eye job word business side kind head house service friend father"
)
_NO_TOKENS_PAUSE = 0.2
_LOOK = 0.05


@dataclass(frozen=True)
class Sizes:
    """How long requests are: prompts in words, answers in tokens; both ends included."""

    prompt: tuple[int, int]
    output: tuple[int, int]


@dataclass(frozen=True)
class OpenLoad:
    """Poisson arrivals at `rate` per second during the first `on` seconds of each `period`."""

    sizes: Sizes
    rate: float
    on: float = 1.0
    period: float = 1.0

    def arrivals(self, seconds: float, seed: int) -> list[float]:
        """The due times of one block. The same seed gives the same arrivals, whatever the arm."""
        rng = random.Random(seed)  # noqa: S311 - arrivals, no secrets
        due: list[float] = []
        busy = 0.0
        while True:
            busy += rng.expovariate(self.rate)
            at = (busy // self.on) * self.period + busy % self.on
            if at >= seconds:
                return due
            due.append(at)


@dataclass(frozen=True)
class Steady:
    """People of whom one is always there: the first sends again at once, others after a pause of up to `pause` s."""

    sizes: Sizes
    users: int = 2
    pause: float = 2.0


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

    def note(self, now: float) -> None:
        """A piece of text arrived."""
        if self.tokens:
            self.gaps.append(now - self.last)
        else:
            self.first = now
        self.last = now
        self.tokens += 1

    def compact(self) -> dict[str, Any]:
        """Plain data for a record. A request that never saw a token has no `ttft`."""
        return {
            "due": round(self.due, 5),
            "ttft": round(self.ttft, 5) if self.tokens else None,
            "last": round(self.last, 5),
            "tokens": self.tokens,
            "gaps": [round(gap, 5) for gap in self.gaps],
            "error": self.error,
        }


@dataclass(frozen=True)
class Done:
    """A bulk request that was answered; without output tokens it failed."""

    output: int
    input: int = 0


class Caller(Protocol):
    """Sends chat requests somewhere."""

    model: str

    async def stream(self, body: dict[str, Any], due: float, zero: float) -> Stream:
        """Sends a streamed request now and notes when each piece of text arrived; never raises for a failed one."""
        ...

    async def whole(self, body: dict[str, Any]) -> Done:
        """Sends a request without streaming; never raises for a failed one."""
        ...


class Prompts:
    """Prompts that never repeat from the first word on: the prefix cache must not flatter an arm."""

    def __init__(self, salt: int, words: list[str] | None = None) -> None:
        self._rng = random.Random(salt)  # noqa: S311 - prompts, no secrets
        self._salt = salt
        self._own_words = words is not None
        self._words = words or _ENGLISH.split()
        self._count = 0

    def item(self, sizes: Sizes) -> dict[str, Any]:
        """The fields of a chat request that are its own, of random length within `sizes`."""
        self._count += 1
        words = self._rng.choices(self._words, k=self._rng.randint(*sizes.prompt))
        if not self._own_words:
            words.insert(0, f"{self._salt:x}-{self._count}")
        return {
            "messages": [{"role": "user", "content": " ".join(words)}],
            "max_tokens": self._rng.randint(*sizes.output),
        }

    def body(self, sizes: Sizes, model: str, priority: int | None, *, stream: bool) -> dict[str, Any]:
        """A whole chat request. `priority` is for an engine that is asked directly."""
        body = {"model": model, **self.item(sizes), **DEFAULTS, "stream": stream}
        return body if priority is None else {**body, "priority": priority}


DEFAULTS: dict[str, Any] = {"temperature": 0.7, "ignore_eos": True}
"""Fields that all requests share: answers are as long as `max_tokens`, whatever the model says."""


async def open_loop(
    caller: Caller,
    load: OpenLoad,
    prompts: Prompts,
    *,
    seconds: float,
    seed: int,
    zero: float,
    priority: int | None = None,
) -> list[Stream]:
    """Runs one block of arrivals at random; returns when the last of them has finished."""
    async with asyncio.TaskGroup() as group:
        running: list[asyncio.Task[Stream]] = []
        for due in load.arrivals(seconds, seed):
            body = prompts.body(load.sizes, caller.model, priority, stream=True)
            await asyncio.sleep(max(0.0, zero + due - time.monotonic()))
            running.append(group.create_task(caller.stream(body, due, zero)))
        await asyncio.sleep(max(0.0, zero + seconds - time.monotonic()))
    return [task.result() for task in running]


async def steady(caller: Caller, load: Steady, prompts: Prompts, *, seconds: float, zero: float) -> list[Stream]:
    """Runs one block of people who are always there; returns when the last answer is complete."""
    seen: list[Stream] = []

    async def user(number: int) -> None:
        rng = random.Random(number)  # noqa: S311 - pauses, no secrets
        while True:
            await asyncio.sleep(max(0.0, zero - time.monotonic(), rng.uniform(0, load.pause) if number else 0.0))
            if (now := time.monotonic() - zero) >= seconds:
                return
            seen.append(
                await caller.stream(prompts.body(load.sizes, caller.model, None, stream=True), max(0.0, now), zero)
            )
            if seen[-1].error:
                await asyncio.sleep(_NO_TOKENS_PAUSE)

    async with asyncio.TaskGroup() as group:
        for number in range(load.users):
            group.create_task(user(number))
    return seen


async def bulk(
    caller: Caller,
    sizes: Sizes,
    prompts: Prompts,
    *,
    window: int,
    zero: float,
    over: Callable[[], bool],
    priority: int | None = None,
) -> list[tuple[float, Done]]:
    """Keeps `window` requests in flight until `over()`; returns when each one was answered, and with what.

    What is still running at the end is dropped with its connection and counts for nothing.
    """
    done: list[tuple[float, Done]] = []

    async def sender() -> None:
        while True:
            answer = await caller.whole(prompts.body(sizes, caller.model, priority, stream=False))
            done.append((time.monotonic() - zero, answer))
            if not answer.output:
                await asyncio.sleep(_NO_TOKENS_PAUSE)

    senders = [asyncio.create_task(sender()) for _ in range(window)]
    try:
        while not over():
            await asyncio.sleep(_LOOK)
    finally:
        for task in senders:
            task.cancel()
        await asyncio.gather(*senders, return_exceptions=True)
    return done
