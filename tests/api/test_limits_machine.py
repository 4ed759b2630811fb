"""The limiter's scripts against the model of them, in every order that Hypothesis thinks of.

VELOCITY_LIMITS_EXAMPLES=5000 makes a long run (with --timeout 3600), which also looks for the shortest failing example.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib import resources
from typing import Any

import redis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from api.limits.rates import Rates
from tests.api.limits_model import ALL, MINUTE, NONE, ROOT, SLOTS, Answer, Ask, Model, Settle, Space

EXAMPLES = int(os.environ.get("VELOCITY_LIMITS_EXAMPLES", "0"))
KEYS = ("one", "two")
REQUESTS = tuple(f"req_{number}" for number in range(7))
OWN = (
    Rates(0, 0, 0, 1),
    Rates(0, 0, 0, 1),
    Rates(0, 0, 0, 2),
    Rates(60_000, 3, 600_000, 2),  # a request and ten tokens flow back in a ms
    Rates(7_000, 2, 0, 0),  # and what does not come out even
    Rates(7, 4, 1_300, 3),
    Rates(1, 60, 600, 0),
    Rates(),
)
EVERYBODY = (Rates(), Rates(0, 0, 0, 1), Rates(0, 0, 0, 2), Rates(90_000, 4, 700_000, 3), Rates(11, 6, 5_000, 0))
COSTS = (1, 10, 99, 600, 601, 300_000, 600_000)
DUMP = """
local out = {}
for _, key in ipairs(redis.call('KEYS', 'velocity:*')) do
  local hash = redis.call('TYPE', key).ok == 'hash'
  local content = hash and redis.call('HGETALL', key) or redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  table.insert(out, {key, redis.call('PTTL', key), content})
end
return out
"""


@dataclass(frozen=True)
class Outcome:
    """What an operation answered and left behind, and the times (µs) between which it was done."""

    reply: Any
    began: int
    ended: int
    space: Space
    lives: dict[str, int]
    """For how many ms each key is kept."""


class Store:
    """The real scripts on a real Redis, one operation at a time."""

    def __init__(self, url: str) -> None:
        self.redis = redis.Redis.from_url(url, decode_responses=True)
        folder = resources.files("api") / "lua"
        head = (folder / "prelude.lua").read_text()
        self._digests = {"dump": self.redis.script_load(DUMP)}
        for name in ("admit", "settle", "renew"):
            self._digests[name] = self.redis.script_load(head + (folder / f"{name}.lua").read_text())

    def run(self, script: str, *args: str | int) -> Outcome:
        """One script, between two looks at the clock."""
        with self.redis.pipeline(transaction=True) as pipe:
            pipe.time()
            pipe.evalsha(self._digests[script], 0, *args)
            pipe.time()
            pipe.evalsha(self._digests["dump"], 0)
            began, reply, ended, dump = pipe.execute()
        lives, space = {line[0]: line[1] for line in dump}, {line[0]: _content(line[2]) for line in dump}
        return Outcome(reply, _us(began), _us(ended), space, lives)

    def look(self) -> Outcome:
        """What is there."""
        return self.run("dump")

    def ask(self, ask: Ask) -> Answer:
        return Answer.read(self.run("admit", *ask.args).reply)

    def pass_by(self, us: int) -> None:
        """As if so much time went by (negative: as if the clock stepped back), for what the buckets hold."""
        for key in self.redis.scan_iter(f"{ROOT}limit:*", _type="HASH"):
            for field, value in self.redis.hgetall(key).items():
                if field != "held":
                    self.redis.hset(key, field, max(0, int(value) - us))


def _us(stamp: tuple[int, int]) -> int:
    return stamp[0] * 1_000_000 + stamp[1]


def _content(pairs: Sequence[str]) -> dict[str, Any]:
    numbers = [int(value) if value.isdigit() else value for value in pairs[1::2]]
    return dict(zip(pairs[::2], numbers, strict=True))


def alive(space: Space, now: int) -> Space:
    """Without what is over but not swept yet, and without what is empty."""
    model = Model(space)
    for key in KEYS:
        model.drop_dead(key, now)
    return {name: content for name, content in model.space.items() if content}


def agrees(real: Space, least: Space, most: Space) -> bool:
    """Whether the real keyspace is what the model made of it at two times around the real one.

    Fractions of a µs are rounded once per operation; nothing else may differ.
    """
    if not real.keys() == least.keys() == most.keys():
        return False
    for name, content in real.items():
        if not content.keys() == least[name].keys() == most[name].keys():
            return False
        rounded = "usage:" not in name
        for field, value in content.items():
            low, high = sorted((least[name][field], most[name][field]))
            if not (low - rounded <= value <= high + rounded if isinstance(value, int) else value == low):
                return False
    return True


class LimiterMachine(RuleBasedStateMachine):
    """Draws never depend on what came out before: the clock is real, and a repetition must draw the same."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store
        self.space: Space = {}
        self.own = dict.fromkeys(KEYS, NONE)
        self.everybody = NONE
        self.versions = dict.fromkeys(KEYS, 0)
        self.key_of: dict[str, str] = {}
        self.last = Settle(REQUESTS[0], KEYS[0])
        self.lease = self.most_waiting = 0
        self.stepped_back = False

    @initialize(
        own=st.tuples(*[st.sampled_from(OWN)] * 2), everybody=st.sampled_from(EVERYBODY),
        lease=st.sampled_from((15_000_000, 15_000_000, 4_000, 1_000)), most_waiting=st.integers(1, 4),
    )  # fmt: skip
    def begin(self, own: tuple[Rates, ...], everybody: Rates, lease: int, most_waiting: int) -> None:
        self.store.redis.flushdb()
        self.everybody, self.lease, self.most_waiting = everybody, lease, most_waiting
        for key, rates in zip(KEYS, own, strict=True):
            self.change(key, rates)
        self.space = self.store.look().space

    def change(self, key: str, rates: Rates) -> None:
        self.own[key] = rates
        self.versions[key] += 1
        self.store.redis.hset(f"{ROOT}key:{key}", "version", self.versions[key])

    @rule(
        request=st.sampled_from(REQUESTS), key=st.sampled_from(KEYS), cost=st.sampled_from(COSTS),
        may_wait=st.booleans(), version=st.sampled_from((None, 0, 0, 0, -1)),
    )  # fmt: skip
    def ask(self, request: str, key: str, cost: int, may_wait: bool, version: int | None) -> None:
        """A new request, or once more one that is admitted (its answer was lost) or waits (it polls)."""
        if record := self.space.get(f"{ROOT}request:{request}"):
            key, cost = record["key"], record["cost"]
        self.key_of[request] = key
        known = "" if version is None else str(self.versions[key] + version)
        ask = Ask(request, key, cost, self.own[key], self.everybody, may_wait, known, self.lease, self.most_waiting)
        before = self.space
        outcome = self.store.run("admit", *ask.args)
        answer = Answer.read(outcome.reply)
        now = answer.now or outcome.began
        assert outcome.began <= now <= outcome.ended
        for slack in (1, -1, 3):  # halves of a µs: a quarter of one is all that a double tells apart
            model = Model(before)
            expected = model.ask(ask, now, Fraction(slack, 2))
            if expected.agrees(answer) and self.is_now(outcome, model, model):
                break
        else:
            raise AssertionError(f"{ask} at {now}: {answer}\nbefore {before}\nafter {outcome.space}\nor {model.space}")
        self.check_answer(ask, answer, alive(before, now))

    @rule(request=st.sampled_from(REQUESTS), key=st.sampled_from(KEYS))
    def stand_in_line(self, request: str, key: str) -> None:
        """The most usual of all: something small that may wait."""
        self.ask(request, key, 1, may_wait=True, version=0)

    def check_answer(self, ask: Ask, answer: Answer, before: Space) -> None:
        """What the answer promises, without asking the model how it came about."""
        request, after = f"{ROOT}request:{ask.request}", alive(self.space, answer.now)
        line, leases = Model(before).line(ask.key), Model(before).leases
        if answer.verdict == "admitted" and ask.request not in leases(ask.key):
            ahead = line.index(ask.request) if ask.request in line else len(line)
            for scope, slots in ((ask.key, ask.own.concurrency), (ALL, ask.everybody.concurrency)):
                assert not slots or len(leases(scope)) + ahead < slots, "it took a slot of those who came before"
                assert not slots or len(Model(after).leases(scope)) <= slots
        if answer.verdict == "refused":
            changed = {name for name in after | before if after.get(name) != before.get(name)}
            cut = {name for name in changed if name in {f"{ROOT}limit:{ask.key}", f"{ROOT}limit:{ALL}"}}
            assert len(changed - cut) == 1
            assert all(after[name][field] <= before[name][field] for name in cut for field in before[name])
            assert request not in after
        if answer.verdict == "refused" and answer.reason not in SLOTS | {"never_fits"}:
            then = Model(self.space).ask(ask, answer.now + int(answer.wait), slack=Fraction(1))
            assert then.verdict != "refused" or then.reason in SLOTS, f"{ask} {answer}: not even then, {then}"

    @rule(
        request=st.sampled_from(REQUESTS), key=st.sampled_from(KEYS), used=st.sampled_from((0, 1, 50, 700, 2_000_000)),
        never_ran=st.booleans(), refused=st.booleans(),
    )  # fmt: skip
    def settle(self, request: str, key: str, used: int, never_ran: bool, refused: bool) -> None:
        self.last = Settle(request, self.key_of.get(request, key), used, never_ran, refused)
        self.settle_again()

    @rule()
    def settle_again(self) -> None:
        models = Model(self.space), Model(self.space)
        outcome = self.store.run("settle", *self.last.args)
        for model, now in zip(models, (outcome.began, outcome.ended), strict=True):
            assert model.settle(self.last, now) == outcome.reply
        assert self.is_now(outcome, *models)

    @rule(chosen=st.sets(st.sampled_from(REQUESTS)))
    def renew(self, chosen: set[str]) -> None:
        """Also of what is settled already: it comes back, and is settled once more by who renewed it."""
        held = []
        for request in sorted(chosen & self.key_of.keys()):
            record = self.space.get(f"{ROOT}request:{request}", {})
            held.append((request, self.key_of[request], str(record.get("state", "leased"))))
        args = [part for one in held for part in one]
        known = [part for key in KEYS for part in (key, self.versions[key] - (key == "two"))]
        outcome = self.store.run("renew", "process", self.lease, len(held), *args, *known)
        assert outcome.reply == [1, "two"]
        model = Model(self.space)
        model.renew("process", self.lease, held, outcome.space[f"{ROOT}apis"]["process"])
        assert self.is_now(outcome, model, model)

    @rule(ms=st.integers(1, 6))
    def rest(self, ms: int) -> None:
        time.sleep(ms / 1000)

    @rule(us=st.sampled_from((60_000, 300_000, MINUTE, 11 * MINUTE)))
    def pass_by(self, us: int) -> None:
        self.store.pass_by(us)
        self.space = self.store.look().space

    @rule(what=st.sampled_from(("new terms", "unsettled", "lost", "clock")), key=st.sampled_from(KEYS),
          rates=st.sampled_from(OWN), request=st.sampled_from(REQUESTS))  # fmt: skip
    def mishap(self, what: str, key: str, rates: Rates, request: str) -> None:
        """What ends a line too soon to be among the other rules: one rule, so that it is drawn seldom."""
        if what == "new terms":
            self.change(key, rates)
        elif what == "unsettled":  # for longer than a reservation is kept
            self.store.redis.delete(f"{ROOT}request:{request}")
        elif what == "lost":  # by Redis: all that it knew of a key
            self.store.redis.delete(*(f"{ROOT}limit:{key}{name}" for name in ("", ":leases", ":waiting", ":places")))
        else:
            self.store.pass_by(-60 * MINUTE)
            self.stepped_back = True
        self.space = self.store.look().space

    def is_now(self, outcome: Outcome, *models: Model) -> bool:
        """Whether the models are what is there; if so, all goes on from there."""
        spaces = (outcome.space, models[0].space, models[-1].space)
        real, least, most = (alive(space, outcome.ended) for space in spaces)
        if not agrees(real, least, most):
            return False
        for scope in (*KEYS, ALL) if not self.stepped_back else ():
            name = f"{ROOT}limit:{scope}"
            for field in {"requests", "tokens"} & real.get(name, {}).keys():
                assert outcome.lives[name] * 1000 >= real[name][field] - outcome.ended, "it is forgotten too soon"
        self.space = outcome.space
        return True


def test_every_order_of_operations(clean_redis: str) -> None:
    store = Store(clean_redis)

    class OnThisRedis(LimiterMachine):
        def __init__(self) -> None:
            super().__init__(store)

    phases = [phase for phase in Phase if EXAMPLES or phase is not Phase.shrink]
    run_state_machine_as_test(
        OnThisRedis,
        settings=settings(
            max_examples=EXAMPLES or 200, stateful_step_count=50, deadline=None, phases=phases,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
    store.redis.close()
