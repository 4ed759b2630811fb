"""The command `velocity`."""

from __future__ import annotations

import typer
import uvloop

from api.cli import chat, demo, engine, jobs, keys, up, usage
from api.cli.terminal import errors_for_people, load_settings
from api.server import serve
from engine import log
from workers import process

_HELP = "One vLLM engine, put to full use: chat that streams as if it were idle, bulk jobs from all the rest."

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=_HELP)
app.add_typer(keys.app, name="keys")
app.add_typer(jobs.app, name="jobs")
app.add_typer(engine.app, name="engine")
app.command()(up.up)
app.command()(chat.chat)
app.command()(usage.usage)
app.command()(demo.demo)


@app.command()
def api() -> None:
    """Run one api process, configured by VELOCITY_… variables."""
    with errors_for_people():
        settings = load_settings()
        log.configure(settings, "api")
        uvloop.run(serve(settings))


@app.command()
def worker() -> None:
    """Run one bulk worker, configured by VELOCITY_… variables."""
    with errors_for_people():
        settings = load_settings()
        log.configure(settings, "worker")
        process.run(settings)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
