"""Who is next: fairness between tenants and accounts, priority, quarantine; and what a job may not do twice."""

from __future__ import annotations

import asyncio
import time

import pytest
from redis.asyncio import Redis

from workers.errors import IdempotencyConflict, QuotaExceeded
from workers.job import FINAL, LANE, QUARANTINE, BulkQuota, JobSpec, JobStatus, Lease, Outcome, Record, new_id
from workers.ledger import Ledger, Verdict

TENANT = new_id("tenant")
LEASE = 5.0


def spec(total: int = 8, tenant: str = TENANT, account: str = "a", **more: object) -> JobSpec:
    fields = {
        "id": new_id("job"), "tenant": tenant, "account": account, "endpoint": "/v1/chat/completions", "model": "tiny",
        "total": total, "shard_items": 8, "created": time.time(), **more,
    }  # fmt: skip
    return JobSpec.model_validate(fields)


async def submitted(ledger: Ledger, *specs: JobSpec) -> None:
    for job in specs:
        await ledger.submit(job)


async def claims(ledger: Ledger, count: int) -> list[Lease]:
    found = [await ledger.claim(LEASE) for _ in range(count)]
    return [lease for lease in found if lease]


def results(lease: Lease, *, failed: int = 0) -> list[Record]:
    error = {"code": "x", "message": "y"}
    return [
        Record(index, str(index), 200, "r", error=error if index - lease.first < failed else None)
        for index in range(lease.first, lease.first + lease.count)
    ]


async def test_tenants_share_and_their_accounts_share_the_tenants_part(ledger: Ledger) -> None:
    many, other = spec(8 * 40, account="many"), spec(8 * 40, account="few")
    alone = spec(8 * 40, tenant=new_id("tenant"))
    await submitted(ledger, many, other, alone)
    found = [lease.job for lease in await claims(ledger, 40)]
    assert [found.count(job.id) for job in (many, other, alone)] == [10, 10, 20]


async def test_time_away_is_not_saved_up(ledger: Ledger) -> None:
    large, late = spec(8 * 100), spec(8 * 100, tenant=new_id("tenant"))
    await submitted(ledger, large)
    await claims(ledger, 50)
    await submitted(ledger, late)
    found = [lease.job for lease in await claims(ledger, 20)]
    assert found.count(late.id) in {10, 11}


async def test_a_higher_priority_goes_first_among_the_accounts_own_jobs_only(ledger: Ledger) -> None:
    low, high, first = spec(16, priority=-100), spec(16, priority=100), spec(16)
    foreign = spec(16, account="b", priority=100)
    await submitted(ledger, first, low, high, foreign)
    found = [lease.job for lease in await claims(ledger, 8)]
    assert [job for job in found if job != foreign.id] == [high.id] * 2 + [first.id] * 2 + [low.id] * 2
    assert found.count(foreign.id) == 2
    assert foreign.id in found[:2]


async def test_accounts_that_a_worker_is_busy_with_are_passed_over(ledger: Ledger) -> None:
    await submitted(ledger, spec(80), small := spec(8, account="b"))
    (lease,) = await claims(ledger, 1)
    assert lease.flow == f"{TENANT}/a"
    other = await ledger.claim(LEASE, LANE, [lease.flow])
    assert other is not None
    assert other.job == small.id
    assert await ledger.claim(LEASE, LANE, [lease.flow, other.flow]) is None
    assert len(await claims(ledger, 9)) == 9


async def test_a_shard_that_takes_three_workers_along_goes_to_quarantine_and_its_poison_is_found(
    ledger: Ledger,
) -> None:
    job = spec(8)
    await ledger.submit(job)
    for _ in range(3):
        assert await ledger.claim(0.02) is not None
        await asyncio.sleep(0.05)
        await ledger.sweep()
    assert await ledger.claim(LEASE) is None
    for died in range(2):
        lease = await ledger.claim(0.05, QUARANTINE)
        assert lease is not None
        assert lease.lane == QUARANTINE
        assert await ledger.begin(lease, 3) == died
        assert await ledger.begin(lease, 3) == died, "a replay counted"
        await asyncio.sleep(0.1)
        await ledger.sweep()
        assert await ledger.begin(lease, 3) is None
    lease = await ledger.claim(LEASE, QUARANTINE)
    assert lease is not None
    assert await ledger.begin(lease, 3) == 2
    poison = Record(3, "3", 0, "r", error={"code": "worker_crashed", "message": "x"})
    assert await ledger.commit(lease, [poison], 10, LEASE) is Verdict.GO
    assert await ledger.release(lease, "cured")
    (lease,) = await claims(ledger, 1)
    assert lease.lane == LANE
    assert lease.done == {3}


async def test_a_worker_that_ends_softly_in_quarantine_leaves_no_death_behind(ledger: Ledger) -> None:
    await ledger.submit(spec(8))
    for _ in range(3):
        (lease,) = await claims(ledger, 1)
        await ledger.release(lease, "crashed")
    for _ in range(4):
        quarantined = await ledger.claim(LEASE, QUARANTINE)
        assert quarantined is not None
        assert await ledger.begin(quarantined, 0) == 0
        assert await ledger.release(quarantined)


async def test_a_job_stops_when_more_fail_than_its_owner_allows(ledger: Ledger) -> None:
    job = spec(80, max_error_rate=0.05)
    await ledger.submit(job)
    one, two = await claims(ledger, 2)
    assert await ledger.commit(one, results(one, failed=4), 10, LEASE) is Verdict.CLOSED
    assert (await ledger.job(TENANT, job.id)).status is JobStatus.IN_PROGRESS
    assert await ledger.commit(two, results(two, failed=1), 10, LEASE) is Verdict.CLOSED
    state = await ledger.job(TENANT, job.id)
    assert (state.status, state.outcome, state.failed) == (JobStatus.FINALIZING, "failed", 5)
    final = await ledger.claim(LEASE, FINAL)
    assert final is not None
    outcome = Outcome(status=JobStatus.FAILED, at=1, completed=11, failed=5)
    assert await ledger.finalize(final, outcome) == "failed"
    assert (await ledger.bulk())[0] == 0


async def test_the_same_idempotency_key_is_the_same_job_until_it_is_deleted(ledger: Ledger) -> None:
    first = spec(8, idempotency="k", digest="d")
    again, other = (spec(8, idempotency="k", digest=digest) for digest in ("d", "e"))
    room = BulkQuota(jobs=1)
    assert await ledger.require_room(first, room) is None
    assert await ledger.submit(first, room) == first.id
    assert await ledger.require_room(again, room) == first.id
    assert await ledger.submit(again, room) == first.id
    with pytest.raises(IdempotencyConflict):
        await ledger.submit(other, room)
    with pytest.raises(QuotaExceeded):
        await ledger.submit(spec(8), room)
    assert await ledger.submit(spec(8, tenant=new_id("tenant"), idempotency="k", digest="e"), room)
    await ledger.cancel(first.id)
    assert await ledger.forget(TENANT, first.id) == "finalizing"
    final = await ledger.claim(LEASE, FINAL)
    assert final is not None
    await ledger.finalize(final, Outcome(status=JobStatus.CANCELLED, at=1))
    assert await ledger.forget(TENANT, first.id) == "gone"
    assert await ledger.submit(other, room) == other.id


async def test_what_waits_is_counted_and_so_is_how_fast_it_goes(ledger: Ledger, redis: Redis) -> None:
    job = spec(80)
    await ledger.submit(job)
    assert await ledger.bulk() == (80, None)
    (lease,) = await claims(ledger, 1)
    await ledger.commit(lease, results(lease), 10, LEASE)
    assert await ledger.queued() == 72
    assert (await ledger.job(TENANT, job.id)).rate is None, "nobody can know after one commit"
    ago = int((time.time() - 20) * 1000)
    await redis.hset(f"velocity:job:{job.id}", mapping={"recent_since": ago, "recent_at": ago, "recent": 20})
    rate = (await ledger.job(TENANT, job.id)).rate
    assert rate is not None
    assert 0.7 < rate < 1.1, "20 items in 20 s, 20 s ago"


async def test_redis_holds_little_of_a_large_job(ledger: Ledger, redis: Redis) -> None:
    before = (await redis.info("memory"))["used_memory"]
    job = spec(50_000, shard_items=128)
    await ledger.submit(job)
    while lease := await ledger.claim(LEASE):
        await ledger.commit(lease, results(lease)[:-1], 100_000, LEASE)
    used = (await redis.info("memory"))["used_memory"] - before
    assert used < 400_000
