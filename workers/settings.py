"""Settings of the bulk tier, on top of the engine's."""

from __future__ import annotations

import re
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from engine.settings import EngineSettings

SUPPORTED_REDIS = (
    "velocity needs one primary Redis, 6.2 or newer, with appendonly yes, appendfsync everysec and maxmemory-policy "
    "noeviction; no Sentinel, no Cluster mode, no replica."
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # a Path has lost the second slash


class WorkerSettings(EngineSettings):
    """What a worker needs to know, and every tier above it."""

    redis_url: str = "redis://127.0.0.1:6379/0"
    """redis://, rediss:// or unix:// address of the one primary."""

    @field_validator("redis_url")
    @classmethod
    def _names_one_redis(cls, url: str) -> str:
        if not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError(f"it must begin with redis://, rediss:// or unix://. {SUPPORTED_REDIS}")
        if not url.startswith("unix://") and "," in urlsplit(url).netloc.rpartition("@")[2]:
            raise ValueError(f"it names several hosts. {SUPPORTED_REDIS}")
        return url

    @field_validator("data_dir", mode="before")
    @classmethod
    def _is_no_object_store(cls, path: object) -> object:
        if _URL.match(str(path)):
            raise ValueError("it must be a directory of a file system; object storage is not supported (docs/bulk.md)")
        return path

    redis_timeout: float = Field(default=5.0, gt=0)
    """Seconds for one Redis command of the bulk path."""
    bulk_window: int | None = Field(default=None, ge=1, le=4096)
    """Requests that one worker keeps in flight at the engine. By default as many as an engine with velocity's scheduler
    can use, shared by the workers; 16 elsewhere. No worker sends more than its part of 4 to an engine that does nothing
    to protect people."""
    bulk_priority: int = Field(default=10, ge=1)
    """Engine priority of bulk requests; interactive ones have 0, and lower is earlier."""
    shard_items: int = Field(default=128, ge=8, le=4096, multiple_of=8)
    """Items per shard: what is leased, lost and repeated together. A multiple of 8, so that bitmaps align."""
    lease_seconds: float = Field(default=15.0, ge=2)
    """A worker that has not committed or renewed for this long has lost its shard."""
    request_timeout: float = Field(default=600.0, gt=0)
    """Seconds that one bulk request may take at the engine."""
    retry_backoff: float = Field(default=2.0, ge=0)
    """Longest pause in seconds before an item's second try; eight times that before the third, at most 30 s."""
    retention_days: float = Field(default=30.0, gt=0)
    """Days after which a job that is over is deleted with its results."""
    drain_seconds: float = Field(default=25.0, ge=0)
    """Seconds that requests in flight may still take after SIGTERM, before they are given back."""
    webhook_allow: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode] = ()
    """Networks such as 10.0.0.0/8, with commas between: webhooks may go there although they are private, or by http."""

    @field_validator("webhook_allow", mode="before")
    @classmethod
    def _names_networks(cls, networks: object) -> object:
        return tuple(map(ip_network, networks.replace(",", " ").split())) if isinstance(networks, str) else networks
