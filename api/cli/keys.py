"""`velocity keys …`: make API keys."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from api.cli.terminal import errors_for_people, local_settings, out
from api.keys import Key, Keys
from api.settings import ApiSettings
from workers.redis import connect

app = typer.Typer(no_args_is_help=True, help="API keys.")


@app.command()
def create(
    name: str,
    rpm: Annotated[int | None, typer.Option(min=1, help="Requests per minute; without it, unlimited.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the key and its record as JSON.")] = False,
) -> None:
    """Make a key for a new tenant. It is shown this once."""
    with errors_for_people():
        key, text = asyncio.run(issue(local_settings(), name, rpm))
    if as_json:
        out.print_json(data={"key": text, **key.model_dump(exclude={"hash"})})
        return
    out.print(text, soft_wrap=True)
    out.print("[dim]Keep it: it is not shown again. Send it as 'Authorization: Bearer …'.[/]")


async def issue(settings: ApiSettings, name: str, rpm: int | None) -> tuple[Key, str]:
    """A new key in this installation's data directory and Redis."""
    redis = connect(settings.redis_url, settings.redis_timeout)
    try:
        return await Keys(redis, settings.data_dir).create(name, rpm)
    finally:
        await redis.aclose()


@app.callback()
def group() -> None:
    """Keep `create` a subcommand while it is the only one."""
