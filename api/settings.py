"""Settings of the HTTP tier, on top of the workers' and the engine's."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from engine.errors import SettingsError
from workers.settings import WorkerSettings

_MIB = 1024 * 1024


class ApiSettings(WorkerSettings):
    """What the front door needs to know."""

    host: str = "127.0.0.1"
    port: int = Field(default=8001, ge=0, le=65535)
    open: bool = False
    """Serve without keys, to anyone who can connect. Only for a private machine."""
    open_public: bool = False
    """Allow `open` on an address that others can reach."""
    bootstrap_key_file: Path | None = None
    """File with an API key (as `velocity keys create` prints it) that is entered at start if it is unknown."""
    max_body_bytes: int = Field(default=8 * _MIB, gt=0)
    """Largest body of an interactive request."""
    max_job_bytes: int = Field(default=32 * _MIB, gt=0)
    """Largest body of POST /jobs."""
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
    limiter_timeout: float = Field(default=1.0, gt=0)
    """Seconds for one Redis command on the interactive path."""
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
