"""`velocity keys …`: API keys of this installation, made, changed and ended beside a running velocity."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import typer
from rich.markup import escape
from rich.table import Column, Table

from api.cli.terminal import errors_for_people, local_settings, out
from api.fast_redis import FastRedis
from api.key_store import Keys, checked
from api.keys import Key, Scope, Terms
from api.metrics import Metrics
from api.routes.admin import key_view
from api.settings import ApiSettings
from engine.errors import SettingsError

app = typer.Typer(no_args_is_help=True, help="API keys: make, list, show, change, end, renew.")

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_LIMITS = ("rpm", "burst", "tpm", "concurrency", "max_tokens", "bulk_jobs", "bulk_items", "bulk_tokens")

T = TypeVar("T")

KeyId = Annotated[str, typer.Argument(help="The key's id: the part after vk_ (see `velocity keys list`).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _limit(text: str) -> Any:
    return typer.Option(min=0, help=f"{text}; 0 is no limit.")


Rpm = Annotated[int | None, _limit("Interactive requests per minute")]
Burst = Annotated[int | None, _limit("Requests that may come at once (default: a minute's worth)")]
Tpm = Annotated[int | None, _limit("Tokens per minute, input and output")]
Concurrency = Annotated[int | None, _limit("Interactive requests at the same time")]
MaxTokens = Annotated[int | None, _limit("Most output tokens of one request")]
BulkJobs = Annotated[int | None, _limit("Active bulk jobs of the key's tenant")]
BulkItems = Annotated[int | None, _limit("Items in active jobs of the tenant")]
BulkTokens = Annotated[int | None, _limit("Tokens reserved by active jobs of the tenant")]
Scopes = Annotated[list[Scope] | None, typer.Option("--scope", help="May be given several times.")]
Models = Annotated[list[str] | None, typer.Option("--model", help="Only these models; 'any' lifts that.")]
Expires = Annotated[str | None, typer.Option(help="A time from now (12h, 30d), a date (2027-01-31), or 'never'.")]


@app.command()
def create(
    name: str, rpm: Rpm = None, burst: Burst = None, tpm: Tpm = None, concurrency: Concurrency = None,
    max_tokens: MaxTokens = None, bulk_jobs: BulkJobs = None, bulk_items: BulkItems = None,
    bulk_tokens: BulkTokens = None, scope: Scopes = None, model: Models = None, expires: Expires = None,
    tenant: Annotated[str | None, typer.Option(help="An existing owner; by default a new one.")] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Make a key. It is shown this once."""
    changes = _changes(locals())
    with errors_for_people():
        key, text = _with_keys(lambda keys: keys.create(checked(Terms, {"name": name, **changes}), tenant))
    _show_text(key, text, as_json=as_json)


@app.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """Every key of this installation."""
    with errors_for_people():
        keys = _with_keys(lambda store: store.all())
    if as_json:
        out.print_json(data=[key_view(key) for key in keys])
        return
    if not keys:
        out.print("There are no keys yet: velocity keys create NAME")
        return
    table = Table(
        Column("id", no_wrap=True), "name", "state", "scopes", "limits", "tenant", box=None, header_style="bold"
    )
    for key in keys:
        limits = ", ".join(f"{name} {value:,}" for name in _LIMITS if (value := getattr(key, name)))
        table.add_row(
            key.id, escape(key.name), _state(key), " ".join(key.scopes), limits or "none", key.tenant[:15] + "…"
        )
    out.print(table)


@app.command()
def show(key_id: KeyId) -> None:
    """One key, as JSON."""
    with errors_for_people():
        out.print_json(data=key_view(_with_keys(lambda keys: keys.get(key_id))))


@app.command()
def update(
    key_id: KeyId, name: str | None = None, rpm: Rpm = None, burst: Burst = None, tpm: Tpm = None,
    concurrency: Concurrency = None, max_tokens: MaxTokens = None, bulk_jobs: BulkJobs = None,
    bulk_items: BulkItems = None, bulk_tokens: BulkTokens = None, scope: Scopes = None, model: Models = None,
    expires: Expires = None,
    enabled: Annotated[bool | None, typer.Option("--enable/--disable", help="A disabled key opens nothing.")] = None,
) -> None:  # fmt: skip
    """Change some of a key's terms; what is not named stays."""
    changes = _changes(locals())
    changes |= {field: value for field, value in (("name", name), ("enabled", enabled)) if value is not None}
    with errors_for_people():
        if not changes:
            raise SettingsError("Nothing to change: name at least one option (velocity keys update --help).")
        key = _with_keys(lambda keys: keys.update(key_id, **changes))
    out.print_json(data=key_view(key))


@app.command()
def revoke(key_id: KeyId) -> None:
    """End a key for good; its streams are ended within seconds, its tenant's jobs go on."""
    with errors_for_people():
        key = _with_keys(lambda keys: keys.revoke(key_id))
    out.print(f"{key.id} ({key.name}) is revoked.")


@app.command()
def rotate(
    key_id: KeyId,
    grace: Annotated[str, typer.Option(help="For how long the old text is still accepted: 10m, 24h.")] = "0s",
    as_json: AsJson = False,
) -> None:
    """A new text for a key; limits, usage and jobs stay. It is shown this once."""
    with errors_for_people():
        seconds = _seconds(grace)
        key, text = _with_keys(lambda keys: keys.rotate(key_id, seconds))
    _show_text(key, text, as_json=as_json)


@asynccontextmanager
async def opened(settings: ApiSettings) -> AsyncIterator[Keys]:
    """The keys in an installation's data directory and Redis."""
    redis = FastRedis(settings.redis_url, settings.redis_timeout, Metrics())
    try:
        yield Keys(redis, settings.data_dir)
    finally:
        await redis.aclose()


def _with_keys(work: Callable[[Keys], Awaitable[T]]) -> T:
    async def run() -> T:
        async with opened(local_settings()) as keys:
            return await work(keys)

    return asyncio.run(run())


def _changes(options: dict[str, Any]) -> dict[str, Any]:
    """The terms that were named on the command line; 0 lifts a limit."""
    changes: dict[str, Any] = {name: options[name] or None for name in _LIMITS if options[name] is not None}
    if options["scope"]:
        changes["scopes"] = tuple(dict.fromkeys(options["scope"]))
    if options["model"]:
        changes["models"] = None if "any" in options["model"] else tuple(options["model"])
    if options["expires"]:
        with errors_for_people():
            changes["expires"] = _expiry(options["expires"])
    return changes


def _expiry(text: str) -> int | None:
    if text == "never":
        return None
    try:
        return int(datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp())
    except ValueError:
        return int(time.time()) + _seconds(text)


def _seconds(text: str) -> int:
    """Raises SettingsError."""
    found = re.fullmatch(r"(\d{1,6})([smhdw])", text)
    if not found:
        raise SettingsError(f"{text!r} is no time: write 30s, 10m, 12h, 30d or 4w.")
    return int(found[1]) * _UNITS[found[2]]


def _state(key: Key) -> str:
    if key.revoked:
        return "[red]revoked[/]"
    if not key.enabled:
        return "[yellow]disabled[/]"
    if not key.usable:
        return "[yellow]expired[/]"
    return "active" + (f" until {datetime.fromtimestamp(key.expires, UTC):%Y-%m-%d}" if key.expires else "")


def _show_text(key: Key, text: str, *, as_json: bool) -> None:
    if as_json:
        out.print_json(data={"key": text, **key_view(key)})
        return
    out.print(text, soft_wrap=True)
    out.print("[dim]Keep it: it is not shown again. Send it as 'Authorization: Bearer …'.[/]")
    if key.former_hash and key.former_until > time.time():
        until = datetime.fromtimestamp(key.former_until, UTC)
        out.print(f"[dim]The old one is accepted until {until:%Y-%m-%d %H:%M} UTC.[/]")
