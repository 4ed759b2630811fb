"""Reads POST /jobs: every item is checked before anything is accepted, and a fault is named by its place."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from api import shape
from api.errors import ApiError
from api.gateway import Gateway
from api.keys import Key
from api.request_caps import input_tokens
from api.settings import ApiSettings
from engine.client import Endpoint, Model
from workers.errors import InputError
from workers.job import MAX_ITEMS, JobSpec, new_id
from workers.store import encode_item

M = TypeVar("M", bound=BaseModel)


class ItemInput(BaseModel):
    """One request: an id of the owner's choice, messages, and whatever else chat completions take."""

    model_config = ConfigDict(extra="allow")

    id: str = Field(min_length=1, max_length=512)
    messages: list[dict[str, Any]] = Field(min_length=1)


class JobInput(BaseModel):
    """The body of POST /jobs."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = Field(default=None, max_length=512)
    model: str
    defaults: dict[str, Any] = {}
    """Fields that every item has unless it says otherwise."""
    items: list[Any] = Field(min_length=1, max_length=MAX_ITEMS)
    """Checked one by one, so that a large job does not hold up the streams of this process."""


async def parse_job(body: bytes, key: Key, gateway: Gateway) -> tuple[JobSpec, Iterator[bytes]]:
    """The job and its encoded items. Raises InputError or ApiError 400, 403, 404."""
    given, items = await asyncio.to_thread(_validate, body)  # takes a while: not in the loop that streams
    model = await gateway.watch.resolve(given.model, key)
    bodies = await asyncio.to_thread(_bodies, given, items, model, key, gateway.settings)
    spec = JobSpec(
        id=new_id("job"), tenant=key.tenant, account=key.id, name=given.name, endpoint=Endpoint.CHAT.value,
        model=model.id, total=len(items), shard_items=gateway.settings.shard_items, created=int(time.time()),
        tokens=sum(tokens for _, tokens in bodies),
    )  # fmt: skip
    return spec, (line for line, _ in bodies)


def _validate(body: bytes) -> tuple[JobInput, list[ItemInput]]:
    content = shape.parse(body)
    items = content.get("items")
    if isinstance(items, list) and len(items) > MAX_ITEMS:
        raise InputError(f"A job has at most {MAX_ITEMS:,} items; this one has {len(items):,}. Split it.", "items")
    given = _model(JobInput, content, "")
    checked: list[ItemInput] = []
    seen: dict[str, int] = {}
    for index, raw in enumerate(given.items):
        item = _model(ItemInput, raw, f"items[{index}]")
        _check_item(index, item, given)
        if (earlier := seen.setdefault(item.id, index)) != index:
            raise InputError(
                f"items[{index}].id: {item.id!r} is the id of items[{earlier}] already. Ids must be unique.",
                f"items[{index}].id",
            )
        checked.append(item)
    return given, checked


def _model(kind: type[M], content: object, place: str) -> M:
    """`content` as a `kind`. Raises InputError that names the place, and the item's id if it has one."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = place + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        where = where.removeprefix(".")
        name = content.get("id") if place and isinstance(content, dict) else None
        named = f" (item {name!r})" if isinstance(name, str) else ""
        raise InputError(f"{where or 'body'}: {first['msg']}.{named}", where) from None


def _check_item(index: int, item: ItemInput, given: JobInput) -> None:
    extra = item.model_extra or {}
    if extra.get("stream") or given.defaults.get("stream"):
        raise InputError(f"items[{index}] (id {item.id!r}): a job's items can't be streamed.", f"items[{index}].stream")
    if extra.get("model", given.model) != given.model:
        raise InputError(
            f"items[{index}] (id {item.id!r}): all items of a job use the job's model.", f"items[{index}].model"
        )


def _bodies(
    given: JobInput, items: list[ItemInput], model: Model, key: Key, settings: ApiSettings
) -> list[tuple[bytes, int]]:
    """Each item as it is stored, and the tokens that it may take: its input by length, its output by its limit."""
    encoded = []
    for index, item in enumerate(items):
        body = {**given.defaults, **(item.model_extra or {}), "messages": item.messages}
        body.pop("stream", None)
        body.pop("stream_options", None)
        try:
            cleaned = shape.clean(Endpoint.CHAT, body, model, key, settings)
        except ApiError as error:
            raise InputError(f"items[{index}] (id {item.id!r}): {error}", f"items[{index}].{error.param}") from None
        line = encode_item(item.id, cleaned)
        tokens = input_tokens(cleaned, len(line)) + shape.output_most(Endpoint.CHAT, cleaned)
        encoded.append((line, tokens))
    return encoded
