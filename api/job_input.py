"""Reads POST /jobs: every item is checked before anything is accepted, and a fault is named by its place."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from api import shape
from api.gateway import Gateway
from engine.client import Endpoint, Model
from workers.errors import InputError
from workers.job import MAX_ITEMS, JobSpec, new_id
from workers.store import encode_item


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
    items: list[ItemInput] = Field(min_length=1, max_length=MAX_ITEMS)


async def parse_job(body: bytes, tenant: str, gateway: Gateway) -> tuple[JobSpec, Iterator[bytes]]:
    """The job and its encoded items. Raises InputError or ApiError 400, 404."""
    given = await asyncio.to_thread(_validate, body)  # 50,000 items take a while: not in the loop that streams
    model = await gateway.watch.resolve(given.model)
    spec = JobSpec(
        id=new_id("job"), tenant=tenant, name=given.name, endpoint=Endpoint.CHAT.value, model=model.id,
        total=len(given.items), shard_items=gateway.settings.shard_items, created=int(time.time()),
    )  # fmt: skip
    return spec, _encoded(given, model, gateway.settings.default_max_tokens)


def _validate(body: bytes) -> JobInput:
    content = shape.parse(body)
    items = content.get("items")
    if isinstance(items, list) and len(items) > MAX_ITEMS:
        raise InputError(f"A job has at most {MAX_ITEMS:,} items; this one has {len(items):,}. Split it.", "items")
    try:
        given = JobInput.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = _place(first["loc"])
        raise InputError(f"{where or 'body'}: {first['msg']}.{_named(content, first['loc'])}", where) from None
    seen: dict[str, int] = {}
    for index, item in enumerate(given.items):
        _check_item(index, item, given)
        if (earlier := seen.setdefault(item.id, index)) != index:
            raise InputError(
                f"items[{index}].id: {item.id!r} is the id of items[{earlier}] already. Ids must be unique.",
                f"items[{index}].id",
            )
    return given


def _check_item(index: int, item: ItemInput, given: JobInput) -> None:
    extra = item.model_extra or {}
    if extra.get("stream") or given.defaults.get("stream"):
        raise InputError(f"items[{index}] (id {item.id!r}): a job's items can't be streamed.", f"items[{index}].stream")
    if extra.get("model", given.model) != given.model:
        raise InputError(
            f"items[{index}] (id {item.id!r}): all items of a job use the job's model.", f"items[{index}].model"
        )


def _encoded(given: JobInput, model: Model, default_max_tokens: int) -> Iterator[bytes]:
    for item in given.items:
        body = {**given.defaults, **(item.model_extra or {}), "messages": item.messages}
        body.pop("stream", None)
        body.pop("stream_options", None)
        yield encode_item(item.id, shape.clean(Endpoint.CHAT, body, model, default_max_tokens))


def _place(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _named(content: dict[str, Any], location: tuple[int | str, ...]) -> str:
    """The id of the item at fault, if it has one."""
    if len(location) > 1 and location[0] == "items" and isinstance(location[1], int):
        item = content["items"][location[1]]
        if isinstance(item, dict) and isinstance(item.get("id"), str):
            return f" (item {item['id']!r})"
    return ""
