"""Processes that ask one Redis for admission as fast as they can, and what the limits let through.

The tests run the same processes and assert that nothing is let through that should not be.
"""

from __future__ import annotations

import multiprocessing
import random
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from itertools import count
from typing import Any, ParamSpec, TypeVar

import redis

from api.limits.rates import Rates

LEASE_US = 15_000_000
_READY = "hammer:ready"
_START_SECONDS = 60.0
_HOLD = """
-- Somebody holds a slot of a key: how many do now, by what they were told, and how many leases live?
-- ARGV: request, key, end of its lease (µs)
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
for _, scope in ipairs({ARGV[2], 'all'}) do
  local holders = 'hammer:holders:' .. scope
  redis.call('ZADD', holders, ARGV[3], ARGV[1])
  redis.call('ZREMRANGEBYSCORE', holders, '-inf', string.format('%.0f', now))
  local leases = 'velocity:limit:' .. scope .. ':leases'
  local held = math.max(redis.call('ZCARD', holders), redis.call('ZCOUNT', leases, string.format('(%.0f', now), '+inf'))
  local most = tonumber(redis.call('HGET', 'hammer:most', scope) or 0)
  if held > most then redis.call('HSET', 'hammer:most', scope, held) end
end
"""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Load:
    """What every process does, and under which limits."""

    url: str
    own: Rates
    """Of every key."""
    everybody: Rates = Rates()  # noqa: RUF009 - it is frozen
    keys: tuple[str, ...] = ("key",)
    processes: int = 8
    seconds: float = 2.0
    most_cost: int = 1
    """Tokens; each request reserves up to so many."""
    again: float = 0.2
    """Share of requests and of settlements that are sent twice, as after an answer that was lost."""
    lease_us: int = LEASE_US


@dataclass(frozen=True)
class Spent:
    """One request that was admitted."""

    key: str
    at: int
    """Redis's time (µs)."""
    tokens: int
    """What it used."""


class Caller:
    """The scripts, one round trip each."""

    def __init__(self, url: str) -> None:
        self.redis = redis.Redis.from_url(url, decode_responses=True)
        folder = resources.files("api") / "lua"
        head = (folder / "prelude.lua").read_text()
        self._digests = {
            name: self.redis.script_load(head + (folder / f"{name}.lua").read_text()) for name in ("admit", "settle")
        }
        self._digests["hold"] = self.redis.script_load(_HOLD)

    def run(self, script: str, *args: str | int) -> Any:
        """One of them."""
        return self.redis.evalsha(self._digests[script], 0, *args)

    def admit(self, load: Load, request: str, key: str, cost: int = 1, *, may_wait: bool = False) -> tuple[str, int]:
        """The verdict, and Redis's time."""
        reply = self.run(
            "admit", request, key, "", cost, int(may_wait), load.lease_us, 600_000, 100, *load.own.args,
            *load.everybody.args,
        )  # fmt: skip
        return reply[0], int(reply[3])

    def settle(self, request: str, key: str, used: int, *, ran: bool = True) -> int:
        """1 the first time."""
        return int(self.run("settle", request, key, used, int(not ran), 0, used, 0))


@contextmanager
def processes(number: int) -> Iterator[Callable[[Callable[[Load, int], T], Load], list[T]]]:
    """Runs a function in so many processes at the same time, each with its number."""
    with ProcessPoolExecutor(number, mp_context=multiprocessing.get_context("spawn")) as pool:

        def run(function: Callable[[Load, int], T], load: Load) -> list[T]:
            with redis.Redis.from_url(load.url) as client:
                client.delete(_READY)
            return [each.result() for each in [pool.submit(function, load, number) for number in range(load.processes)]]

        yield run


def _until_over(caller: Caller, load: Load) -> Iterator[str]:
    """Names of new requests, from the moment when all processes are there, for the load's time."""
    caller.redis.incr(_READY)
    end = time.monotonic() + _START_SECONDS
    while int(caller.redis.get(_READY) or 0) < load.processes:
        if time.monotonic() > end:
            raise RuntimeError("not all processes came")
        time.sleep(0.005)
    end = time.monotonic() + load.seconds
    run = secrets.token_hex(8)
    for turn in count():
        if time.monotonic() >= end:
            return
        yield f"{run}-{turn}"


def pairs(load: Load, number: int) -> float:
    """Admitted and settled: so many per second."""
    caller, key, done, began = Caller(load.url), load.keys[number % len(load.keys)], 0, 0.0
    for request in _until_over(caller, load):
        began = began or time.monotonic()
        verdict, _ = caller.admit(load, request, key)
        if verdict != "admitted":
            raise RuntimeError(f"a request that nothing should limit was {verdict}")
        done += caller.settle(request, key, 1)
    return done / (time.monotonic() - began)


def spend(load: Load, number: int) -> tuple[list[Spent], int, int]:
    """What this process had admitted, and the first and the last time (µs) that it asked.

    A request uses at most what it reserved. Some replies are as good as lost: it asks or settles again, or never
    settles, and then has used all that it reserved.
    """
    caller, draw = Caller(load.url), random.Random(number)
    spent, times = [], []
    for request in _until_over(caller, load):
        key, cost = draw.choice(load.keys), draw.randint((load.most_cost + 1) // 2, load.most_cost)
        verdict, now = caller.admit(load, request, key, cost)
        times.append(now)
        if verdict != "admitted":
            continue
        if draw.random() < load.again and caller.admit(load, request, key, cost)[0] != "admitted":
            raise RuntimeError("a request that was admitted was not when it asked again")
        used = draw.randint(0, cost)
        if draw.random() < 0.05:
            used = cost
        else:
            caller.settle(request, key, used)
            if draw.random() < load.again and caller.settle(request, key, 0):
                raise RuntimeError("a request was settled twice")
        spent.append(Spent(key, now, used))
    return spent, times[0], times[-1]


def hold(load: Load, number: int) -> int:
    """Hold slots for a few ms, one after the other; some are never given back. Returns how many it got.

    `hammer:most` keeps how many were ever held at the same time, as counted inside Redis: what was told to be admitted
    and not settled yet, and leases; the greater of the two.
    """
    caller, draw, got = Caller(load.url), random.Random(number), 0
    for request in _until_over(caller, load):
        key, may_wait = draw.choice(load.keys), draw.random() < 0.5
        for _ in range(20 if may_wait else 1):
            verdict, now = caller.admit(load, request, key, may_wait=may_wait)
            if verdict != "waiting":
                break
            time.sleep(0.002)
        if verdict == "admitted":
            got += 1
            caller.run("hold", request, key, now + load.lease_us)
            if draw.random() < load.again:
                caller.admit(load, request, key, may_wait=may_wait)
            time.sleep(draw.uniform(0, 0.004))
            if draw.random() < 0.02:
                continue
            for scope in (key, "all"):  # before it is given back: what counts it must never lag behind
                caller.redis.zrem(f"hammer:holders:{scope}", request)
        for _ in range(2 if draw.random() < load.again else 1):
            caller.settle(request, key, 1, ran=verdict == "admitted")
    return got


def excess(times: list[int], per_minute: int, burst: int) -> float:
    """By how many requests the worst stretch of time, whichever it is, went over its limit; negative if none did."""
    rate, lowest, worst, began = per_minute / 60e6, float("inf"), float("-inf"), min(times, default=0)
    for before, at in enumerate(sorted(times)):
        lowest = min(lowest, before - rate * (at - began))
        worst = max(worst, before + 1 - rate * (at - began) - lowest - burst)
    return worst
