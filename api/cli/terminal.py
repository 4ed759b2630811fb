"""The terminal: where people read, how errors look to them, and which installation the commands speak to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import httpx
import orjson
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from api.cli.client import VelocityClient
from api.settings import ApiSettings
from api.stack import STATE_FILE
from engine.errors import SettingsError, VelocityError
from workers.errors import LedgerUnavailable

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Url = Annotated[str | None, typer.Option(envvar="VELOCITY_URL", help="Where velocity answers.")]
ApiKey = Annotated[str, typer.Option("--key", envvar="VELOCITY_API_KEY", help="API key.")]
_DEFAULT_URL = "http://127.0.0.1:8001"


def fail(message: str) -> NoReturn:
    """Say what is wrong and end with status 1."""
    err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    raise typer.Exit(1)


@contextmanager
def errors_for_people() -> Iterator[None]:
    """Expected failures become one sentence; anything else is a bug and keeps its traceback."""
    try:
        yield
    except httpx.ConnectError as error:
        fail(f"velocity does not answer at {error.request.url}. Is it running (velocity up), and there?")
    except httpx.TransportError as error:
        fail(f"The connection to velocity broke: {error or type(error).__name__}.")
    except LedgerUnavailable as error:
        fail(f"{error} Is velocity running (velocity up)? Or name its Redis with VELOCITY_REDIS_URL.")
    except (VelocityError, httpx.InvalidURL) as error:
        fail(str(error))


def client_of(url: str | None, key: str) -> VelocityClient:
    """A client of the velocity at `url`, else of the one that runs on this data directory, else at the default address.

    Raises SettingsError for a key that can't be sent.
    """
    if not key.isascii():
        raise SettingsError("The API key has characters that no key has.")
    state = load_settings().data_dir / STATE_FILE
    if url is None and state.exists():
        url = str(orjson.loads(state.read_bytes())["url"])
    return VelocityClient(url or _DEFAULT_URL, key)


def load_settings(**overrides: object) -> ApiSettings:
    """Settings of this installation: options before environment before the defaults. Raises SettingsError."""
    try:
        return ApiSettings(**{name: value for name, value in overrides.items() if value is not None})  # type: ignore[arg-type] # checked by pydantic itself
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = "_".join(str(part) for part in first["loc"]).upper()
        raise SettingsError(f"VELOCITY_{name}: {first['msg']}." if name else first["msg"]) from None


def local_settings() -> ApiSettings:
    """Settings for commands beside a running `velocity up`: its Redis and engine are found unless others were named."""
    settings = load_settings()
    state = settings.data_dir / STATE_FILE
    if not state.exists():
        return settings
    running = orjson.loads(state.read_bytes())
    found = {name: running[name] for name in running.keys() & {"redis_url", "engine_url"} - settings.model_fields_set}
    return settings.model_copy(update=found)
