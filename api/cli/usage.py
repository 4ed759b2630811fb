"""`velocity usage`: what each key used, by day."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from api.cli.keys import opened
from api.cli.terminal import errors_for_people, local_settings, out
from api.keys import ANYONE
from api.settings import ApiSettings
from api.usage_store import MOST_DAYS, DayUsage, UsageStore, usage_view
from workers.redis import connect


def usage(
    key: Annotated[str | None, typer.Option("--id", help="Only the key with this id.")] = None,
    days: Annotated[int, typer.Option(min=1, max=MOST_DAYS, help="Days back from today (UTC).")] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Requests, tokens and refusals per key and day, interactive and bulk apart."""
    with errors_for_people():
        names, found = asyncio.run(_read(local_settings(), key, days))
    if as_json:
        out.print_json(data=[usage_view(day) for day in found])
        return
    if not found:
        out.print("Nothing was used in that time.")
        return
    table = Table(box=None, header_style="bold")
    for column in ("day", "key", "name", "traffic"):
        table.add_column(column, no_wrap=column != "name", overflow="fold")
    for column in ("requests", "input", "output", "refused"):  # tokens in the middle
        table.add_column(column, justify="right", no_wrap=True)
    for day in found:
        for traffic, used in (("interactive", day.interactive), ("bulk", day.bulk)):
            counts = (used.requests, used.input_tokens, used.output_tokens, used.refused)
            if any(counts):
                row = (day.date, day.key, escape(names.get(day.key, "")), traffic)
                table.add_row(*row, *(f"{n:,}" for n in counts))
    out.print(table)


async def _read(settings: ApiSettings, key: str | None, days: int) -> tuple[dict[str, str], list[DayUsage]]:
    redis = connect(settings.redis_url, settings.redis_timeout)
    try:
        async with opened(settings) as keys:
            names = {one.id: one.name for one in ([await keys.get(key)] if key else [*await keys.all(), ANYONE])}
        return names, await UsageStore(redis).of(list(names), days)
    finally:
        await redis.aclose()
