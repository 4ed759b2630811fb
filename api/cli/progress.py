"""The live progress bar of a job: done, failed, tokens per second, time left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from api.cli.client import VelocityClient

_INTERVAL = 0.5
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
    progress = Progress(*columns, console=console)
    bar = progress.add_task("queued", total=None, failed=0, rate=0.0)

    def view() -> Group:
        line = Text(beside(), style="cyan", no_wrap=True, overflow="crop") if beside else None
        return Group(progress, *([line] if line else []))

    with Live(console=console, get_renderable=view, refresh_per_second=8):
        while True:
            job: dict[str, Any] = await client.json("GET", f"/jobs/{job_id}")
            counts = job["counts"]
            rate = job["usage"]["output_tokens"] / _seconds_so_far(job)
            progress.update(
                bar, description=job["status"], total=counts["total"], completed=counts["completed"] + counts["failed"],
                failed=counts["failed"], rate=rate,
            )  # fmt: skip
            if job["status"] in _TERMINAL:
                return job
            await asyncio.sleep(_INTERVAL)


def _seconds_so_far(job: dict[str, Any]) -> float:
    """How long the job has been worked on; tokens are counted as items finish, so shorter spans would mislead."""
    ended = job["finalizing_at"] or time.time()
    return max(1.0, ended - (job["in_progress_at"] or ended))
