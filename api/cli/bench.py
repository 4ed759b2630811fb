"""`velocity bench …`: measure a deployment."""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from api.bench.blocks import Arm, BlockRunner, Shape, Target
from api.bench.calibrate import BULK, DUTIES, BenchError, Duty
from api.bench.canary import Canary
from api.bench.figures import Record
from api.bench.run import Run, machine
from api.bench.tables import markdown
from api.cli.client import AnswerError, VelocityClient
from api.cli.terminal import ApiKey, Url, client_of, err, errors_for_people, out
from engine.errors import SettingsError
from engine.stopping import run_until_signal

app = typer.Typer(no_args_is_help=True, help="Measure a deployment.")

_ARMS = (Arm("A", "V"), Arm("B", "V", people=False, bulk="job"), Arm("V", "V", bulk="job"))


@app.callback()
def bench() -> None:
    """Measure a deployment."""


@app.command()
def coserve(
    model: Annotated[str, typer.Option(help="Model to ask for.")] = "velocity-30b",
    seconds: Annotated[float, typer.Option(min=1, help="Length of a block.")] = 45,
    rounds: Annotated[int, typer.Option(min=1, help="How often each block is run.")] = 2,
    duty: Annotated[str, typer.Option(help=f"Presence of people, comma-separated: {', '.join(DUTIES)}.")] = "50",
    lead: Annotated[float, typer.Option(min=0, help="Seconds of bulk before a block counts.")] = 20,
    seed: Annotated[int, typer.Option(help="Changes when people come.")] = 1,
    plot: Annotated[Path | None, typer.Option(help="Draw to this PNG file (extra: bench).")] = None,
    url: Url = None,
    key: ApiKey = "",
) -> None:
    """What chat and bulk cost each other: people alone (A), bulk alone (B), both (V), in turns on one velocity.

    Needs a key with the scopes chat and jobs and no narrow limits, and nothing else to run meanwhile. Its jobs are
    cancelled and deleted as it goes.
    """
    with errors_for_people():
        duties = duties_of(duty)
        draw = plotter() if plot else None
        records: list[Record] = []

        async def run() -> None:
            async with client_of(url, key) as client:
                await require_scopes(client, model)
                target = Target("V", client.url, key, model)
            with Canary() as canary:
                runner = BlockRunner(Shape(seconds, lead, BULK), canary, time.time_ns() // 10**9 % 10**6)
                arms = {one.name: list(_ARMS) for one in duties}
                work = Run(runner, {"V": target}, arms, duties, seconds, rounds, seed, _say, records.append)
                await work.run()

        about = machine()
        stopped = asyncio.run(run_until_signal(run()))
        if records:
            out.print(markdown(records, about), markup=False, soft_wrap=True)
        if records and draw and plot:
            draw(records, plot)
            out.print(f"{plot} is drawn.", markup=False)
        if stopped:
            raise typer.Exit(1)


async def require_scopes(client: VelocityClient, model: str) -> None:
    """Ask for what the benchmark needs before it takes anybody's time. Raises BenchError that says what is missing."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    asked: dict[str, tuple[str, str, dict[str, Any]]] = {
        "jobs": ("GET", "/jobs", {"params": {"limit": 1}}),
        "chat": ("POST", "/v1/chat/completions", {"json": body}),
    }
    for scope, (method, path, options) in asked.items():
        try:
            await client.json(method, path, **options)
        except AnswerError as error:
            raise BenchError(
                f"The benchmark can't run with this key: {error} It needs the scopes chat and jobs "
                f"(velocity keys create bench --scope chat --scope jobs); what failed was {scope}."
            ) from None


def duties_of(names: str) -> list[Duty]:
    """Raises SettingsError for a name that is none."""
    found = [name.strip() for name in names.split(",")]
    if unknown := sorted(set(found) - set(DUTIES)):
        raise SettingsError(f"There is no duty {', '.join(unknown)}. There are: {', '.join(DUTIES)}.")
    return [DUTIES[name] for name in found]


def plotter() -> Callable[[list[Record], Path], None]:
    """What draws. Raises SettingsError without matplotlib."""
    try:
        module = importlib.import_module("api.bench.plot")
    except ImportError as error:
        raise SettingsError(
            f"Plots need a package that is missing ({error.name}): pip install 'velocity-serving[bench]'"
        ) from None
    draw: Callable[[list[Record], Path], None] = module.plot
    return draw


def _say(line: str) -> None:
    err.print(line, style="dim", markup=False, soft_wrap=True)
