"""Every Redis key name that Python uses. The Lua scripts' own names are in workers/lua/prelude.lua and mirror these."""

from __future__ import annotations

ROOT = "velocity:"
BULK = f"{ROOT}bulk"
"""Hash: items accepted and not finished, and how fast items are finished."""
FINISHED = f"{ROOT}finished"
"""Sorted set: tenant/job of jobs that are over, by when (ms)."""
DATA = f"{ROOT}data"
"""String: id of the data directory that this Redis is the index of."""
RECONCILED = f"{ROOT}reconciled"
"""There once the ledger has all that the data directory knows."""
APIS = f"{ROOT}apis"
"""Sorted set: api processes by when each last said that it records its interactive requests (µs)."""
SWEEPER_LOCK = f"{ROOT}sweeper"
"""Held by the api process whose sweeper runs."""


def job(job_id: str) -> str:
    """Hash: a job's state and counts."""
    return f"{ROOT}job:{job_id}"


def unit(job_id: str, number: int) -> str:
    """Hash: a shard's state, lease and committed segment lengths."""
    return f"{ROOT}job:{job_id}:unit:{number}"


def done(job_id: str) -> str:
    """Bitmap: items that have a final result."""
    return f"{ROOT}job:{job_id}:done"


def tenant_jobs(tenant: str, kind: str = "jobs") -> str:
    """Sorted set: a tenant's jobs by creation time (ms): all of them, or only the `batches`."""
    return f"{ROOT}tenant:{tenant}:{kind}"


def worker(name: str) -> str:
    """Hash: what a worker said last: its requests at the engine, and what it has given back since it began."""
    return f"{ROOT}worker:{name}"


def usage(account: str, day: int) -> str:
    """Hash: what an API key used on one day (days since 1970, UTC)."""
    return f"{ROOT}usage:{account}:{day}"


def api_key(key_id: str) -> str:
    """Hash: an API key's record (JSON, without its secret) and the record's version."""
    return f"{ROOT}key:{key_id}"


def leases(scope: str) -> str:
    """Sorted set: requests that hold a slot, by the time (µs) when their lease is over."""
    return f"{ROOT}limit:{scope}:leases"
