"""The ledger: the bulk path's state in Redis, one typed method per Lua script. Raises LedgerUnavailable."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, cast

from redis.asyncio import Redis

from workers import redis_keys
from workers.errors import NoSuchJob, QuotaExceeded
from workers.job import LANE, BulkQuota, JobSpec, JobState, Lease, Record
from workers.redis import translated
from workers.scripts import Scripts

_SWEEP_MOST = 500
UNLIMITED = BulkQuota()


class Verdict(StrEnum):
    """What a commit says about going on."""

    GO = "go"
    """Committed; the lease is renewed."""
    STOP = "stop"
    """Committed; the job is cancelling or expiring: stop its requests and release."""
    CLOSED = "closed"
    """Committed; nothing is left to do in this shard."""
    STALE = "stale"
    """Refused: the lease was lost, and another has the shard."""


class Ledger:
    """Jobs, shards and leases in Redis. Every operation is one round trip and may be replayed."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._scripts = Scripts(redis, "workers", prelude="prelude.lua")

    async def submit(self, spec: JobSpec, quota: BulkQuota = UNLIMITED) -> bool:
        """Enter a job whose files are durable. False if it was entered before. Raises QuotaExceeded."""
        return await self._submit(spec, quota, ask=False) == "entered"

    async def require_room(self, spec: JobSpec, quota: BulkQuota) -> None:
        """Raises QuotaExceeded if the job would not be entered now: asked before its files are written."""
        await self._submit(spec, quota, ask=True)

    async def _submit(self, spec: JobSpec, quota: BulkQuota, *, ask: bool) -> str:
        fields = {"model": spec.model, "endpoint": spec.endpoint, "name": spec.name}
        pairs = [part for key, value in fields.items() if value is not None for part in (key, value)]
        verdict, used = await self._run(
            "submit", spec.id, spec.tenant, LANE, spec.total, spec.shard_items, (spec.deadline or 0) * 1000,
            spec.account, spec.tokens, quota.jobs, quota.items, quota.tokens, int(ask), *pairs,
        )  # fmt: skip
        what = verdict.decode()
        needed = {"jobs": (1, quota.jobs), "items": (spec.total, quota.items), "tokens": (spec.tokens, quota.tokens)}
        if what in needed:
            need, most = needed[what]
            full = "active jobs" if what == "jobs" else f"{what} in active jobs"
            text = f"Bulk quota reached: at most {most:,} {full}, {int(used):,} in use, {need:,} more asked for."
            raise QuotaExceeded(text, what, never=need > most)
        return str(what)

    async def claim(self, lease_seconds: float, lane: str = LANE) -> Lease | None:
        """Lease the next shard of a lane (in the lane FINAL: the next job to finalize), or None if none is pending."""
        owner = secrets.token_hex(8)
        found = await self._run("claim", lane, owner, round(lease_seconds * 1000))
        if not found:
            return None
        job, tenant, unit, epoch, first, count = (value.decode() for value in found[:6])
        offset, number = int(first), int(count)
        done = frozenset(_set_bits(found[6], offset, number))
        return Lease(job, tenant, unit, int(epoch), owner, offset, number, done)

    async def commit(self, lease: Lease, records: Sequence[Record], length: int, lease_seconds: float) -> Verdict:
        """Make `records`, durable in the first `length` bytes of the lease's segment, count; renew the lease."""
        completed = [record.index for record in records if record.ok]
        failed = [record.index for record in records if not record.ok]
        tokens_in = sum(record.usage[0] for record in records)
        tokens_out = sum(record.usage[1] for record in records)
        verdict = await self._run(
            "commit", *_lease_args(lease), round(lease_seconds * 1000), lease.segment, length, tokens_in, tokens_out,
            len(completed), *completed, *failed,
        )  # fmt: skip
        return Verdict(verdict.decode())

    async def release(self, lease: Lease) -> bool:
        """Give the unit back for others. False if it was lost already."""
        return bool(await self._run("release", *_lease_args(lease)))

    async def cancel(self, job: str) -> bool:
        """Stop a job. False if it was stopping or over already."""
        return bool(await self._run("stop", job))

    async def sweep(self) -> tuple[int, int, int]:
        """Take back lost leases, stop jobs past their deadline. Returns (taken back, expired, pending units)."""
        back, expired, pending = await self._run("sweep", LANE, _SWEEP_MOST)
        return int(back), int(expired), int(pending)

    async def finalize(self, lease: Lease) -> str:
        """The job's result files are in place: make it terminal. Returns its status, or "stale"."""
        return str((await self._run("finalize", lease.job, lease.epoch, lease.owner)).decode())

    async def beat(self, worker: str = "", seconds: int = 15) -> int:
        """A worker says that it lives for another `seconds`; returns how many live."""
        return int(await self._run("beat", worker, seconds))

    async def job(self, tenant: str, job: str) -> JobState:
        """A tenant's job. Raises NoSuchJob, also for another tenant's."""
        with translated():
            raw = cast("Mapping[bytes, bytes]", await self._redis.hgetall(redis_keys.job(job)))
        state = JobState.from_hash(job, raw) if raw else None
        if state is None or state.tenant != tenant:
            raise NoSuchJob(f"There is no job {job!r}.")
        return state

    async def jobs(self, tenant: str, limit: int, after: str | None) -> list[JobState]:
        """A tenant's jobs, newest first, from the one after `after` on. Raises NoSuchJob for an unknown `after`."""
        with translated():
            start = 0
            if after is not None:
                rank = await self._redis.zrevrank(redis_keys.tenant_jobs(tenant), after)
                if rank is None:
                    raise NoSuchJob(f"There is no job {after!r}.")
                start = cast("int", rank) + 1
            page = await self._redis.zrange(redis_keys.tenant_jobs(tenant), start, start + limit - 1, desc=True)
            found = [entry.decode() for entry in cast("list[bytes]", page)]
            async with self._redis.pipeline(transaction=False) as pipe:
                for job in found:
                    pipe.hgetall(redis_keys.job(job))
                raws = await pipe.execute()
        return [JobState.from_hash(job, raw) for job, raw in zip(found, raws, strict=True) if raw]

    async def finished_prefix(self, job: str, total: int) -> int:
        """How many items from the first on have a final result, without a gap."""
        with translated():
            gap = int(await self._redis.bitpos(redis_keys.done(job), 0))
            if gap < 0:  # every bit that exists is set
                gap = int(await self._redis.strlen(redis_keys.done(job))) * 8
        return min(gap, total)

    async def segments(self, job: str, units: Sequence[int]) -> list[dict[str, int]]:
        """Per shard: committed length in bytes of each of its segment files."""
        with translated():
            async with self._redis.pipeline(transaction=False) as pipe:
                for unit in units:
                    pipe.hgetall(redis_keys.unit(job, unit))
                raws: list[dict[bytes, bytes]] = await pipe.execute()
        return [
            {key[8:].decode(): int(value) for key, value in raw.items() if key.startswith(b"segment:")} for raw in raws
        ]

    async def _run(self, name: str, *args: str | float | bytes) -> Any:
        with translated():
            return await self._scripts.run(name, *args)


def _lease_args(lease: Lease) -> tuple[str | int, ...]:
    return lease.job, lease.unit, lease.epoch, lease.owner


def _set_bits(bits: bytes, first: int, count: int) -> list[int]:
    """Indices in [first, first + count) whose bit is set in `bits`, which begins at the byte of `first`."""
    return [
        index
        for index in range(first, first + count)
        if (offset := index // 8 - first // 8) < len(bits) and bits[offset] >> (7 - index % 8) & 1
    ]
