"""Settings of the HTTP tier, on top of the workers' and the engine's."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Self

from pydantic import Field, SecretStr, model_validator

from engine.errors import SettingsError
from workers.settings import WorkerSettings

_MIB = 1024 * 1024


class ApiSettings(WorkerSettings):
    """What the front door needs to know."""

    host: str = "127.0.0.1"
    port: int = Field(default=8001, ge=0, le=65535)
    api_workers: int = Field(default=1, ge=1, le=256)
    """Processes that share the port; more than one are started and watched over by a parent, which serves nothing."""
    open: bool = False
    """Serve without keys, to anyone who can connect. Only for a private machine."""
    open_public: bool = False
    """Allow `open` on an address that others can reach."""
    bootstrap_key_file: Path | None = None
    """File with an API key (as `velocity keys create` prints it) that is entered at start if it is unknown."""
    max_body_bytes: int = Field(default=8 * _MIB, gt=0)
    """Largest body of an interactive request."""
    max_job_bytes: int = Field(default=32 * _MIB, gt=0)
    """Largest body of POST /jobs as one JSON object; as lines it may have `max_file_bytes`."""
    max_file_bytes: int = Field(default=200 * _MIB, gt=0)
    """Largest uploaded file, and largest job that comes as lines."""
    upload_timeout: float = Field(default=1800.0, gt=0)
    """Seconds in which an upload must have come; it may stall for `body_timeout`."""
    min_free_bytes: int = Field(default=1024 * _MIB, ge=0)
    """Free space of the data directory below which no job or file is accepted, its own size taken off."""
    max_queued_items: int = Field(default=2_000_000, ge=1)
    """Items accepted and not finished, of all tenants, from which on no job is accepted."""
    default_max_tokens: int = Field(default=8192, gt=0)
    """Output limit of a chat or response request that names none."""
    head_wait: float = Field(default=5.0, gt=0)
    """Seconds that a stream waits for the engine before it answers 200 and pings."""
    ping_interval: float = Field(default=10.0, gt=0)
    """Seconds between `: ping` comments until the first token."""
    first_token_timeout: float = Field(default=300.0, gt=0)
    """Seconds after which a request without a first byte of its answer is given up."""
    stall_timeout: float = Field(default=30.0, gt=0)
    """Seconds without a byte, after the first token, after which a stream is ended as an error."""
    total_timeout: float = Field(default=1800.0, gt=0)
    """Seconds that one interactive request may take in all."""
    queue_wait: float = Field(default=20.0, ge=0)
    """Seconds that a request which only lacks a concurrency slot waits for one; 0 refuses at once."""
    max_waiting: int = Field(default=100, ge=1)
    """Requests of one key that may wait at the same time."""
    global_rpm: int = Field(default=0, ge=0)
    """Interactive requests per minute of all keys together; 0 is no limit, here and below."""
    global_tpm: int = Field(default=0, ge=0)
    """Tokens per minute of all interactive requests."""
    global_concurrency: int = Field(default=0, ge=0)
    """Interactive requests at the same time."""
    limiter_timeout: float = Field(default=0.25, gt=0, le=0.5)
    """Seconds for one Redis command on the interactive path; after a failure none is tried for a second."""
    api_redis_timeout: float = Field(default=0.7, gt=0, le=1)
    """Seconds for one Redis command on the api's other paths."""
    outage_seconds: float = Field(default=60.0, ge=0)
    """For how long without Redis known keys go on under a local share of their limits."""
    metrics_host: str = "127.0.0.1"
    """Where /metrics listens; on an address that others can reach, scrapers need a key of the scope `metrics`."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of /metrics; without it there is none."""
    sentry_dsn: SecretStr | None = None
    """Where errors are reported (Sentry or a compatible service); nowhere by default. Needs the extra `errors`."""
    body_timeout: float = Field(default=60.0, gt=0)
    """Seconds in which a request's body must have come."""
    max_n: int = Field(default=8, ge=1)
    """Most answers (`n`, `best_of`) of one request."""
    max_schema_bytes: int = Field(default=8192, gt=0)
    """Largest schema, pattern or grammar that an answer can be bound to."""
    max_tool_bytes: int = Field(default=32768, gt=0)
    """Largest description of one tool."""
    docs: bool = False
    """Serve /openapi.json, to holders of a key."""
    shutdown_seconds: float = Field(default=30.0, ge=0)
    """Seconds that running requests may still take after SIGTERM."""

    @model_validator(mode="after")
    def _open_only_in_private(self) -> Self:
        if self.open and not self.open_public and not _is_loopback(self.host):
            raise SettingsError(
                f"VELOCITY_OPEN serves anyone who can reach {self.host}. Use a loopback address, create keys instead, "
                "or set VELOCITY_OPEN_PUBLIC=1 if that is really wanted."
            )
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
