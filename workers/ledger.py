"""The ledger: the bulk path's state in Redis, one typed method per Lua script. Raises LedgerUnavailable."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import orjson
from redis.asyncio import Redis

from workers import redis_keys
from workers.errors import IdempotencyConflict, QuotaExceeded
from workers.job import LANE, BulkQuota, JobSpec, Lease, Outcome, Record
from workers.ledger_reader import LedgerReader
from workers.redis import translated
from workers.scripts import Scripts
from workers.window import Tally

_SWEEP_MOST = 500
_BELIEVED_MS = 5000
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


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep found."""

    back: int
    """Leases that were lost and taken back."""
    expired: int
    """Jobs whose deadline passed."""
    pending: Mapping[str, int]
    """Units of work that wait, by lane."""


@dataclass(frozen=True, slots=True)
class AtEngine:
    """Bulk work at the engine, as the workers said within the last seconds."""

    workers: int
    """Live workers of the lane that was asked for."""
    requests: int
    """Of all lanes."""


@dataclass(frozen=True, slots=True)
class People:
    """Interactive work at the engine, as the api's processes record it."""

    requests: int
    """Those that hold a slot; who waits for one is not at the engine yet."""
    silence: float | None
    """Seconds since an api process last said that it records them; None: none does."""


class Ledger(LedgerReader):
    """Jobs, shards and leases in Redis. Every operation is one round trip and may be replayed."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis)
        self._scripts = Scripts(redis, "workers", prelude="prelude.lua")

    async def submit(self, spec: JobSpec, quota: BulkQuota = UNLIMITED) -> str:
        """Enter a job whose files are durable. Returns its id, or that of the job that its Idempotency-Key made before.

        Raises QuotaExceeded, IdempotencyConflict.
        """
        return (await self._submit(spec, quota, "enter"))[1]

    async def require_room(self, spec: JobSpec, quota: BulkQuota) -> str | None:
        """Raises as `submit` would now, before files are written; returns the job that is there already, if one is."""
        verdict, job = await self._submit(spec, quota, "ask")
        return job if verdict == "known" else None

    async def hold(self, spec: JobSpec) -> str:
        """Enter a job, but let none of its shards start: its results are restored before `open`.

        Returns its id, or that of the job that its Idempotency-Key has made since.
        """
        return (await self._submit(spec, UNLIMITED, "hold"))[1]

    async def _submit(self, spec: JobSpec, quota: BulkQuota, mode: str) -> tuple[str, str]:
        most_failed = -1 if spec.max_error_rate is None else int(spec.max_error_rate * spec.total)
        verdict, used, job = await self._run(
            "submit", spec.id, spec.tenant, spec.account, LANE, spec.total, spec.shard_items,
            (spec.deadline or 0) * 1000, spec.tokens, spec.priority, most_failed, spec.created_ms,
            spec.idempotency or "", spec.digest or "", quota.jobs, quota.items, quota.tokens, mode, *_pairs(spec),
        )  # fmt: skip
        what = verdict.decode()
        if what == "conflict" and mode != "hold":
            raise IdempotencyConflict("This Idempotency-Key came before, with another request. Use a new key.")
        needed = {"jobs": (1, quota.jobs), "items": (spec.total, quota.items), "tokens": (spec.tokens, quota.tokens)}
        if what in needed:
            need, most = needed[what]
            full = "active jobs" if what == "jobs" else f"{what} in active jobs"
            text = f"Bulk quota reached: at most {most:,} {full}, {int(used):,} in use, {need:,} more asked for."
            raise QuotaExceeded(text, what, never=need > most)
        return what, job.decode()

    async def enter_over(
        self, spec: JobSpec, outcome: Outcome, *, webhook_due: bool = False, fields: Mapping[str, str] | None = None
    ) -> None:
        """Enter a job that is over already: one that only the disk knows, or a batch that never began."""
        more = [part for pair in (fields or {}).items() for part in pair]
        times = [part for name, at in outcome.times.items() for part in (name, at * 1000)]
        await self._run(
            "over", spec.id, spec.tenant, outcome.status.value, outcome.at * 1000, spec.total, outcome.completed,
            outcome.failed, spec.created_ms, spec.idempotency or "", int(webhook_due), "account", spec.account,
            "shard_size", spec.shard_items, "shards", spec.shards, "input_tokens", outcome.input_tokens,
            "output_tokens", outcome.output_tokens, *_digests(spec), *times, *more, *_pairs(spec),
        )  # fmt: skip

    async def restore(self, job: str, unit: int, segment: str, records: Sequence[Record], length: int) -> None:
        """Make a held job's records on the disk, in the first `length` bytes of a segment, count again."""
        completed = [record.index for record in records if record.ok]
        failed = [record.index for record in records if not record.ok]
        await self._run(
            "restore", job, unit, segment, length, *_tokens(records), len(completed), *completed, *failed
        )  # fmt: skip

    async def drop(self, tenant: str, job: str) -> None:
        """Forget a held job whose files are gone: it was deleted while it was being restored."""
        await self._run("drop", job, tenant)

    async def open(self, job: str, *, cancelled: bool) -> None:
        """Let what is left of a held job start."""
        await self._run("open", job, int(cancelled))

    async def claim(self, lease_seconds: float, lane: str = LANE, busy: Iterable[str] = ()) -> Lease | None:
        """Lease the next shard of a lane (in the lane FINAL: the next job to finalize), or None if none is pending.

        Accounts in `busy` (`Lease.flow`) are passed over.
        """
        owner = secrets.token_hex(8)
        found = await self._run("claim", lane, owner, round(lease_seconds * 1000), *busy)
        if not found:
            return None
        job, tenant, account, unit, epoch, first, count, endpoint, lane = (value.decode() for value in found[:9])
        offset, number = int(first), int(count)
        done = frozenset(_set_bits(found[9], offset, number))
        return Lease(job, tenant, unit, int(epoch), owner, offset, number, done, account, endpoint, lane)

    async def commit(self, lease: Lease, records: Sequence[Record], length: int, lease_seconds: float) -> Verdict:
        """Make `records`, durable in the first `length` bytes of the lease's segment, count; renew the lease."""
        completed = [record.index for record in records if record.ok]
        failed = [record.index for record in records if not record.ok]
        verdict = await self._run(
            "commit", *_lease_args(lease), round(lease_seconds * 1000), lease.segment, length, *_tokens(records),
            len(completed), *completed, *failed,
        )  # fmt: skip
        return Verdict(verdict.decode())

    async def begin(self, lease: Lease, item: int) -> int | None:
        """In quarantine, before an item runs: how often it took its worker along so far. None if the lease is lost."""
        deaths = int(await self._run("begin", *_lease_args(lease), item))
        return None if deaths < 0 else deaths

    async def release(self, lease: Lease, how: Literal["idle", "crashed", "cured"] = "idle") -> bool:
        """Give the unit back; `crashed` ones end in quarantine, `cured` ones leave it. False if it was lost."""
        return bool(await self._run("release", *_lease_args(lease), how))

    async def cancel(self, job: str) -> bool:
        """Stop a job. False if it was stopping or over already."""
        return bool(await self._run("stop", job))

    async def sweep(self) -> Swept:
        """Take back lost leases, stop jobs past their deadline."""
        back, expired, *lanes = await self._run("sweep", _SWEEP_MOST)
        pending = {lane.decode(): int(units) for lane, units in zip(lanes[::2], lanes[1::2], strict=True)}
        return Swept(int(back), int(expired), pending)

    async def finalize(self, lease: Lease, outcome: Outcome) -> str:
        """The job's result files are in place: make it terminal. Returns its status, or "stale"."""
        status = await self._run(
            "finalize", lease.job, lease.epoch, lease.owner, outcome.status.value, outcome.completed, outcome.failed
        )
        return str(status.decode())

    async def forget(self, tenant: str, job: str) -> str:
        """Forget a job that is over. Returns "gone", or the status of one that is not."""
        return str((await self._run("forget", job, tenant)).decode())

    async def remember(self) -> None:
        """All that the data directory knows is entered."""
        with translated():
            await self._redis.set(redis_keys.RECONCILED, 1)

    async def beat(self, worker: str = "", seconds: int = 15, lane: str = LANE, tally: Tally | None = None) -> int:
        """A worker says that it lives for another `seconds`, and what it does; returns how many live."""
        said = tally or Tally()
        wasted = round(said.wasted * 1000)
        return int(await self._run("beat", worker, seconds, lane, said.in_flight, said.given_back, wasted))

    async def at_engine(self, lane: str = LANE) -> AtEngine:
        """What bulk work is at the engine now, to about a second."""
        return AtEngine(*map(int, await self._run("at_engine", lane, _BELIEVED_MS)))

    async def people(self) -> People:
        """What interactive work is at the engine now."""
        requests, silence = map(int, await self._run("people"))
        return People(requests, None if silence < 0 else silence / 1000)

    async def _run(self, name: str, *args: str | float | bytes) -> Any:
        with translated():
            return await self._scripts.run(name, *args)


def _lease_args(lease: Lease) -> tuple[str | int, ...]:
    return lease.job, lease.unit, lease.epoch, lease.owner


def _tokens(records: Sequence[Record]) -> tuple[int, int]:
    usages = [record.usage for record in records]
    return sum(usage[0] for usage in usages), sum(usage[1] for usage in usages)


def _digests(spec: JobSpec) -> list[str]:
    if not (spec.idempotency and spec.digest):
        return []
    return ["idempotency", spec.idempotency, "digest", spec.digest]


def _pairs(spec: JobSpec) -> list[str | int]:
    """What the job's hash says about it, as field, value, …"""
    fields: dict[str, str | int | None] = {
        "model": spec.model, "endpoint": spec.endpoint, "name": spec.name, "webhook": spec.webhook,
        "retry_of": spec.retry_of, "input_file": spec.input_file, "completion_window": spec.completion_window,
        "deadline": spec.deadline, "priority": spec.priority,
        "metadata": orjson.dumps(spec.metadata).decode() if spec.metadata else None,
    }  # fmt: skip
    return [part for name, value in fields.items() if value is not None for part in (name, value)]


def _set_bits(bits: bytes, first: int, count: int) -> list[int]:
    """Indices in [first, first + count) whose bit is set in `bits`, which begins at the byte of `first`."""
    return [
        index
        for index in range(first, first + count)
        if (offset := index // 8 - first // 8) < len(bits) and bits[offset] >> (7 - index % 8) & 1
    ]
