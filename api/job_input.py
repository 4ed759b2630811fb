"""What POST /jobs takes: checked item by item before anything is accepted, and a fault is named by its place.

A job comes as one JSON object, or as lines: the object without its items, and then an item a line. The object is made
into lines first, so that there is one way from there on. All of this runs in a thread or in the intake's process.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from api import shape
from api.errors import ApiError
from api.intake_lines import Lines, checked, encoded_item, parsed
from api.keys import Key
from api.settings import ApiSettings
from engine.client import Endpoint, Model
from workers import durable
from workers.errors import InputError
from workers.job import MAX_ITEMS, JobSpec
from workers.store import JobFiles

_WINDOW = re.compile(r"([0-9]{1,6})([mhd])")
_UNITS = {"m": 60, "h": 3600, "d": 86400}
_WINDOW_LEAST, _WINDOW_MOST = 60, 30 * 86400


def window_seconds(window: str) -> int:
    """Seconds of a completion window such as 90m, 24h or 7d. Raises ValueError."""
    found = _WINDOW.fullmatch(window)
    seconds = int(found[1]) * _UNITS[found[2]] if found else 0
    if not _WINDOW_LEAST <= seconds <= _WINDOW_MOST:
        raise ValueError("Write a time of 1 minute to 30 days as 90m, 24h or 7d")
    return seconds


def _checked_window(window: str) -> str:
    window_seconds(window)
    return window


Window = Annotated[str, AfterValidator(_checked_window)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class ItemInput(BaseModel):
    """One request: an id of the owner's choice, messages, and whatever else chat completions take."""

    model_config = ConfigDict(extra="allow")

    id: str = Field(min_length=1, max_length=512)
    messages: list[dict[str, Any]] = Field(min_length=1)


class PromptItem(BaseModel):
    """The same for completions."""

    id: str = Field(min_length=1, max_length=512)
    prompt: str | list[Any] = Field(min_length=1)


class InputItem(BaseModel):
    """The same for responses and embeddings."""

    id: str = Field(min_length=1, max_length=512)
    input: str | list[Any] = Field(min_length=1)


_ITEMS: dict[Endpoint, type[BaseModel]] = {
    Endpoint.CHAT: ItemInput,
    Endpoint.COMPLETIONS: PromptItem,
    Endpoint.RESPONSES: InputItem,
    Endpoint.EMBEDDINGS: InputItem,
}


class JobHead(BaseModel):
    """The body of POST /jobs without its items."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = Field(default=None, max_length=512)
    model: str
    endpoint: Endpoint = Endpoint.CHAT
    """What the items are requests to."""
    defaults: dict[str, Any] = {}
    """Fields that every item has unless it says otherwise."""
    completion_window: Window | None = None
    """Time after which items that have not finished expire, such as 90m, 24h or 7d."""
    max_error_rate: float | None = Field(default=None, ge=0, le=1)
    """Share of the items that may fail before the job is stopped."""
    priority: int = Field(default=0, ge=-100, le=100, strict=True)
    """Among the jobs of the same key the higher one goes first."""
    webhook: str | None = Field(default=None, max_length=2048, pattern="^https?://")
    """Address that is told when the job is over."""
    metadata: Metadata | None = None


class JobInput(JobHead):
    """The body of POST /jobs."""

    items: list[Any] = Field(min_length=1, max_length=MAX_ITEMS)
    """Checked one by one, each named by its place."""


@dataclass(frozen=True, slots=True)
class JobLines:
    """A job on the disk: its head on the first line, an item on each further one."""

    lines: Lines
    counted: bool
    """Whether the client sent lines, and so finds an item by the number of its line."""

    def where(self, index: int) -> str:
        """An item's place as its sender sees it."""
        return f"line {index + 2}" if self.counted else f"items[{index}]"


def split_job(body: Path, lines: Path) -> tuple[JobHead, JobLines]:
    """Make lines of one JSON object. Raises ApiError, InputError, StorageError."""
    with durable.storage("The job can't be read"):
        content = shape.parse(body.read_bytes())
    items = content.get("items")
    if isinstance(items, list):
        _require_few(len(items))
    given = checked(JobInput, content, "", "")
    with durable.storage("The job can't be stored"), lines.open("wb") as file:
        file.write(b"\n")
        for item in given.items:
            file.write(orjson.dumps(item) + b"\n")
        size = file.tell()
    head = JobHead.model_validate(given.model_dump(exclude={"items"}))
    return head, JobLines(Lines(lines, len(given.items) + 1, size), counted=False)


def read_head(lines: Lines) -> tuple[JobHead, JobLines]:
    """The first of a job's lines. Raises ApiError, InputError, StorageError."""
    if lines.last < 1:
        raise InputError("line 1: the first line must be the job, without its items.", "line 1")
    source = lines.read()
    head = checked(JobHead, parsed(next(source), 1), "line 1", "")
    if lines.last < 2:
        raise InputError("A job needs at least one item: send each on a line of its own after the first.", "items")
    _require_few(lines.last - 1)
    return head, JobLines(lines, counted=True)


def write_job(source: JobLines, head: JobHead, spec: JobSpec, model: Model, key: Key, settings: ApiSettings) -> JobSpec:
    """Check every item and make the job's files; the spec with its tokens. Raises InputError, StorageError."""
    seen: dict[str, int] = {}
    tokens = 0
    items = source.lines.read()
    next(items)
    with JobFiles(settings.data_dir, spec.tenant, spec.id).draft() as draft:
        for index, line in enumerate(items):
            where, place = source.where(index), f"items[{index}]"
            item = _item(line, head, source, index)
            item_id = item.pop("id")
            if (earlier := seen.setdefault(item_id, index)) != index:
                there = source.where(earlier)
                text = f"{where}.id: {item_id!r} is the id of {there} already. Ids must be unique."
                raise InputError(text, f"{place}.id")
            body = {**head.defaults, **item}
            try:
                encoded, most = encoded_item(head.endpoint, item_id, body, model, key, settings)
            except ApiError as error:
                raise InputError(f"{where} (id {item_id!r}): {error}", f"{place}.{error.param}") from None
            draft.add(encoded)
            tokens += most
        spec = spec.model_copy(update={"total": draft.count, "tokens": tokens})
        draft.publish(spec)
    return spec


def _item(line: bytes, head: JobHead, source: JobLines, index: int) -> dict[str, Any]:
    """An item, checked for what any item must be. Raises InputError."""
    where, place = source.where(index), f"items[{index}]"
    item = parsed(line, index + 2) if source.counted else orjson.loads(line)
    checked(_ITEMS[head.endpoint], item, where, place)
    name = f"{where} (id {item['id']!r})"
    if item.get("stream") or head.defaults.get("stream"):
        raise InputError(f"{name}: a job's items can't be streamed.", f"{place}.stream")
    if item.get("model", head.model) != head.model:
        raise InputError(f"{name}: all items of a job use the job's model.", f"{place}.model")
    return dict(item)


def _require_few(items: int) -> None:
    if items > MAX_ITEMS:
        raise InputError(f"A job has at most {MAX_ITEMS:,} items; this one has {items:,}. Split it.", "items")
