"""What workers and the api know of each other's work at the engine, on each version of Redis."""

from __future__ import annotations

from redis.asyncio import Redis

from tests.workers.people import Api
from workers import redis_keys
from workers.ledger import Ledger
from workers.window import Tally


async def test_what_workers_have_at_the_engine_is_known_while_they_live(ledger: Ledger, redis: Redis) -> None:
    tally = Tally(in_flight=7, given_back=3, wasted=1.5)
    await ledger.beat("a", 60, tally=tally)
    await ledger.beat("a", 60, tally=tally)
    await ledger.beat("b", 60, "quarantine", Tally(in_flight=1))
    now = await ledger.at_engine()
    assert (now.workers, now.requests) == (1, 8)
    assert await ledger.given_back() == (3, 1.5)
    await redis.hincrby(redis_keys.worker("b"), "at", -6000)  # frozen
    assert (await ledger.at_engine()).requests == 7
    await ledger.beat("a", 0, tally=Tally(given_back=4, wasted=2.0))
    now = await ledger.at_engine()
    assert (now.workers, now.requests) == (0, 0)
    assert await ledger.given_back() == (4, 2.0)


async def test_people_are_those_with_a_slot(ledger: Ledger, redis: Redis) -> None:
    api = Api(redis)
    await api.falls_silent(1)
    await api.people(2)
    seconds, _ = await redis.time()
    await redis.zadd(redis_keys.leases("all"), {"dead": (seconds - 1) * 1_000_000})
    people = await ledger.people()
    assert people.requests == 2
    assert people.silence is not None
    assert people.silence >= 1
    await redis.delete(redis_keys.APIS)
    assert (await ledger.people()).silence is None
