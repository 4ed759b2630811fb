"""`velocity engine …`: run vLLM from a profile."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from api.cli.terminal import errors_for_people, load_settings, out
from engine import log, profile
from engine.serve import serve

app = typer.Typer(no_args_is_help=True, help="The vLLM engine.")


@app.command("serve")
def serve_engine(
    name: Annotated[str | None, typer.Option("--profile", help="See `velocity engine profiles`.")] = None,
    flag: Annotated[list[str] | None, typer.Option("--flag", help="Override a vLLM flag: name=value.")] = None,
) -> None:
    """Start vLLM, wait until it answers, restart it when it dies."""
    with errors_for_people():
        settings = load_settings(profile=name)
        log.configure(settings, "engine")
        overrides = dict(_flag(text) for text in flag or [])
        asyncio.run(serve(settings, profile.load(settings.profile), overrides))


@app.command()
def profiles() -> None:
    """List the engine profiles."""
    table = Table("profile", "model", "hardware", "precision", "context", "tool parser", box=None)
    for name in profile.names():
        found = profile.load(name)
        parser = found.tool_call_parser or "none"
        table.add_row(name, found.checkpoint, found.hardware, found.precision, str(found.max_model_len), parser)
        for reason in found.unmet:
            table.add_row("", f"[yellow]{escape(reason)}[/]")
    out.print(table)


def _flag(text: str) -> tuple[str, profile.FlagValue]:
    name, _, value = text.partition("=")
    return name, {"true": True, "false": False, "": True}.get(value.lower(), value)
