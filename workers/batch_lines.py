"""The lines of a batch's output and error files, made from its records: the same ones however often they are made."""

from __future__ import annotations

import hashlib
from typing import Any

import orjson

from workers.job import Record

ANSWERED = "invalid_request"
"""Code of an item that the engine itself refused. With any other one there was no answer that could be shown."""


def batch_line(record: Record, job: str) -> bytes:
    """One line of a batch's output file, or (of an item that failed) of its error file."""
    response: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    if record.error is None:
        response = _response(record, record.body)
    elif record.error["code"] == ANSWERED:
        told = {"message": record.error["message"], "type": "invalid_request_error", "param": None, "code": None}
        response = _response(record, {"error": {**told, **_known(record.error)}})
    else:
        error = {"code": record.error["code"], "message": record.error["message"]}
    return (
        orjson.dumps({
            "id": request_id(job, record.index), "custom_id": record.id, "response": response, "error": error,
        })
        + b"\n"
    )  # fmt: skip


def request_id(job: str, index: int) -> str:
    """The id of an item's line, such as batch_req_0f…"""
    return "batch_req_" + hashlib.sha256(f"{job}/{index}".encode()).hexdigest()[:32]


def _response(record: Record, body: dict[str, Any] | None) -> dict[str, Any]:
    return {"status_code": record.status_code, "request_id": record.request_id, "body": body}


def _known(error: dict[str, str]) -> dict[str, str]:
    """What the engine said of type and param, if that was kept."""
    return {name: error[name] for name in ("type", "param") if name in error}
