"""`python -m tests.chaos --seconds 600 --seed 7`: chaos for longer; status 1 if anything was lost or wrong."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from tests.chaos.run import Plan, chaos


def main(
    seconds: Annotated[float, typer.Option(help="How long things go wrong.")] = 600,
    seed: Annotated[int | None, typer.Option(help="Draws the faults; a random one by default.")] = None,
    gap: Annotated[float, typer.Option(help="Mean seconds between two faults.")] = 0.8,
    items: Annotated[int, typer.Option(help="Items, at least.")] = 20_000,
    idempotent: Annotated[bool, typer.Option(help="Submit with an Idempotency-Key.")] = True,
    quarantine: Annotated[bool, typer.Option(help="Run a worker of the quarantine lane too.")] = True,
) -> None:
    """Kill, freeze and cut off velocity's processes at random while it works, and look for every item."""
    drawn = random.randrange(10**6) if seed is None else seed  # noqa: S311 - no secret
    typer.echo(f"seed {drawn}")
    plan = Plan(seconds=seconds, seed=drawn, gap=gap, items=items, idempotent=idempotent, quarantine=quarantine)
    with tempfile.TemporaryDirectory(prefix="velocity-chaos-") as directory:
        report = uvloop.run(chaos(plan, Path(directory)))
    report.show()
    raise typer.Exit(bool(report.findings.wrong))


if __name__ == "__main__":
    typer.run(main)
