"""Limits while Redis does not answer: each process lets known keys have its own share of them, for a bounded time."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from api.keys import Key
from api.limits.rates import Rates, Standing
from api.limits.refusals import refusal

_ROUNDING = 1e-6
"""Seconds: sums of floating-point times may be off by less."""


@dataclass(slots=True)
class _Buckets:
    """Theoretical arrival times (monotonic seconds) of one key's requests and tokens."""

    requests: float = 0.0
    tokens: float = 0.0


@dataclass(slots=True)
class LocalShare:
    """What this process may admit by itself. One per process."""

    _buckets: dict[str, _Buckets] = field(default_factory=dict)

    def admit(self, key: Key, all_keys: Rates, cost: int, processes: int, running: tuple[int, int]) -> Standing:
        """Take one request of `cost` tokens. `running` are the key's requests in this process, and all of them.

        Raises ApiError 429 or 503 when the share is used.
        """
        rates = Rates.of(key)
        takes = []
        standing = Standing(0, 0, 0, 0)
        for scope, whole, busy in ((key.id, rates, running[0]), ("all", all_keys, running[1])):
            share = _share(whole, processes)
            taken, lacking, wait = self._take(scope, share, cost, busy)
            if lacking:
                reason = f"global_{lacking}" if scope == "all" else lacking
                raise refusal(reason, math.ceil(wait * 1e6), rates, all_keys, standing, cost)
            takes.append((scope, taken))
        for scope, taken in takes:
            self._buckets[scope] = taken
        return self._standing(key.id, rates, processes)

    def give_back(self, key: Key, all_keys: Rates, tokens: int, processes: int) -> None:
        """Tokens that were reserved and not used."""
        for scope, whole in ((key.id, Rates.of(key)), ("all", all_keys)):
            tpm = _share(whole, processes).tpm
            if tpm and scope in self._buckets:
                self._buckets[scope].tokens -= tokens * 60 / tpm

    def prune(self) -> None:
        """Forget what has flowed back; the rest stays, so that a Redis that comes and goes gives no share twice."""
        if self._buckets:
            now = time.monotonic()
            self._buckets = {
                scope: used for scope, used in self._buckets.items() if max(used.requests, used.tokens) > now
            }

    def _take(self, scope: str, share: Rates, cost: int, busy: int) -> tuple[_Buckets, str, float]:
        """The buckets after it, or what is lacking and the seconds until it is there."""
        now = time.monotonic()
        before = self._buckets.get(scope, _Buckets())
        after = _Buckets(before.requests, before.tokens)
        if share.rpm:
            after.requests = max(now, before.requests) + 60 / share.rpm
            if (late := after.requests - now - share.burst * 60 / share.rpm) > _ROUNDING:
                return after, "requests", late
        if share.tpm:
            after.tokens = max(now, before.tokens) + cost * 60 / share.tpm
            if (late := after.tokens - now - 60) > _ROUNDING:
                return after, "tokens", late
        if share.concurrency and busy >= share.concurrency:
            return after, "concurrency", 1.0
        return after, "", 0.0

    def _standing(self, scope: str, rates: Rates, processes: int) -> Standing:
        now, share, buckets = time.monotonic(), _share(rates, processes), self._buckets[scope]
        used_requests, used_tokens = max(0.0, buckets.requests - now), max(0.0, buckets.tokens - now)
        return Standing(
            max(0, int(share.burst - used_requests * share.rpm / 60)), math.ceil(used_requests * 1e6),
            max(0, int(share.tpm - used_tokens * share.tpm / 60)), math.ceil(used_tokens * 1e6),
        )  # fmt: skip


def _share(rates: Rates, processes: int) -> Rates:
    """An equal part for each api process; where there is a limit, at least one."""
    return Rates(*(max(1, value // processes) if value else 0 for value in rates.args))
