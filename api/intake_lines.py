"""Reads the lines of an input from the disk, one at a time, and checks what is on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from api import shape
from api.errors import ApiError
from api.keys import Key
from api.request_caps import check_depth, input_tokens
from api.settings import ApiSettings
from engine.client import Endpoint, Model
from workers import durable
from workers.errors import InputError
from workers.store import encode_item

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Lines:
    """A job's or a batch's input on the disk, one item a line."""

    path: Path
    last: int
    """Number of the last line that is not blank, from 1 on."""
    longest: int
    """Most bytes of a line."""

    def read(self) -> Iterator[bytes]:
        """Every line, one at a time in memory. Raises InputError, StorageError."""
        with durable.storage("The input can't be read"), self.path.open("rb") as file:
            for number in range(1, self.last + 1):
                line = file.readline(self.longest + 1)
                if len(line) > self.longest:
                    raise InputError(f"line {number}: it is longer than {self.longest:,} bytes.", f"line {number}")
                yield line


def parsed(line: bytes, number: int) -> dict[str, Any]:
    """The object on a line. Raises InputError that names the line."""
    where = f"line {number}"
    if not line.strip():
        raise InputError(f"{where}: it is blank. Only lines at the end may be.", where)
    try:
        content = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise InputError(f"{where}: it is not valid JSON: {error}.", where) from None
    if not isinstance(content, dict):
        raise InputError(f"{where}: it must be a JSON object.", where)
    try:
        check_depth(content)
    except ApiError as error:
        raise InputError(f"{where}: {error}", where) from None
    return content


def checked(kind: type[M], content: object, where: str, place: str) -> M:
    """`content` as a `kind`. Raises InputError that says `where` it is and, as `param`, its `place`."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        name = content.get("id") if place and isinstance(content, dict) else None
        named = f" (item {name!r})" if isinstance(name, str) else ""
        what = first["msg"].removeprefix("Value error, ")
        raise InputError(
            f"{(where + path).removeprefix('.') or 'body'}: {what}.{named}", (place + path).removeprefix(".")
        ) from None


def encoded_item(
    endpoint: Endpoint, item_id: str, body: dict[str, Any], model: Model, key: Key, settings: ApiSettings
) -> tuple[bytes, int]:
    """An item as it is stored, and the tokens that it may take: its input by length, its output by its limit.

    Raises ApiError 400.
    """
    body.pop("stream", None)
    body.pop("stream_options", None)
    cleaned = shape.clean(endpoint, body, model, key, settings)
    line = encode_item(item_id, cleaned)
    return line, input_tokens(cleaned, len(line)) + shape.output_most(endpoint, cleaned)
