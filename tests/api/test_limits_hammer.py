"""Limits against the clock: waits that are true, buckets that nothing forgets, and eight processes on one Redis."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from api.limits.rates import Rates
from bench.limits.hammer import Load, Spent, excess, hold, processes, spend
from tests.api.limits_model import MINUTE, ROOT, Ask, Settle
from tests.api.test_limits_machine import Store

KEYS = ("one", "two", "three", "four")
Run = Callable[[Callable[[Load, int], Any], Load], list[Any]]


@pytest.fixture
def store(clean_redis: str) -> Iterator[Store]:
    opened = Store(clean_redis)
    yield opened
    opened.redis.close()


@pytest.mark.parametrize(
    ("own", "cost", "reason"),
    [
        (Rates(600, 1), 1, "requests"),
        (Rates(7_000, 3), 1, "requests"),  # what does not come out even in µs
        (Rates(60_000, 1), 1, "requests"),
        (Rates(tpm=600_000), 200, "tokens"),
        (Rates(tpm=7_000_000), 1_999, "tokens"),
    ],
)
def test_waiting_exactly_as_long_as_told_is_enough(store: Store, own: Rates, cost: int, reason: str) -> None:
    if own.tpm:
        assert store.ask(Ask("all", "one", own.tpm, own)).verdict == "admitted"
    for turn in range(15):
        for number in range(own.burst + 2):
            answer = store.ask(Ask(f"{turn}-{number}", "one", cost, own))
            if answer.verdict == "refused":
                assert answer.reason == reason
                time.sleep(float(answer.wait) / 1e6)
                assert store.ask(Ask(f"{turn}-again", "one", cost, own)).verdict == "admitted"
                break


def a_debt(store: Store) -> Rates:
    """It used five times what it reserved."""
    own = Rates(tpm=1_000)
    store.ask(Ask("a", "one", 1_000, own))
    store.run("settle", *Settle("a", "one", used=5_000).args)
    return own


def a_clock_that_stepped_back(store: Store) -> Rates:
    own = Rates(60, 5)
    store.ask(Ask("a", "one", 1, own))
    store.pass_by(-60 * MINUTE)
    return own


def a_lower_limit(store: Store) -> Rates:
    for number in range(100):
        store.ask(Ask(f"a{number}", "one", 1, Rates(60, 100)))
    return Rates(60, 5)


@pytest.mark.parametrize("happened", [a_debt, a_clock_that_stepped_back, a_lower_limit])
def test_nothing_locks_out_for_longer_than_told(store: Store, happened: Callable[[Store], Rates]) -> None:
    own = happened(store)
    answer = store.ask(Ask("b", "one", 1, own))
    assert answer.verdict == "refused"
    assert answer.wait < 1.5 * MINUTE
    store.pass_by(int(answer.wait))
    assert store.ask(Ask("b", "one", 1, own)).verdict == "admitted"


def test_what_has_flowed_back_is_not_given_back_once_more(store: Store) -> None:
    """Reservations of five minutes, none of which was used, make no sixfold minute."""
    own = Rates(tpm=60_000)
    for number in range(5):
        assert store.ask(Ask(f"old{number}", "one", 60_000, own)).verdict == "admitted"
        store.pass_by(MINUTE)
    admitted = 0
    for number in range(6):
        admitted += store.ask(Ask(f"new{number}", "one", 60_000, own)).verdict == "admitted"
        store.run("settle", *Settle(f"old{number}", "one", used=0).args)
    assert admitted == 1


def test_what_takes_an_hour_to_flow_back_is_kept_for_an_hour(store: Store) -> None:
    """Though the tokens, in the same hash, are all back within two minutes."""
    for number in range(60):
        assert store.ask(Ask(f"a{number}", "one", 1, Rates(1, 60, 600))).verdict == "admitted"
    assert store.look().lives[f"{ROOT}limit:one"] > 60 * 60_000


def test_nobody_overtakes_who_waits_for_everybodys_slots(store: Store) -> None:
    own, everybody = Rates(concurrency=5), Rates(concurrency=1)
    verdicts = [store.ask(Ask(name, "one", 1, own, everybody, may_wait=True)).verdict for name in ("a", "b")]
    store.run("settle", *Settle("a", "one").args)
    verdicts += [store.ask(Ask(name, "one", 1, own, everybody, may_wait=True)).verdict for name in ("c", "b")]
    assert verdicts == ["admitted", "waiting", "waiting", "admitted"]


def test_who_was_cut_off_for_longer_than_the_lease_waits_again(store: Store) -> None:
    """Its answer was lost, and by the time that it asks again somebody else has its slot. It does not pay twice."""
    own = Rates(60, 3, concurrency=1)
    late = Ask("a", "one", 1, own, may_wait=True, lease=2_000)
    assert store.ask(late).verdict == "admitted"
    time.sleep(0.005)
    assert store.ask(Ask("b", "one", 1, own)).verdict == "admitted"
    assert (store.ask(late).verdict, store.ask(late).reason) == ("waiting", "concurrency")
    store.run("settle", *Settle("b", "one").args)
    before = store.look().space[f"{ROOT}limit:one"]["requests"]
    assert store.ask(late).verdict == "admitted"
    space = store.look().space
    assert space[f"{ROOT}limit:one"]["requests"] == before
    assert next(content for name, content in space.items() if "usage:" in name)["requests"] == 2


@pytest.fixture(scope="module")
def eight() -> Iterator[Run]:
    """Eight processes, which start once."""
    with processes(8) as run:
        yield run


def of(found: list[tuple[list[Spent], int, int]], key: str) -> list[Spent]:
    return [one for spent, _, _ in found for one in spent if one.key == key]


def seconds(found: list[tuple[list[Spent], int, int]]) -> float:
    """From the first question to the last, by Redis's clock."""
    return (max(last for _, _, last in found) - min(first for _, first, _ in found)) / 1e6


def test_eight_processes_get_no_request_more_than_the_limit(clean_redis: str, eight: Run) -> None:
    """In no stretch of time, however it is cut: per key and for all keys."""
    own, everybody = Rates(3_000, 10), Rates(9_000, 30)
    found = eight(spend, Load(clean_redis, own, everybody, KEYS, seconds=1.2))
    times = [[one.at for one in of(found, key)] for key in KEYS]
    for each in times:
        assert excess(each, own.rpm, own.burst) < 0.01
        assert len(each) <= own.burst + own.rpm / 60 * seconds(found) + 1
    together = [at for each in times for at in each]
    assert excess(together, everybody.rpm, everybody.burst) < 0.01
    assert len(together) > 0.5 * (everybody.burst + everybody.rpm / 60 * seconds(found))


def test_eight_processes_get_no_token_more_than_the_limit(clean_redis: str, eight: Run) -> None:
    own = Rates(tpm=60_000)
    found = eight(spend, Load(clean_redis, own, keys=KEYS[:2], seconds=1.5, most_cost=400))
    for key in KEYS[:2]:
        used, allowed = sum(one.tokens for one in of(found, key)), own.tpm + own.tpm / 60 * seconds(found)
        assert 0.5 * allowed < used <= allowed


def test_eight_processes_hold_no_slot_more_than_there_are(clean_redis: str, eight: Run, store: Store) -> None:
    """Though some are never given back: those are free again when their lease is over."""
    own, everybody = Rates(concurrency=3), Rates(concurrency=5)
    load = Load(clean_redis, own, everybody, KEYS[:2], seconds=1.5, lease_us=300_000)
    got = sum(eight(hold, load))
    most = {scope: int(held) for scope, held in store.redis.hgetall("hammer:most").items()}
    assert most.keys() == {"one", "two", "all"}
    assert 2 <= most["one"] <= 3
    assert 2 <= most["two"] <= 3
    assert 3 <= most["all"] <= 5
    assert got > 20
    time.sleep(0.4)
    assert store.ask(Ask("last", "one", 1, Rates(concurrency=1), Rates(concurrency=1))).verdict == "admitted"
