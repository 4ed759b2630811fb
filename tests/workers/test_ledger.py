"""The ledger's scripts on a real Redis: leases, epochs, replays, cancellation, deadlines."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import cast

import pytest
from redis.asyncio import Redis

from workers.errors import LedgerUnavailable, NoSuchJob
from workers.job import FINAL, LANE, JobSpec, JobStatus, Lease, Outcome, Record, new_id
from workers.ledger import Ledger, Verdict
from workers.redis import connect

TENANT = new_id("tenant")
LEASE = 5.0


def spec(total: int, *, tenant: str = TENANT, deadline: int | None = None) -> JobSpec:
    return JobSpec(
        id=new_id("job"), tenant=tenant, endpoint="/v1/chat/completions", model="tiny", total=total, shard_items=8,
        created=time.time(), deadline=deadline,
    )  # fmt: skip


def ended(completed: int = 0, failed: int = 0, status: JobStatus = JobStatus.COMPLETED) -> Outcome:
    return Outcome(status=status, at=1, completed=completed, failed=failed)


def records(lease: Lease, count: int | None = None, *, failed: bool = False) -> list[Record]:
    error = {"code": "x", "message": "y"} if failed else None
    usage = {"usage": {"prompt_tokens": 2, "completion_tokens": 3}}
    indices = range(lease.first, lease.first + (lease.count if count is None else count))
    return [Record(index, str(index), 200, "r", None if failed else usage, error) for index in indices]


async def claimed(ledger: Ledger, lane: str = LANE) -> Lease:
    lease = await ledger.claim(LEASE, lane)
    assert lease is not None
    return lease


async def test_a_job_from_submission_to_completion(ledger: Ledger) -> None:
    job = spec(12)
    assert await ledger.submit(job)
    state = await ledger.job(TENANT, job.id)
    assert (state.status, state.total) == (JobStatus.QUEUED, 12)
    first, second = await claimed(ledger), await claimed(ledger)
    assert [(lease.first, lease.count) for lease in (first, second)] == [(0, 8), (8, 4)]
    assert await ledger.claim(LEASE) is None
    assert (await ledger.job(TENANT, job.id)).status is JobStatus.IN_PROGRESS
    assert await ledger.commit(first, records(first, 3), 30, LEASE) is Verdict.GO
    assert await ledger.finished_prefix(job.id, 12) == 3
    assert await ledger.commit(first, records(first), 80, LEASE) is Verdict.CLOSED
    assert await ledger.commit(second, records(second, failed=True), 40, LEASE) is Verdict.CLOSED
    state = await ledger.job(TENANT, job.id)
    assert (state.status, state.completed, state.failed) == (JobStatus.FINALIZING, 8, 4)
    assert (state.input_tokens, state.output_tokens) == (6 + 16, 9 + 24)
    final = await claimed(ledger, FINAL)
    assert final.final
    assert await ledger.finalize(final, ended(8, 4)) == "completed"
    assert await ledger.finalize(final, ended(8, 4)) == "completed"
    assert (await ledger.job(TENANT, job.id)).status.terminal
    assert not any((await ledger.sweep()).pending.values())


async def test_replayed_calls_change_nothing(ledger: Ledger) -> None:
    job = spec(8)
    assert await ledger.submit(job) == job.id
    assert await ledger.submit(job) == job.id
    lease = await claimed(ledger)
    assert await ledger.commit(lease, records(lease, 2), 20, LEASE) is Verdict.GO
    assert await ledger.commit(lease, records(lease, 2), 20, LEASE) is Verdict.GO
    state = await ledger.job(TENANT, job.id)
    assert (state.completed, state.output_tokens) == (2, 6)
    assert await ledger.commit(lease, records(lease), 80, LEASE) is Verdict.CLOSED
    assert await ledger.commit(lease, records(lease), 80, LEASE) is Verdict.CLOSED
    assert (await ledger.job(TENANT, job.id)).completed == 8


async def test_a_lost_lease_goes_to_another_and_its_commits_are_refused(ledger: Ledger) -> None:
    job = spec(8)
    await ledger.submit(job)
    frozen = await ledger.claim(0.05)
    assert frozen is not None
    await ledger.commit(frozen, records(frozen, 2), 20, 0.05)
    await asyncio.sleep(0.1)
    assert (await ledger.sweep()).back == 1
    successor = await claimed(ledger)
    assert successor.epoch == frozen.epoch + 1
    assert successor.done == {0, 1}
    assert await ledger.commit(frozen, records(frozen), 80, LEASE) is Verdict.STALE
    assert not await ledger.release(frozen)
    assert (await ledger.job(TENANT, job.id)).completed == 2
    thief = replace(successor, owner="someone")
    assert await ledger.commit(thief, records(thief), 80, LEASE) is Verdict.STALE


async def test_a_released_shard_is_claimed_again_at_once(ledger: Ledger) -> None:
    await ledger.submit(spec(8))
    lease = await claimed(ledger)
    assert await ledger.release(lease)
    assert not await ledger.release(lease)
    assert (await claimed(ledger)).epoch == 2


async def test_cancel_stops_what_is_pending_and_tells_what_runs(ledger: Ledger) -> None:
    job = spec(24)
    await ledger.submit(job)
    lease = await claimed(ledger)
    assert await ledger.cancel(job.id)
    assert not await ledger.cancel(job.id)
    assert (await ledger.job(TENANT, job.id)).status is JobStatus.CANCELLING
    assert await ledger.claim(LEASE) is None
    assert await ledger.commit(lease, records(lease, 1), 10, LEASE) is Verdict.STOP
    assert await ledger.release(lease)
    final = await claimed(ledger, FINAL)
    assert final.final
    assert await ledger.finalize(final, ended(1, status=JobStatus.CANCELLED)) == "cancelled"
    state = await ledger.job(TENANT, job.id)
    assert (state.status, state.completed) == (JobStatus.CANCELLED, 1)


async def test_a_deadline_expires_the_job(ledger: Ledger) -> None:
    job = spec(8, deadline=int(time.time()) - 1)
    await ledger.submit(job)
    assert (await ledger.sweep()).expired == 1
    final = await claimed(ledger, FINAL)
    assert await ledger.finalize(final, ended(status=JobStatus.EXPIRED)) == "expired"


async def test_a_crashed_finalizer_is_followed_by_another(ledger: Ledger) -> None:
    await ledger.submit(spec(8))
    lease = await claimed(ledger)
    await ledger.commit(lease, records(lease), 80, LEASE)
    crashed = await ledger.claim(0.05, FINAL)
    assert crashed is not None
    await asyncio.sleep(0.1)
    await ledger.sweep()
    successor = await claimed(ledger, FINAL)
    assert successor.final
    assert await ledger.finalize(crashed, ended(8)) == "stale"
    assert await ledger.finalize(successor, ended(8)) == "completed"


async def test_a_small_job_need_not_wait_for_a_large_one(ledger: Ledger) -> None:
    large, small = spec(800), spec(8, tenant=new_id("tenant"))
    await ledger.submit(large)
    for _ in range(3):
        await claimed(ledger)
    await ledger.submit(small)
    assert small.id in {(await claimed(ledger)).job for _ in range(2)}


async def test_other_tenants_see_nothing(ledger: Ledger) -> None:
    job = spec(8)
    await ledger.submit(job)
    with pytest.raises(NoSuchJob):
        await ledger.job(new_id("tenant"), job.id)
    assert await ledger.jobs(new_id("tenant"), 10, None) == []


async def test_listing_goes_by_pages(ledger: Ledger) -> None:
    ids = []
    for _ in range(5):
        job = spec(1)
        ids.append(job.id)
        await ledger.submit(job)
        await asyncio.sleep(0.002)
    newest = list(reversed(ids))
    first = await ledger.jobs(TENANT, 2, None)
    rest = await ledger.jobs(TENANT, 10, first[-1].id)
    assert [job.id for job in [*first, *rest]] == newest
    with pytest.raises(NoSuchJob):
        await ledger.jobs(TENANT, 2, new_id("job"))


async def test_workers_count_while_they_beat(ledger: Ledger) -> None:
    assert await ledger.beat() == 0
    assert await ledger.beat("a", 15) == 1
    assert await ledger.beat("b", 15) == 2
    assert await ledger.beat("a", 0) == 1


async def test_nothing_of_a_finished_job_stays_but_its_record(ledger: Ledger, redis: Redis) -> None:
    job = spec(8)
    await ledger.submit(job)
    lease = await claimed(ledger)
    await ledger.commit(lease, records(lease), 80, LEASE)
    await ledger.finalize(await claimed(ledger, FINAL), ended(8))
    left = set(await redis.keys(f"*{job.id}*"))
    assert left == {f"velocity:job:{job.id}".encode()}
    assert await ledger.queued() == 0
    assert await ledger.forget(TENANT, job.id) == "gone"
    assert await ledger.forget(TENANT, job.id) == "gone"
    lasting = {b"velocity:pending:bulk|clock", b"velocity:pending:final|clock", b"velocity:sequence", b"velocity:bulk"}
    kept = {
        key for key in cast("list[bytes]", await redis.keys("*")) if b":claim:" not in key and b":usage:" not in key
    }
    assert {key for key in kept if TENANT.encode() not in key and not key.endswith((b"|tags", b":pending"))} == lasting


async def test_a_redis_that_is_away_is_one_kind_of_error() -> None:
    nowhere = connect("redis://127.0.0.1:9/0", 0.5)
    with pytest.raises(LedgerUnavailable):
        await Ledger(nowhere).claim(1)
    await nowhere.aclose()
