"""`velocity engine …`: run vLLM from a profile."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from api.cli.terminal import errors_for_people, load_settings, local_settings, out
from engine import log, profile
from engine.client import EngineClient
from engine.protection import EngineProtection, Protection
from engine.serve import serve
from engine.settings import EngineSettings

app = typer.Typer(no_args_is_help=True, help="The vLLM engine.")
_PROTECTION = {
    Protection.SCHEDULER: "scheduler (velocity's, inside the engine)",
    Protection.PRIORITY: "priority (vLLM's own, orders only what waits)",
    Protection.NONE: "none that is known",
}


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


@app.command()
def status() -> None:
    """Ask the engine who protects people from bulk work in there, and what its scheduler does."""
    with errors_for_people():
        settings = local_settings()
        url, found = asyncio.run(_asked(settings))
        table = Table(show_header=False, box=None)
        table.add_row("engine", url)
        table.add_row("protection", _PROTECTION[found.protection])
        table.add_row("bulk at a time", f"{found.batch_seats} requests" if found.batch_seats else "not known")
        for name, value in _doings(found.status) if found.status else ():
            table.add_row(name, value)
        out.print(table)


async def _asked(settings: EngineSettings) -> tuple[str, EngineProtection]:
    async with EngineClient.of(settings) as client:
        return client.url, await client.protection()


def _doings(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What a scheduler's report says, in rows."""
    dial, batch, steps, tokens = report["dial"], report["batch"], report["steps"], report["batch_tokens"]
    yield "dial", ", ".join(f"{name} {value:g}" for name, value in dial.items())
    yield (
        "now",
        (
            f"{report['interactive']} interactive; {batch['seated']} bulk, {batch['parked']} of them parked for up to "
            f"{report['longest_parked_seconds']:.1f} s; room for {batch['room']}"
        ),
    )
    yield "steps", f"{steps['interactive']} with interactive requests, {steps['batch']} without"
    yield (
        "step seconds",
        ", ".join(f"{report['step_seconds'][kind] / count:.4f} {kind}" for kind, count in steps.items() if count),
    )
    yield "bulk tokens", ", ".join(f"{sum(tokens[kind].values())} in {kind} steps" for kind in tokens)
    yield "preemptions", f"{report['preemptions']}, {report['wasted_tokens']} tokens computed again"


def _flag(text: str) -> tuple[str, profile.FlagValue]:
    name, _, value = text.partition("=")
    return name, {"true": True, "false": False, "": True}.get(value.lower(), value)
