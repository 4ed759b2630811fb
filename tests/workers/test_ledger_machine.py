"""The ledger's scripts against a model of them, in every order that Hypothesis thinks of, calls replayed at random.

VELOCITY_LEDGER_EXAMPLES=5000 makes a long run (with --timeout 3600), which also looks for the shortest failing example.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from redis.asyncio import Redis

from workers.job import FINAL, LANE, QUARANTINE, JobSpec, JobStatus, Lease, Outcome, Record, new_id
from workers.ledger import Ledger, Verdict
from workers.redis import connect

T = TypeVar("T")
EXAMPLES = int(os.environ.get("VELOCITY_LEDGER_EXAMPLES", "0"))
TENANTS = tuple(new_id("tenant") for _ in range(2))
SHARD = 8
LONG = 3600.0


class Replayed(Ledger):
    """A ledger whose calls reach Redis once or twice; the second answer counts."""

    twice = False

    async def _run(self, name: str, *args: str | float | bytes) -> Any:
        if self.twice and name != "sweep":
            await super()._run(name, *args)
        return await super()._run(name, *args)


@dataclass
class ModelJob:
    """What must be true of a job."""

    spec: JobSpec
    done: dict[int, bool] = field(default_factory=dict)
    """Items with a result, and whether they completed."""
    stopped: str | None = None
    """What it will end as, if not completed."""
    over: str | None = None
    lengths: dict[str, int] = field(default_factory=dict)


@dataclass
class Held:
    """A lease as its owner sees it, and whether it still counts."""

    lease: Lease
    valid: bool = True


async def emptied(redis: Redis) -> None:
    await redis.flushall()


async def keys_left(redis: Redis) -> int:
    """Quota still in use."""
    return await redis.exists(*(f"velocity:tenant:{tenant}:bulk" for tenant in TENANTS))


class LedgerMachine(RuleBasedStateMachine):
    """Submissions, claims, commits, lost leases, cancellations, in any order."""

    def __init__(self, redis: Redis, run: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        super().__init__()
        self.run = run
        self.redis = redis
        run(emptied(redis))
        self.ledger = Replayed(redis)
        self.jobs: dict[str, ModelJob] = {}
        self.held: list[Held] = []

    def call(self, work: Coroutine[Any, Any, T], *, twice: bool) -> T:
        """One operation, replayed or not."""
        self.ledger.twice = twice
        try:
            result: T = self.run(work)
        finally:
            self.ledger.twice = False
        return result

    def make_due(self, what: str, entry: str) -> None:
        """Its time is over now."""

        async def zadd() -> None:
            await self.redis.zadd(f"velocity:{what}", {entry: 1})

        self.run(zadd())

    @rule(
        tenant=st.sampled_from(TENANTS), account=st.sampled_from("ab"), total=st.integers(1, 20),
        priority=st.sampled_from((-100, 0, 7)), most=st.sampled_from((None, 0.0, 0.3)), late=st.booleans(),
        twice=st.booleans(),
    )  # fmt: skip
    def submit(
        self, tenant: str, account: str, total: int, priority: int, most: float | None, *, late: bool, twice: bool
    ) -> None:
        spec = JobSpec(
            id=new_id("job"), tenant=tenant, account=account, endpoint="/", model="m", total=total, shard_items=SHARD,
            created=time.time(), priority=priority, max_error_rate=most,
            deadline=int(time.time() + 3600) if late else None,
        )  # fmt: skip
        assert self.call(self.ledger.submit(spec), twice=twice) == spec.id
        self.jobs[spec.id] = ModelJob(spec)

    @rule(lane=st.sampled_from((LANE, LANE, LANE, QUARANTINE, FINAL)), twice=st.booleans())
    def claim(self, lane: str, *, twice: bool) -> None:
        lease = self.call(self.ledger.claim(LONG, lane), twice=twice)
        if lease is None:
            return
        job = self.jobs[lease.job]
        assert not any(
            held.valid and (held.lease.job, held.lease.unit) == (lease.job, lease.unit) for held in self.held
        ), "two hold one unit"
        expected = {index for index in job.done if lease.first <= index < lease.first + lease.count}
        assert set(lease.done) == expected
        assert (lease.unit == FINAL) == (lane == FINAL)
        assert not job.over
        assert lease.unit == FINAL or not job.stopped
        self.held.append(Held(lease))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), twice=st.booleans())
    def commit(self, data: st.DataObject, *, twice: bool) -> None:
        held = data.draw(st.sampled_from(self.held))
        lease, job = held.lease, self.jobs[held.lease.job]
        if lease.final:
            return
        span = range(lease.first, lease.first + lease.count)
        indices = data.draw(st.lists(st.sampled_from(span), unique=True))
        records = [
            Record(i, str(i), 200, "r", error=None if data.draw(st.integers(0, 5)) else {"code": "c", "message": "m"})
            for i in indices
        ]
        length = job.lengths.get(lease.segment, 0) + len(records)
        verdict = self.call(self.ledger.commit(lease, records, length, LONG), twice=twice)
        if not held.valid:
            whole = all(index in job.done for index in span)
            assert verdict is Verdict.STALE or (verdict is Verdict.CLOSED and (whole or not records)), verdict
            return
        job.lengths[lease.segment] = length
        for record in records:
            job.done.setdefault(record.index, record.ok)
        failed = sum(not ok for ok in job.done.values())
        limit = job.spec.max_error_rate
        if records and limit is not None and not job.stopped and failed > int(limit * job.spec.total):
            job.stopped = "failed"
        if all(index in job.done for index in span):
            assert verdict is Verdict.CLOSED
            held.valid = False
        else:
            assert verdict is (Verdict.STOP if job.stopped else Verdict.GO)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), how=st.sampled_from(("idle", "crashed", "cured")), twice=st.booleans())
    def release(self, data: st.DataObject, how: Any, *, twice: bool) -> None:
        held = data.draw(st.sampled_from(self.held))
        given = self.call(self.ledger.release(held.lease, how), twice=twice)
        assert given == (held.valid and not twice)
        held.valid = False

    @precondition(lambda self: any(held.valid for held in self.held))
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from([held for held in self.held if held.valid]))
        self.make_due("leases", f"{held.lease.job}/{held.lease.unit}")
        assert self.run(self.ledger.sweep()).back == 1
        held.valid = False

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), deadline=st.booleans(), twice=st.booleans())
    def stop(self, data: st.DataObject, *, deadline: bool, twice: bool) -> None:
        job = data.draw(st.sampled_from(list(self.jobs.values())))
        finished = len(job.done) == job.spec.total
        running = not (job.stopped or job.over or finished)
        if deadline:
            if job.spec.deadline and running:
                self.make_due("deadlines", job.spec.id)
                assert self.run(self.ledger.sweep()).expired == 1
                job.stopped = "expired"
            return
        stopped = self.call(self.ledger.cancel(job.spec.id), twice=twice)
        assert stopped == (running and not twice)
        if running:
            job.stopped = "cancelled"

    @precondition(lambda self: any(held.lease.final for held in self.held))
    @rule(data=st.data(), twice=st.booleans())
    def finalize(self, data: st.DataObject, *, twice: bool) -> None:
        held = data.draw(st.sampled_from([held for held in self.held if held.lease.final]))
        job = self.jobs[held.lease.job]
        status = job.stopped or "completed"
        counts = (sum(job.done.values()), sum(not ok for ok in job.done.values()))
        outcome = Outcome(status=JobStatus(status), at=1, completed=counts[0], failed=counts[1])
        answer = self.call(self.ledger.finalize(held.lease, outcome), twice=twice)
        if held.valid:
            assert answer == status
            job.over = status
        else:
            assert answer in {"stale", "finalizing", job.over}
        held.valid = False

    @invariant()
    def agrees(self) -> None:
        """Counts, statuses and what waits are what the model says."""
        waiting = 0
        for job in self.jobs.values():
            state = self.run(self.ledger.job(job.spec.tenant, job.spec.id))
            failed = sum(not ok for ok in job.done.values())
            assert (state.completed, state.failed) == (len(job.done) - failed, failed)
            if job.over:
                assert state.status == job.over
                continue
            waiting += job.spec.total - len(job.done)
            if not job.stopped:
                whole = len(job.done) == job.spec.total
                assert (state.status is JobStatus.FINALIZING) == whole
            elif state.status is JobStatus.FINALIZING:
                assert state.outcome == job.stopped
        assert self.run(self.ledger.queued()) == waiting

    def teardown(self) -> None:
        """Whatever happened: everything can be brought to its end, and then nothing is left."""
        for held in self.held:
            self.run(self.ledger.release(held.lease))
        for lane in (LANE, QUARANTINE):
            while lease := self.run(self.ledger.claim(LONG, lane)):
                span = range(lease.first, lease.first + lease.count)
                records = [Record(index, str(index), 200, "r") for index in span if index not in lease.done]
                assert self.run(self.ledger.commit(lease, records, 10**6, LONG)) is Verdict.CLOSED
        while lease := self.run(self.ledger.claim(LONG, FINAL)):
            job = self.jobs[lease.job]
            outcome = Outcome(status=JobStatus(job.stopped or "completed"), at=1, completed=job.spec.total)
            assert self.run(self.ledger.finalize(lease, outcome)) == (job.stopped or "completed")
        for job in self.jobs.values():
            assert self.run(self.ledger.job(job.spec.tenant, job.spec.id)).status.terminal
        assert not any(self.run(self.ledger.sweep()).pending.values())
        assert self.run(self.ledger.queued()) == 0
        assert self.run(keys_left(self.redis)) == 0


def test_every_order_of_operations(clean_redis: str) -> None:
    with asyncio.Runner() as runner:
        redis = connect(clean_redis, 5)

        class OnThisRedis(LedgerMachine):
            def __init__(self) -> None:
                super().__init__(redis, runner.run)

        phases = [phase for phase in Phase if EXAMPLES or phase is not Phase.shrink]
        run_state_machine_as_test(
            OnThisRedis,
            settings=settings(
                max_examples=EXAMPLES or 60, stateful_step_count=40, deadline=None, phases=phases,
                suppress_health_check=list(HealthCheck),
            ),
        )  # fmt: skip
        runner.run(redis.aclose())
