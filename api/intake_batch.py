"""What a batch takes: an uploaded file of requests, checked line by line, and then against the batch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.errors import ApiError
from api.intake_lines import Lines, checked, encoded_item, parsed
from api.job_input import Metadata, Window
from api.keys import Key
from api.settings import ApiSettings
from engine.client import Endpoint, Model
from workers.errors import InputError
from workers.job import MAX_ITEMS, JobSpec
from workers.store import JobFiles

MOST_ERRORS = 100
"""Of a batch's faults so many are told."""
EXPIRY_LEAST, EXPIRY_MOST = 3600, 30 * 86400

Fault = dict[str, Any]
"""One of a failed batch's errors: code, line, message, param."""


class LineInput(BaseModel):
    """One line of an input file."""

    model_config = ConfigDict(extra="ignore")

    custom_id: str = Field(min_length=1, max_length=512)
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


class Expiry(BaseModel):
    """When a file goes away by itself."""

    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"]
    seconds: int = Field(ge=EXPIRY_LEAST, le=EXPIRY_MOST)


class BatchInput(BaseModel):
    """The body of POST /v1/batches."""

    model_config = ConfigDict(extra="forbid")

    input_file_id: str = Field(max_length=64)
    endpoint: Endpoint
    completion_window: Window
    """Time after which lines that have not finished expire, such as 24h, 90m or 7d."""
    metadata: Metadata | None = None
    output_expires_after: Expiry | None = None


def check_file(lines: Lines) -> None:
    """Raises InputError that names the first line which no batch could run; StorageError."""
    if not lines.last:
        raise InputError("The file is empty: send one request a line.", "file")
    if lines.last > MAX_ITEMS:
        raise InputError(f"A file has at most {MAX_ITEMS:,} lines; this one has {lines.last:,}. Split it.", "file")
    seen: dict[str, int] = {}
    for number, line in enumerate(lines.read(), 1):
        given = _line(line, number)
        if (earlier := seen.setdefault(given.custom_id, number)) != number:
            raise InputError(
                f"line {number}.custom_id: {given.custom_id!r} is on line {earlier} already. Each must be unique.",
                f"line {number}.custom_id",
            )
        if given.body.get("stream"):
            raise InputError(f"line {number}: a batch's requests can't be streamed.", f"line {number}.body.stream")


def first_model(lines: Lines) -> object:
    """What the first line names as its model. Raises InputError, StorageError."""
    return _line(next(lines.read(), b""), 1).body.get("model")


def write_batch(
    lines: Lines, spec: JobSpec, name: object, model: Model, key: Key, settings: ApiSettings
) -> tuple[JobSpec, list[Fault]]:
    """Make the batch's files: the spec with its tokens; or its faults, and then there are no files.

    Every line must ask for the model that the first one names, by the same `name`. Raises InputError, StorageError.
    """
    faults: list[Fault] = []
    tokens = 0
    with JobFiles(settings.data_dir, spec.tenant, spec.id).draft() as draft:
        for number, line in enumerate(lines.read(), 1):
            given = _line(line, number)
            fault = _mismatch(given, number, spec.endpoint, name)
            if fault is None:
                try:
                    item, most = encoded_item(
                        Endpoint(spec.endpoint), given.custom_id, given.body, model, key, settings
                    )
                except ApiError as error:
                    param = f"body.{error.param}" if error.param else "body"
                    fault = fault_of(error.code or "invalid_request", number, str(error), param)
            if fault is not None:
                faults.append(fault)
                if len(faults) == MOST_ERRORS:
                    break
            elif not faults:
                draft.add(item)
                tokens += most
        if not faults:
            spec = spec.model_copy(update={"total": draft.count, "tokens": tokens})
            draft.publish(spec)
    return spec, faults


def fault_of(code: str, line: int | None, message: str, param: str | None) -> Fault:
    """One of a failed batch's errors."""
    return {"code": code, "line": line, "message": message, "param": param}


def _mismatch(given: LineInput, number: int, endpoint: str, name: object) -> Fault | None:
    if given.url != endpoint:
        return fault_of("invalid_url", number, f"The url must be the batch's endpoint, {endpoint}.", "url")
    if given.body.get("model") != name:
        text = f"All lines of a batch use one model; the first line names {name!r}."
        return fault_of("mismatched_model", number, text, "body.model")
    return None


def _line(line: bytes, number: int) -> LineInput:
    where = f"line {number}"
    content = parsed(line, number)
    return checked(LineInput, content, where, where)
