"""`velocity engine serve`: builds vLLM's command from a profile, starts it as a child and keeps it alive."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from engine import embedded, log
from engine.child import Child, ChildSpec
from engine.client import EngineClient
from engine.errors import ProfileError, SettingsError, StartError
from engine.ports import require_free
from engine.profile import FlagValue, Profile
from engine.scheduler.settings import FOLDER
from engine.settings import EngineSettings
from engine.stopping import run_until_signal

_STOP_SECONDS = 20.0
_LEVEL = re.compile(r"^(?:\([^)]*\)\s*)?(DEBUG|INFO|WARNING|ERROR|CRITICAL)\s+\S+\s+\S+\s+(?:\[[^\]]*\]\s*)?(.*)$")

logger = log.get(__name__)
vllm_logger = log.get("vllm")


async def serve(settings: EngineSettings, profile: Profile, overrides: dict[str, FlagValue]) -> None:
    """Run the engine of `profile` at `settings.engine_url` until SIGINT or SIGTERM.

    Raises ProfileError if the profile can't be served here, StartError if vLLM does not come up or keeps dying,
    SettingsError for a VELOCITY_SCHEDULER_DIR that can't be used.
    """
    parts = urlsplit(settings.engine_url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 8000
    require_free(host, port, "the engine")
    for reason in profile.unmet:
        logger.warning("profile_requirement_unmet", profile=profile.name, reason=reason)
    if profile.gpu_count and profile.kv_cache_tokens() <= 0:
        raise ProfileError(f"The profile {profile.name} does not fit {profile.hardware}: {' '.join(profile.unmet)}")
    model = profile.checkpoint
    if profile.embedded:
        model = str(await embedded.prepare(model, settings.cache_dir, _log_progress))
    arguments = profile.vllm_args(model, host, port, coserving=settings.coserving, extra=overrides)
    logger.info("engine_starting", profile=profile.name, model=profile.served_name, arguments=arguments)
    with tempfile.TemporaryDirectory(prefix="velocity-engine-") as private:
        await _run(settings, profile, arguments, Path(private))


async def _run(settings: EngineSettings, profile: Profile, arguments: list[str], private: Path) -> None:
    async with EngineClient.of(settings) as client:
        child = Child(
            ChildSpec(
                name="vLLM",
                command=[sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments],
                ready=client.healthy,
                env=_environment(profile) | _folders(private),
                start_seconds=settings.engine_start_timeout,
                stop_seconds=_STOP_SECONDS,
                restarts=settings.engine_restarts,
                line=_forward_line,
            )
        )
        await run_until_signal(_serve(child, settings.engine_url))
        await child.stop()


async def _serve(child: Child, url: str) -> None:
    try:
        await child.start()
        logger.info("engine_ready", url=url, pid=child.pid)
        await child.supervise()
    except (StartError, asyncio.CancelledError):
        await child.stop()
        raise


def _environment(profile: Profile) -> dict[str, str]:
    """The profile's variables under the operator's own, and a path on which vLLM finds velocity's scheduler."""
    here = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    return {name: value for name, value in profile.env.items() if name not in os.environ} | {"PYTHONPATH": path}


def _folders(private: Path) -> dict[str, str]:
    """Where vLLM leaves its sockets, and the scheduler its reports: ours alone, unless the operator named a folder.

    Raises SettingsError if that one can't be made.
    """
    reports = Path(os.environ.get(FOLDER) or private / "scheduler")
    try:
        reports.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{FOLDER} names a folder that can't be made: {error}") from error
    return {"VLLM_RPC_BASE_PATH": str(private), FOLDER: str(reports)}


def _log_progress(stage: str, share: float) -> None:
    logger.info("preparing_model", stage=stage, percent=round(share * 100))


def _forward_line(line: str) -> None:
    """vLLM's own level and message, as one structlog event."""
    found = _LEVEL.match(line)
    if found:
        getattr(vllm_logger, found[1].lower())(found[2])
    elif line:
        vllm_logger.info(line)
