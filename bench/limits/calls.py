"""What one call of the limiter costs: against a bare PING on the same connection, in turns, and inside Redis alone."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from itertools import count

import uvloop

from api.fast_redis import FastRedis
from api.limits.rates import Rates
from api.metrics import Metrics
from bench.limits.hammer import Caller, Load
from workers.redis import connect

NEVER_FULL = Rates(1_000_000_000, 1_000_000_000, 1_000_000_000, 1_000_000_000)
"""Every limit is there, and none is ever reached."""
_COST = 1000

Times = dict[str, list[float]]
"""Seconds per call, by arm; one turn of all arms at the same index."""


def blocking(url: str, turns: int) -> Times:
    """A plain client: a PING, then one request under all limits and one under none, each admitted and settled."""
    caller = Caller(url)
    loads = {"all limits": Load(url, NEVER_FULL, NEVER_FULL), "no limits": Load(url, Rates())}
    times: Times = {}

    def timed(name: str, call: Callable[[], object]) -> None:
        began = time.perf_counter()
        call()
        times.setdefault(name, []).append(time.perf_counter() - began)

    for turn in range(turns):
        timed("ping", caller.redis.ping)
        for name, load in loads.items():
            request, key = f"{name}-{turn}", name.replace(" ", "-")
            timed(f"admit, {name}", lambda: caller.admit(load, request, key, _COST))  # noqa: B023 - called at once
            timed(f"settle, {name}", lambda: caller.settle(request, key, _COST // 2))  # noqa: B023
    return times


def as_the_api_does(url: str, turns: int) -> Times:
    """The same through the api's own asynchronous client, with its time limit and its metrics."""
    times: Times = uvloop.run(_as_the_api_does(url, turns))
    return times


async def _as_the_api_does(url: str, turns: int) -> Times:
    quick = connect(url, 0.5, retries=0)
    fast = FastRedis(quick, 0.5, Metrics())
    times: Times = {}

    async def timed(name: str, call: Callable[[], Awaitable[object]]) -> None:
        began = time.perf_counter()
        await call()
        times.setdefault(name, []).append(time.perf_counter() - began)

    for turn in range(turns):
        await timed("ping", lambda: fast.call("ping", quick.ping))
        for name, rates in (("all limits", NEVER_FULL), ("no limits", Rates())):
            request, key = f"api-{name}-{turn}", name.replace(" ", "-")
            admit = (request, key, "", _COST, 0, 15_000_000, 600_000, 100, *rates.args, *rates.args)
            settle = (request, key, _COST // 2, 0, 1, 1, 0)
            await timed(f"admit, {name}", lambda: fast.run("admit", *admit))  # noqa: B023 - called at once
            await timed(f"settle, {name}", lambda: fast.run("settle", *settle))  # noqa: B023
        if turn % 100 == 0:
            await asyncio.sleep(0)
    await quick.aclose()
    return times


def inside_redis(url: str, calls: int) -> dict[str, float]:
    """µs of Redis's own time per call, as INFO commandstats has it; nothing else runs meanwhile."""
    caller, load, serial = Caller(url), Load(url, NEVER_FULL, NEVER_FULL), count()
    asked = [f"inside-{next(serial)}" for _ in range(calls)]
    found = {}
    for name, command, call in (
        ("ping", "ping", lambda _: caller.redis.ping()),
        ("admit, all limits", "evalsha", lambda request: caller.admit(load, request, "inside", _COST)),
        ("settle, all limits", "evalsha", lambda request: caller.settle(request, "inside", _COST // 2)),
    ):
        caller.redis.config_resetstat()
        for request in asked:
            call(request)
        found[name] = float(caller.redis.info("commandstats")[f"cmdstat_{command}"]["usec_per_call"])
    return found


def table(title: str, times: Times) -> str:
    """p50 and p99 of every arm, and what the median of its turns adds to a PING of the same turn."""
    lines = [f"{title:34} {'p50':>8} {'p99':>8} {'over a PING':>12} {'ratio':>6}"]
    ping = times["ping"]
    for name, found in times.items():
        cuts = statistics.quantiles(found, n=100)
        added = statistics.median(mine - bare for mine, bare in zip(found, ping, strict=True))
        ratio = statistics.median(found) / statistics.median(ping)
        lines.append(f"  {name:32} {cuts[49] * 1e6:6.0f}µs {cuts[98] * 1e6:6.0f}µs {added * 1e6:+10.0f}µs {ratio:6.2f}")
    return "\n".join(lines)
