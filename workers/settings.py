"""Settings of the bulk tier, on top of the engine's."""

from __future__ import annotations

from pydantic import Field, field_validator

from engine.settings import EngineSettings


class WorkerSettings(EngineSettings):
    """What a worker needs to know, and every tier above it."""

    redis_url: str = "redis://127.0.0.1:6379/0"
    """redis://, rediss:// or unix:// address of the one primary."""

    @field_validator("redis_url")
    @classmethod
    def _has_a_scheme(cls, url: str) -> str:
        if not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError(f"{url!r} is no address of a Redis: it must begin with redis://, rediss:// or unix://")
        return url

    redis_timeout: float = Field(default=5.0, gt=0)
    """Seconds for one Redis command of the bulk path."""
    bulk_window: int = Field(default=16, ge=1, le=4096)
    """Requests that one worker keeps in flight at the engine."""
    bulk_priority: int = Field(default=10, ge=1)
    """Engine priority of bulk requests; interactive ones have 0, and lower is earlier."""
    shard_items: int = Field(default=128, ge=8, le=4096, multiple_of=8)
    """Items per shard: what is leased, lost and repeated together. A multiple of 8, so that bitmaps align."""
    lease_seconds: float = Field(default=30.0, ge=2)
    """A worker that has not committed or renewed for this long has lost its shard."""
    request_timeout: float = Field(default=600.0, gt=0)
    """Seconds that one bulk request may take at the engine."""
    retry_backoff: float = Field(default=2.0, ge=0)
    """Longest pause in seconds before an item's second try; eight times that before the third, at most 30 s."""
    drain_seconds: float = Field(default=25.0, ge=0)
    """Seconds that requests in flight may still take after SIGTERM, before they are given back."""
