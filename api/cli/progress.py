"""The live progress bar of a job: done, failed, tokens per second, time left."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from api.cli.client import VelocityClient

_INTERVAL = 0.5
_SAMPLES = 60
"""States over which tokens per second are taken: half a minute."""
_TERMINAL = frozenset({"completed", "cancelled", "expired", "failed"})


async def watch(
    client: VelocityClient, job_id: str, console: Console, beside: Callable[[], str] | None = None
) -> dict[str, Any]:
    """Show a job's progress until it is over (Ctrl-C stops watching, not the job); returns its last state.

    `beside` gives one more line to show under the bar, such as the end of a text that is being streamed meanwhile.
    """
    columns = (
        SpinnerColumn(finished_text="●"), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"), TextColumn("{task.fields[rate]:.0f} tokens/s"),
        TimeRemainingColumn(compact=True),
    )  # fmt: skip
    clock = asyncio.get_running_loop().time
    progress = Progress(*columns, console=console)
    bar = progress.add_task("queued", total=None, failed=0, rate=0.0)
    samples: deque[tuple[float, int]] = deque(maxlen=_SAMPLES)

    def view() -> Group:
        line = Text(beside(), style="cyan", no_wrap=True, overflow="crop") if beside else None
        return Group(progress, *([line] if line else []))

    with Live(console=console, get_renderable=view, refresh_per_second=8):
        while True:
            job: dict[str, Any] = await client.json("GET", f"/jobs/{job_id}")
            counts = job["counts"]
            samples.append((clock(), job["usage"]["output_tokens"]))
            span = samples[-1][0] - samples[0][0]
            rate = (samples[-1][1] - samples[0][1]) / span if span > 0 else 0.0
            progress.update(
                bar, description=job["status"], total=counts["total"], completed=counts["completed"] + counts["failed"],
                failed=counts["failed"], rate=rate,
            )  # fmt: skip
            if job["status"] in _TERMINAL:
                return job
            await asyncio.sleep(_INTERVAL)
