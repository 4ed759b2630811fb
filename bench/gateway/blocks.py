"""The loads, and one block: one load on one arm, with all that is measured meanwhile."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from api.bench.canary import Canary
from bench.gateway.arms import Arm
from bench.gateway.figures import Record, kept, steady
from bench.gateway.native import Ask, Engine, Load
from bench.gateway.processes import cpu_ns, memory_kib, tree

_WARM_SECONDS = 0.5
_BEFORE = 1.0
"""Seconds before a block in which the machine may have begun to stand still."""
_SETTLE = 0.3
"""Seconds after a block in which what it started may come to rest."""


@dataclass(frozen=True)
class Mode:
    """One load."""

    name: str
    title: str
    load: str
    """The load generator's mode."""
    ask: Ask
    connections: int
    share: float = 1.0
    """Of a block's length."""
    rounds: int = 0
    """Requests per connection, instead of a time."""
    options: dict[str, int] = field(default_factory=dict)

    @property
    def pace(self) -> int:
        """Tokens per second of all streams together; 0: as fast as they come."""
        return self.ask.rate * self.connections if self.load == "stream" else 0

    def steady(self, seconds: float, options: dict[str, int]) -> tuple[float, float]:
        """From when until when, in seconds of a block, all streams of a pace are there."""
        return options["spread_ms"] / 1e3, max(seconds * self.share, self.ask.tokens / self.ask.rate)


def paced(streams: int, rate: int, seconds: float = 3.0) -> Mode:
    """Streams of `seconds` each, begun one after the other."""
    ask = Ask(round(rate * seconds), rate=rate, prefill_ms=20)
    title = f"{streams} streams of {rate} tokens/s, {ask.tokens} tokens each"
    spread = {"spread_ms": round(seconds * 1000)}
    return Mode(f"paced-{streams}x{rate}", title, "stream", ask, streams, options=spread)


_SHORT = Ask(16, stream=False)
MODES = (
    paced(50, 132),
    paced(200, 132),
    Mode("saturated", "50 streams as fast as they are taken, 1,000 tokens each", "stream", Ask(1000), 50, 0.5),
    Mode("short-1", "short answers that are no stream, one after the other", "short", _SHORT, 1, 0.5),
    Mode("short-32", "the same, 32 at a time", "short", _SHORT, 32, 0.5),
    Mode("new-32", "the same, 32 at a time, a TCP connection for each", "short-new", _SHORT, 32, 0.5),
    Mode("abort-stream", "streams that are given up after 10 tokens", "abort", Ask(2000, rate=132), 1, rounds=20,
         options={"after_tokens": 10}),
    Mode("abort-whole", "answers that are no stream, given up after 60 ms of 800", "abort",
         Ask(16, stream=False, delay_ms=800), 1, rounds=20, options={"after_ms": 60}),
)  # fmt: skip


class BlockRunner:
    """Runs blocks; each request of a run has a number of its own."""

    def __init__(self, load: Load, engine: Engine, canary: Canary) -> None:
        self._load = load
        self._engine = engine
        self._canary = canary
        self._next = 1

    def warm(self, arm: Arm) -> None:
        """A first load that does not count, so that caches are full and connections open."""
        for mode, ask in (("stream", Ask(200)), ("short", _SHORT)):
            request = ask.request(arm.key)
            self._load.run(mode, arm.port, request, connections=8, seconds=_WARM_SECONDS)

    def run(self, mode: Mode, arm: Arm, seconds: float, tokens: int = 0) -> Record:
        """One block of about that length, or of so many tokens. Raises StartError."""
        pids, redis = tree(arm.pid), [arm.redis] if arm.redis else []
        idle = peak = memory_kib(pids)
        samples: list[tuple[int, int]] = []

        def look() -> None:
            nonlocal peak
            peak = max(peak, memory_kib(pids))
            samples.append((time.monotonic_ns(), cpu_ns(pids)))

        how: dict[str, Any] = {"rounds": mode.rounds} if mode.rounds else {"seconds": seconds * mode.share}
        options = dict(mode.options)
        if "spread_ms" in options:  # all of them are to begin
            options["spread_ms"] = min(options["spread_ms"], round(how["seconds"] * 1000))
        if tokens:
            how = {"tokens": tokens, "slice_ms": 1000}
        if mode.load == "stream":
            how["expect"] = mode.ask.tokens
        before, redis_before = cpu_ns(pids), cpu_ns(redis)
        report = self._load.run(
            mode.load, arm.port, mode.ask.request(arm.key), meanwhile=look, limit=seconds + tokens / 1000,
            connections=mode.connections, first=self._next, **how, **options,
        )  # fmt: skip
        time.sleep(max(_SETTLE, mode.ask.delay_ms / 1000))
        record = {
            "mode": mode.name, "arm": arm.name, "streams": mode.connections, "pace": mode.pace,
            "cpu": cpu_ns(pids) - before, "redis_cpu": cpu_ns(redis) - redis_before, "idle_kib": idle, "peak_kib": peak,
            "notices": self._notices(report) if mode.load == "abort" else [], "stalls": self._stalls(report),
        }  # fmt: skip
        self._next += report["requests"]
        whole = {"cpu": record["cpu"], "tokens": report["tokens"], "seconds": report["seconds"]}
        found = steady(samples, report, *mode.steady(seconds, options)) if mode.pace and not tokens else None
        return kept(report, record | (found or {f"steady_{name}": value for name, value in whole.items()}))

    def _stalls(self, report: dict[str, Any]) -> list[tuple[float, float]]:
        """Spells in which the machine stood still: seconds after the block's begin (or before), and how long."""
        began = report["began"] / 1e9
        found = self._canary.between(began - _BEFORE, began + report["seconds"])
        return [(at - _BEFORE, lost) for at, lost in found]

    def _notices(self, report: dict[str, Any]) -> list[int]:
        """ns from the client's leaving to the engine's notice, of those that it noticed."""
        noticed = dict(self._engine.stats()["aborts"])
        return [noticed[number] - at for number, at in report["closes"] if number in noticed]
