"""What clients see when something fails: OpenAI's error object, and the one table that leads there.

VelocityError
└── ApiError     an answer with a status, for a fault that was found in the request itself
"""

from __future__ import annotations

import math
from typing import Any

import orjson

from engine.client import Answer
from engine.errors import EngineError, EngineLost, EngineProtocolError, EngineTimeout, EngineUnreachable, VelocityError
from workers.errors import (
    DiskFull,
    IdempotencyConflict,
    InputError,
    LedgerFull,
    LedgerUnavailable,
    NoSuchFile,
    NoSuchJob,
    Overloaded,
    PreflightError,
    QuotaExceeded,
    StorageError,
)

Header = tuple[bytes, bytes]
JSON_TYPE: Header = (b"content-type", b"application/json")
CLOSE: Header = (b"connection", b"close")
"""Ends the connection after the answer."""


class ApiError(VelocityError):
    """An error answer: HTTP status, OpenAI's `type`, `code` and `param`, and extra headers."""

    quotes = True

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",  # noqa: A002 - OpenAI's name of the field
        code: str | None = None,
        param: str | None = None,
        headers: tuple[Header, ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.code = code
        self.param = param
        self.headers = headers

    def body(self) -> bytes:
        """OpenAI's error object."""
        error = {"message": str(self), "type": self.type, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})


# The first class that matches decides: status, type, code, seconds for Retry-After.
_TABLE: tuple[tuple[type[VelocityError], int, str, str | None, int | None], ...] = (
    (EngineUnreachable, 503, "server_error", "engine_unavailable", 5),
    (EngineTimeout, 504, "server_error", "engine_timeout", None),
    (EngineLost, 502, "server_error", "engine_lost", None),
    (EngineProtocolError, 502, "server_error", "engine_lost", None),
    (EngineError, 502, "server_error", "engine_lost", None),
    (LedgerFull, 503, "server_error", "overloaded", 30),
    (LedgerUnavailable, 503, "server_error", "redis_unavailable", 2),
    (Overloaded, 503, "server_error", "overloaded", 30),
    (PreflightError, 503, "server_error", "not_ready", 30),
    (DiskFull, 507, "server_error", "insufficient_storage", 60),
    (StorageError, 507, "server_error", "storage_failed", 30),
    (NoSuchJob, 404, "invalid_request_error", "not_found", None),
    (NoSuchFile, 404, "invalid_request_error", "not_found", None),
    (InputError, 400, "invalid_request_error", None, None),
)


def to_api_error(error: VelocityError) -> ApiError:
    """Any error of velocity as the answer that a client gets."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QuotaExceeded):
        header = (b"x-should-retry", b"false") if error.never else (b"retry-after", b"%d" % math.ceil(error.seconds))
        again = "Split the job." if error.never else "Try again when a job has ended."
        type_ = "tokens" if error.what == "tokens" else "requests"
        return ApiError(429, f"{error} {again}", type=type_, code="rate_limit_exceeded", headers=(header,))
    if isinstance(error, IdempotencyConflict):  # clients would try a 409 again by themselves
        header = (b"x-should-retry", b"false")
        return ApiError(409, str(error), code="idempotency_conflict", param="Idempotency-Key", headers=(header,))
    for kind, status, type_, code, retry in _TABLE:
        if isinstance(error, kind):
            headers = ((b"retry-after", str(retry).encode()),) if retry else ()
            param = error.param if isinstance(error, InputError) else None
            return ApiError(status, str(error), type=type_, code=code, param=param, headers=headers)
    return internal_error()


def lacks(scope: str) -> ApiError:
    """The answer to a key that may not do this."""
    return ApiError(403, f"This API key lacks the scope '{scope}'.", code="insufficient_scope")


def internal_error() -> ApiError:
    """A fault of velocity's own; what it was stands in the log."""
    return ApiError(500, "velocity failed at this request.", type="server_error", code="internal_error")


_TYPES = {401: "server_error", 403: "server_error", 404: "invalid_request_error", 429: "server_error"}


def from_engine(answer: Answer) -> ApiError:
    """The engine's own refusal in OpenAI's shape: vLLM's numeric `code` becomes a name or null."""
    content: Any = None
    try:
        content = answer.json()
    except EngineProtocolError:
        message = f"The engine answered {answer.status}."
    else:
        error = content.get("error", content) if isinstance(content, dict) else {}
        error = error if isinstance(error, dict) else {"message": str(error)}
        message = str(error.get("message") or f"The engine answered {answer.status}.")
        content = error
    param = content.get("param") if isinstance(content, dict) else None
    if answer.status in {401, 403} or answer.status >= 500:  # between velocity and its engine, not the client's fault
        status = answer.status if answer.status >= 500 else 502
        return ApiError(status, message, type="server_error", code="engine_failed")
    code = "context_length_exceeded" if "maximum context length" in message else None
    return ApiError(
        answer.status, message, type=_TYPES.get(answer.status, "invalid_request_error"), code=code,
        param=param if isinstance(param, str) else None,
    )  # fmt: skip
