"""`velocity up`: everything on one machine, in the foreground."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from api.cli.terminal import err, errors_for_people, load_settings
from api.settings import ApiSettings
from api.stack import Stack
from engine import log, profile
from engine.stopping import run_until_signal


def up(
    port: Annotated[int | None, typer.Option(help="Port of the api.")] = None,
    data: Annotated[Path | None, typer.Option(help="Data directory.")] = None,
    engine_profile: Annotated[str | None, typer.Option("--profile", help="Engine profile.")] = None,
    redis_url: Annotated[str | None, typer.Option(help="Use this Redis instead of an embedded one.")] = None,
    engine_url: Annotated[str | None, typer.Option(help="Use this engine instead of starting one.")] = None,
    open_mode: Annotated[bool, typer.Option("--open", help="Serve without keys (private machines only).")] = False,
) -> None:
    """Run Redis, engine, worker and api; restart what dies; end all of it on Ctrl-C."""
    with errors_for_people():
        settings = load_settings(
            port=port, data_dir=data, profile=engine_profile, redis_url=redis_url, engine_url=engine_url,
            open=open_mode or None,
        )  # fmt: skip
        log.configure(settings, "up")
        profile.load(settings.profile)
        given = settings.model_fields_set
        stack = Stack(settings, say, own_redis="redis_url" not in given, own_engine="engine_url" not in given)
        asyncio.run(_run(stack, settings))


def say(message: str) -> None:
    """One line of what is going on."""
    err.print(Text.assemble(("velocity ", "dim"), message), soft_wrap=True)


async def _run(stack: Stack, settings: ApiSettings) -> None:
    async def work() -> None:
        say(f"starting; logs in {stack.logs}")
        async with stack.running():
            err.print(f"[bold green]ready[/]: OPENAI_BASE_URL={stack.url}/v1", soft_wrap=True)
            where = f"VELOCITY_DATA_DIR={settings.data_dir} " if "data_dir" in settings.model_fields_set else ""
            how = "any key will do (open mode)" if settings.open else f"make a key: {where}velocity keys create NAME"
            say(how)
            say(f"health: {stack.url}/health; Ctrl-C ends everything")
            await stack.supervise()

    if await run_until_signal(work()):
        say("ended")
