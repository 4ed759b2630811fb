"""What stands in the ledger, read without changing it. Raises LedgerUnavailable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast

from redis.asyncio import Redis

from workers import redis_keys
from workers.errors import NoSuchJob
from workers.job import JobState, JobStatus
from workers.progress import recent_rate
from workers.redis import translated


class LedgerReader:
    """Jobs, shards and results as they are now."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def finished_before(self, when: int, most: int) -> list[tuple[str, str]]:
        """(tenant, job) of jobs that ended before a time (unix seconds), oldest first."""
        with translated():
            found = await self._redis.zrange(
                redis_keys.FINISHED, "-inf", when * 1000, byscore=True, offset=0, num=most
            )  # fmt: skip
        return [cast("tuple[str, str]", tuple(entry.decode().split("/"))) for entry in cast("list[bytes]", found)]

    async def statuses(self, jobs: Sequence[str]) -> list[JobStatus | None]:
        """Where each job is; None for one that the ledger does not know, or does not know whole."""
        with translated():
            async with self._redis.pipeline(transaction=False) as pipe:
                for job in jobs:
                    pipe.hmget(redis_keys.job(job), "status", "held")
                raws: list[list[bytes | None]] = await pipe.execute()
        return [JobStatus(status.decode()) if status and not held else None for status, held in raws]

    async def bulk(self) -> tuple[int, float | None]:
        """Items accepted and not finished, and items finished per second lately (None if not known)."""
        with translated():
            raw = cast("Mapping[bytes, bytes]", await self._redis.hgetall(redis_keys.BULK))
        text = {key.decode(): value.decode() for key, value in raw.items()}
        return max(0, int(text.get("queued", 0))), recent_rate(text)

    async def given_back(self) -> tuple[int, float]:
        """Bulk requests that were ended early for people's sake, and the seconds at the engine that this wasted."""
        with translated():
            raw = cast("list[bytes | None]", await self._redis.hmget(redis_keys.BULK, "given_back", "wasted_ms"))
        return int(raw[0] or 0), int(raw[1] or 0) / 1000

    async def queued(self) -> int:
        """Items accepted and not finished."""
        return (await self.bulk())[0]

    async def remembers(self) -> bool:
        """Whether this Redis still has what was entered; one that was emptied or replaced has not."""
        with translated():
            return bool(await self._redis.exists(redis_keys.RECONCILED))

    async def job(self, tenant: str, job: str) -> JobState:
        """A tenant's job. Raises NoSuchJob, also for another tenant's."""
        with translated():
            raw = cast("Mapping[bytes, bytes]", await self._redis.hgetall(redis_keys.job(job)))
        state = JobState.from_hash(job, raw) if raw else None
        if state is None or state.tenant != tenant:
            raise NoSuchJob(f"There is no job {job!r}.")
        return state

    async def jobs(
        self, tenant: str, limit: int, after: str | None, kind: Literal["jobs", "batches"] = "jobs"
    ) -> list[JobState]:
        """A tenant's jobs, newest first, from the one after `after` on. Raises NoSuchJob for an unknown `after`."""
        listed = redis_keys.tenant_jobs(tenant, kind)
        with translated():
            start = 0
            if after is not None:
                rank = await self._redis.zrevrank(listed, after)
                if rank is None:
                    raise NoSuchJob(f"There is no job {after!r}.")
                start = cast("int", rank) + 1
            page = await self._redis.zrange(listed, start, start + limit - 1, desc=True)
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
