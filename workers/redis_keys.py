"""Every Redis key name that Python uses. The Lua scripts' own names are in workers/lua/prelude.lua and mirror these."""

from __future__ import annotations

ROOT = "velocity:"
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


def tenant_jobs(tenant: str) -> str:
    """Sorted set: a tenant's jobs by creation time (ms)."""
    return f"{ROOT}tenant:{tenant}:jobs"


def api_key(key_id: str) -> str:
    """Hash: an API key's record, without its secret."""
    return f"{ROOT}key:{key_id}"


def request_rate(key_id: str) -> str:
    """Integer: theoretical arrival time (µs) of a key's next request (GCRA)."""
    return f"{ROOT}limit:{key_id}:requests"


API_KEYS = f"{ROOT}keys"
"""Set: ids of all API keys."""
