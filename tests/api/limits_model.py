"""What the limiter's scripts promise, in exact arithmetic: the whole keyspace after an operation, from that before it.

The model is asked with the clock of the real Redis and compared with what the real scripts left there, so each
operation is checked by itself, to the µs, and no rounding adds up.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from api.limits.rates import Rates

Space = dict[str, dict[str, Any]]
"""Every key of the limiter with its fields, or its members and their scores; numbers as int."""

ROOT, ALL = "velocity:", "all"
MINUTE = 60_000_000
DAY = 86_400_000_000
SLOTS = frozenset({"concurrency", "global_concurrency", "max_waiting"})
"""Reasons that depend on others giving something back: how long that takes is only guessed."""


NONE = Rates()
NO_WAIT, HALF = Fraction(), Fraction(1, 2)


@dataclass(frozen=True, slots=True)
class Ask:
    """One call of `admit`."""

    request: str
    key: str
    cost: int
    own: Rates
    everybody: Rates = NONE
    may_wait: bool = False
    version: str = ""
    lease: int = 15_000_000
    most_waiting: int = 100

    @property
    def args(self) -> tuple[str | int, ...]:
        """As the script takes them; a reservation outlasts every test."""
        return (
            self.request, self.key, self.version, self.cost, int(self.may_wait), self.lease, 600_000,
            self.most_waiting, *self.own.args, *self.everybody.args,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settle:
    """One call of `settle`."""

    request: str
    key: str
    used: int = 0
    never_ran: bool = False
    refused: bool = False

    @property
    def args(self) -> tuple[str | int, ...]:
        """As the script takes them; a third of what was used is input."""
        return self.request, self.key, self.used, int(self.never_ran), *self.parts, int(self.refused)

    @property
    def parts(self) -> tuple[int, int]:
        """Input and output tokens."""
        return self.used // 3, self.used - self.used // 3


@dataclass(frozen=True, slots=True)
class Answer:
    """What `admit` says. The model's `left` and `resets` are ((least, most) requests, tokens) and exact µs."""

    verdict: str
    reason: str = ""
    wait: Fraction = NO_WAIT
    left: tuple[tuple[int, int], ...] = ()
    resets: tuple[Fraction, ...] = ()
    ahead: int = 0
    now: int = 0

    @classmethod
    def read(cls, reply: Sequence[Any]) -> Answer:
        """Of the script's reply."""
        if len(reply) == 1:
            return cls(reply[0])
        wait, now, requests, requests_reset, tokens, tokens_reset, ahead = (int(value) for value in reply[2:])
        left, resets = ((requests, requests), (tokens, tokens)), (Fraction(requests_reset), Fraction(tokens_reset))
        return cls(reply[0], reply[1], Fraction(wait), left, resets, ahead, now)

    def agrees(self, real: Answer) -> bool:
        """Whether the real answer is this one, to the µs."""
        return (
            (self.verdict, self.reason, self.ahead) == (real.verdict, real.reason, real.ahead)
            and abs(math.ceil(self.wait) - real.wait) <= 1
            and all(abs(math.ceil(a) - b) <= 1 for a, b in zip(self.resets, real.resets, strict=True))
            and all(a[0] <= b[0] <= a[1] for a, b in zip(self.left, real.left, strict=True))
        )


class _Bucket:
    """One bucket of one scope, looked at now."""

    def __init__(self, fields: dict[str, int], name: str, rate: int, most: int, cost: int, now: int) -> None:
        self.fields, self.name, self.rate, self.now = fields, name, rate, now
        self.charge = self.span = self.before = Fraction(0)
        if rate:
            self.charge, self.span = Fraction(cost * MINUTE, rate), Fraction(most * MINUTE, rate)
            self.before = min(max(Fraction(now), Fraction(fields.get(name, 0))), now + 2 * self.span)
        self.late = self.before + self.charge - now - self.span if rate else Fraction(0)
        self.never = rate > 0 and cost > most

    def cut(self) -> None:
        """Nothing lies more than a bucketful beyond the bucket: it drains from here on."""
        if self.rate and self.fields.get(self.name, 0) > self.before:
            self.fields[self.name] = math.floor(self.before)

    def take(self) -> None:
        if self.rate:
            self.fields[self.name] = math.ceil(self.before + self.charge)
            if self.before <= self.now:
                self.fields[f"{self.name}_full"] = self.now

    def left(self, charged: bool) -> tuple[tuple[int, int], Fraction]:
        """The least and the most that is left, a µs and the script's half considered, and µs until all is."""
        if not self.rate:
            return (-1, -1), Fraction(0)
        reset = self.before + (self.charge if charged else 0) - self.now
        free = [math.floor((self.span - reset + Fraction(1, 2) + by) * self.rate / MINUTE) for by in (-1, 1)]
        return (max(0, free[0]), max(0, free[1])), reset


class Model:
    """The limiter's operations on a keyspace."""

    def __init__(self, space: Space) -> None:
        self.space = copy.deepcopy(space)

    def at(self, name: str) -> dict[str, Any]:
        """One key's content; an empty one is none, as in Redis."""
        return self.space.setdefault(ROOT + name, {})

    def leases(self, scope: str) -> dict[str, int]:
        return self.at(f"limit:{scope}:leases")

    def _count(self, key: str, now: int, **counts: int) -> None:
        usage = self.at(f"usage:{key}:{now // DAY}")
        for name, count in counts.items():
            if count:
                usage[name] = usage.get(name, 0) + count

    def line(self, key: str) -> list[str]:
        """Who waits for a slot of the key, in order."""
        return [
            name for _, name in sorted((arrived, name) for name, arrived in self.at(f"limit:{key}:waiting").items())
        ]

    def drop_dead(self, key: str, now: int) -> None:
        """Leases and places that are over."""
        for scope in (key, ALL):
            for request in [name for name, end in self.leases(scope).items() if end <= now]:
                del self.leases(scope)[request]
        for request in [name for name, end in self.at(f"limit:{key}:places").items() if end <= now]:
            self._leave_line(key, request)

    def _leave_line(self, key: str, request: str) -> None:
        self.at(f"limit:{key}:places").pop(request, None)
        self.at(f"limit:{key}:waiting").pop(request, None)

    def _buckets(self, ask: Ask, now: int, new: bool) -> list[tuple[str, _Bucket]]:
        return [
            (prefix + name, _Bucket(self.at(f"limit:{scope}"), name, rate, most, cost * new, now))
            for scope, prefix, rates in ((ask.key, "", ask.own), (ALL, "global_", ask.everybody))
            for name, rate, most, cost in (
                ("requests", rates.rpm, rates.burst, 1), ("tokens", rates.tpm, rates.tpm, ask.cost),
            )
        ]  # fmt: skip

    def ask(self, ask: Ask, now: int, slack: Fraction = HALF) -> Answer:
        """`admit`. What is late by less than `slack` µs is not late."""
        if ask.version and self.at(f"key:{ask.key}").get("version") != int(ask.version):
            return Answer("stale")
        known = self.at(f"request:{ask.request}").get("state")
        named = self._buckets(ask, now, new=not known)
        buckets = [bucket for _, bucket in named]

        def answer(verdict: str, reason: str = "", wait: Fraction = NO_WAIT, ahead: int = 0) -> Answer:
            if verdict == "refused":
                self._count(ask.key, now, refused=1)
            standing = [bucket.left(verdict != "refused") for bucket in buckets[:2]]
            left, resets = zip(*standing, strict=True)
            return Answer(verdict, reason, wait, left, resets, ahead, now)

        if known == "leased" and self.leases(ask.key).get(ask.request, 0) > now:
            return answer("admitted")
        if not known:
            late, lacking = self._lacking(named)
            if lacking == "never_fits" or late > slack:
                return answer("refused", lacking, late)
        self.drop_dead(ask.key, now)
        line = self.line(ask.key)
        ahead = line.index(ask.request) if ask.request in line else len(line)
        lacking, wait = self._slot(ask, ahead)
        if lacking and not known and (not ask.may_wait or ahead >= ask.most_waiting):
            return answer("refused", "max_waiting" if ask.may_wait else lacking, wait, ahead)
        if not known:
            self._reserve(ask, buckets, now)
        self._place(ask, now, waits=bool(lacking))
        return answer("waiting", lacking, wait, ahead) if lacking else answer("admitted")

    @staticmethod
    def _lacking(named: list[tuple[str, _Bucket]]) -> tuple[Fraction, str]:
        """By how much the last bucket that has room for it is late, and which one that is."""
        for _, bucket in named:
            bucket.cut()
            if bucket.never:
                return NO_WAIT, "never_fits"
        return max(((bucket.late, reason) for reason, bucket in named), key=lambda pair: pair[0])

    def _slot(self, ask: Ask, ahead: int) -> tuple[str, Fraction]:
        """What lacks for a slot after those ahead have theirs, and a guess how long."""
        for scope, reason, slots in (
            (ask.key, "concurrency", ask.own.concurrency), (ALL, "global_concurrency", ask.everybody.concurrency),
        ):  # fmt: skip
            if slots and len(self.leases(scope)) + ahead >= slots:
                return reason, Fraction(self.at(f"limit:{scope}").get("held", 0) * (ahead + 1), slots)
        return "", NO_WAIT

    def _reserve(self, ask: Ask, buckets: list[_Bucket], now: int) -> None:
        for bucket in buckets:
            bucket.take()
        names = ("own_requests", "own_tokens", "all_requests", "all_tokens")
        charges = {name: round(bucket.charge) for name, bucket in zip(names, buckets, strict=True)}
        self.at(f"request:{ask.request}").update(key=ask.key, at=now, cost=ask.cost, **charges)

    def _place(self, ask: Ask, now: int, *, waits: bool) -> None:
        """A place in the line, or a slot."""
        record = self.at(f"request:{ask.request}")
        record["state"] = "waiting" if waits else "leased"
        if waits:
            self.at(f"limit:{ask.key}:waiting").setdefault(ask.request, now)
            self.at(f"limit:{ask.key}:places")[ask.request] = now + ask.lease
            return
        self._leave_line(ask.key, ask.request)
        for scope in (ask.key, ALL):
            self.leases(scope)[ask.request] = now + ask.lease
        if "since" not in record:
            record["since"] = now
            self._count(ask.key, now, requests=1)

    def settle(self, settle: Settle, now: int) -> int:
        """`settle`."""
        self._leave_line(settle.key, settle.request)
        for scope in (settle.key, ALL):
            self.leases(scope).pop(settle.request, None)
        record = self.space.pop(f"{ROOT}request:{settle.request}", {})
        if not record:
            return 0
        for scope, whose in ((settle.key, "own"), (ALL, "all")):
            fields = self.at(f"limit:{scope}")
            drained = {name for name in ("requests", "tokens") if fields.get(f"{name}_full", 0) > record["at"]}
            charge = record[f"{whose}_requests"]
            if settle.never_ran and charge and "requests" not in drained:
                fields["requests"] = max(0, fields.get("requests", 0) - charge)
            charge = Fraction(record[f"{whose}_tokens"])
            back = charge - charge * settle.used / max(1, record["cost"])
            if back < 0 or (back and "tokens" not in drained):
                stored = fields.get("tokens", 0)
                after = stored - back if back > 0 else min(max(stored, now) - back, now + 2 * MINUTE)
                fields["tokens"] = max(0, math.ceil(after))
            if "since" in record:
                held = now - record["since"]
                mean = fields.get("held", held)
                fields["held"] = round(mean + Fraction(held - mean, 5))
        given, made = settle.parts
        self._count(settle.key, now, input_tokens=given, output_tokens=made, refused=int(settle.refused))
        return 1

    def renew(self, process: str, lease: int, held: Sequence[tuple[str, str, str]], now: int) -> None:
        """`renew`, of (request, key, state)."""
        self.at("apis")[process] = now
        for request, key, state in held:
            if state == "leased":
                self.leases(key)[request] = self.leases(ALL)[request] = now + lease
            elif request in self.at(f"limit:{key}:waiting"):
                self.at(f"limit:{key}:places")[request] = now + lease
