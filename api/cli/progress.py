"""The live progress bar of a job: done, failed, tokens per second, time left."""

from __future__ import annotations

import asyncio
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from api.cli.client import VelocityClient

_INTERVAL = 0.5
_TERMINAL = frozenset({"completed", "cancelled", "expired", "failed"})


async def watch(client: VelocityClient, job_id: str, console: Console) -> dict[str, Any]:
    """Show a job's progress until it is over (Ctrl-C stops watching, not the job); returns its last state."""
    columns = (
        SpinnerColumn(finished_text="●"), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"), TextColumn("{task.fields[rate]:.0f} tokens/s"),
        TimeRemainingColumn(compact=True),
    )  # fmt: skip
    clock = asyncio.get_running_loop().time
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("queued", total=None, failed=0, rate=0.0)
        samples: list[tuple[float, int]] = []
        while True:
            job: dict[str, Any] = await client.json("GET", f"/jobs/{job_id}")
            counts = job["counts"]
            samples = [*samples[-60:], (clock(), job["usage"]["output_tokens"])]
            span = samples[-1][0] - samples[0][0]
            rate = (samples[-1][1] - samples[0][1]) / span if span > 0 else 0.0
            progress.update(
                bar, description=job["status"], total=counts["total"], completed=counts["completed"] + counts["failed"],
                failed=counts["failed"], rate=rate,
            )  # fmt: skip
            if job["status"] in _TERMINAL:
                return job
            await asyncio.sleep(_INTERVAL)
