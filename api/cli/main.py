"""The command `velocity`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from api import processes
from api.cli import bench, chat, demo, engine, jobs, keys, up, usage, webhooks
from api.cli.terminal import errors_for_people, load_settings
from api.processes import Place
from api.server import serve
from engine import log
from workers import process
from workers.job import LANE, QUARANTINE

_HELP = "One vLLM engine, put to full use: chat that streams as if it were idle, bulk jobs from all the rest."

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=_HELP)
app.add_typer(keys.app, name="keys")
app.add_typer(jobs.app, name="jobs")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(engine.app, name="engine")
app.add_typer(bench.app, name="bench")
app.command()(up.up)
app.command()(chat.chat)
app.command()(usage.usage)
app.command()(demo.demo)


class Lane(StrEnum):
    """Which shards a worker takes."""

    BULK = LANE
    QUARANTINE = QUARANTINE


@app.command()
def api(
    worker: Annotated[int | None, typer.Option(hidden=True, help="Which of several processes this is.")] = None,
    listener: Annotated[int, typer.Option(hidden=True, help="The descriptor of the socket that it serves.")] = -1,
    directory: Annotated[Path, typer.Option(hidden=True, help="What it shares with its parent.")] = Path(),
) -> None:
    """Run the api, in as many processes as VELOCITY_API_WORKERS says, configured by VELOCITY_… variables."""
    with errors_for_people():
        settings = load_settings()
        if worker is not None:
            log.configure(settings, "api", worker=worker)
            processes.work(settings, Place(worker, listener, directory))
        else:
            log.configure(settings, "api")
            uvloop.run(processes.serve(settings) if settings.api_workers > 1 else serve(settings))


@app.command()
def worker(
    lane: Annotated[Lane, typer.Option(help="quarantine: what killed other workers, one item at a time.")] = Lane.BULK,
) -> None:
    """Run one bulk worker, configured by VELOCITY_… variables."""
    with errors_for_people():
        settings = load_settings()
        log.configure(settings, "worker")
        process.run(settings, lane)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
