"""Settings of the engine tier: environment variables VELOCITY_…, frozen, built once in main()."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from engine.protection import Policy


def _xdg(variable: str, fallback: str) -> Path:
    """A per-user directory of the XDG base directory specification."""
    base = os.environ.get(variable) or str(Path.home() / fallback)
    return Path(base) / "velocity"


class EngineSettings(BaseSettings):
    """What the engine tier, and every tier above it, needs to know."""

    model_config = SettingsConfigDict(env_prefix="VELOCITY_", frozen=True, extra="ignore")

    engine_url: str = "http://127.0.0.1:8000"
    """Base address of the engine; a /v1 at its end is taken off."""
    engine_api_key: SecretStr | None = None
    """Sent to an engine that asks for a key (vLLM's --api-key)."""
    profile: str = "cpu"
    """Name of the engine profile (see `velocity engine profiles`)."""
    cache_dir: Path = Field(default_factory=lambda: _xdg("XDG_CACHE_HOME", ".cache"))
    """What can be made again: the prepared embedded model."""
    data_dir: Path = Field(default_factory=lambda: _xdg("XDG_DATA_HOME", ".local/share"))
    """What must be kept: jobs, keys, logs of `velocity up`, the embedded Redis."""
    engine_start_timeout: float = Field(default=1200.0, gt=0)
    """Seconds that the engine may take until it answers; a large model loads for minutes."""
    engine_restarts: int = Field(default=5, ge=0)
    """Restarts within ten minutes after which the supervisor gives up."""
    coserving: bool = True
    """Start the engine with velocity's co-serving scheduler where the profile has one."""
    engine_policy: Policy = "auto"
    """The --scheduling-policy of an engine that `velocity engine serve` did not start: priority or fcfs; auto: ask."""
    interactive_ratio: float = Field(default=1.2, ge=1, le=100)
    """The dial: how much longer bulk work may make a step of the engine's in which a person waits for a token."""
    batch_floor: int = Field(default=1, ge=0, le=100_000)
    """Bulk requests that go on while people are at the engine, of all workers together (each has its part, rounded up).
    0: bulk work may stop meanwhile."""
    connect_timeout: float = Field(default=2.0, gt=0)
    """Seconds to open a connection to the engine."""
    log_json: bool | None = None
    """JSON log lines; by default unless standard error is a terminal."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
