"""Tracing with OpenTelemetry, if the standard environment variables ask for it; else all but nothing.

Only what `Attributes` names can get into a span: never a prompt, an output, or a key's secret.
"""

from __future__ import annotations

import importlib
import os
import re
from typing import NamedTuple, Protocol, TypedDict, Unpack

from engine.errors import SettingsError

_TRACEPARENT = re.compile(rb"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_NEEDED = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"


class Attributes(TypedDict, total=False):
    """What a span may say. None says nothing."""

    method: str
    path: str
    route: str
    """The route's template."""
    status: int | None
    operation: str
    """OpenTelemetry's word for the endpoint: chat, text_completion, embeddings, generate_content."""
    model: str
    stream: bool
    max_tokens: int | None
    input_tokens: int | None
    output_tokens: int | None
    ttft: float | None
    """Seconds from the request's head to its first token."""
    request_id: str
    key_id: str
    """The key's public id."""
    outcome: str
    """As in the request log."""
    waited: float | None
    """Seconds of waiting for a slot."""


NAMES = {
    "method": "http.request.method",
    "path": "url.path",
    "route": "http.route",
    "status": "http.response.status_code",
    "operation": "gen_ai.operation.name",
    "model": "gen_ai.request.model",
    "stream": "gen_ai.request.stream",
    "max_tokens": "gen_ai.request.max_tokens",
    "input_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "ttft": "gen_ai.response.time_to_first_chunk",
    "request_id": "velocity.request_id",
    "key_id": "velocity.key_id",
    "outcome": "velocity.outcome",
    "waited": "velocity.waited",
}
"""The attributes' names outside: OpenTelemetry's semantic conventions where there is one."""


class Parent(NamedTuple):
    """The caller's span, as W3C's traceparent header names it."""

    trace_id: int
    span_id: int
    flags: int
    """Bit 0: the trace is recorded. Bit 1: its id is random."""


class Span(Protocol):
    """One request."""

    recording: bool
    """Whether what is said of it is kept."""

    @property
    def traceparent(self) -> bytes | None:
        """The header to send to the engine, which makes its spans children of this one."""

    def set(self, **attributes: Unpack[Attributes]) -> None:
        """Say more about it."""

    def end(self, error: str | None = None) -> None:
        """It is over. `error` is the class of a failure ("EngineLost"), never its message."""


class Tracer(Protocol):
    """Makes spans. One per process."""

    def begin(self, name: str, traceparent: bytes | None) -> Span:
        """Begin a span; `name` is a route's template, `traceparent` the client's header."""

    def close(self) -> None:
        """Send what is left. Blocks for a bounded time: call it in a thread, at the end of the process."""


class NoTracing:
    """Hands the client's own traceparent on, and does nothing else."""

    def begin(self, name: str, traceparent: bytes | None) -> Span:  # noqa: ARG002 - of Tracer
        """A span that is kept nowhere."""
        return _NoSpan(traceparent) if parent_of(traceparent) else _NOTHING

    def close(self) -> None:
        """Nothing is left."""


class _NoSpan:
    __slots__ = ("recording", "traceparent")

    def __init__(self, traceparent: bytes | None) -> None:
        self.traceparent = traceparent
        self.recording = False

    def set(self, **attributes: Unpack[Attributes]) -> None:
        """Nobody listens."""

    def end(self, error: str | None = None) -> None:
        """Nobody listens."""


_NOTHING = _NoSpan(None)


def parent_of(traceparent: bytes | None) -> Parent | None:
    """The span that a traceparent header names; None if there is none, or if it is not well-formed."""
    found = _TRACEPARENT.fullmatch(traceparent) if traceparent else None
    if not found:
        return None
    trace_id, span_id, flags = (int(part, 16) for part in found.groups())
    return Parent(trace_id, span_id, flags & 3) if trace_id and span_id else None


def load(service: str) -> Tracer:
    """The tracer that OpenTelemetry's own environment variables ask for; `service` names the process.

    Without an OTLP endpoint there is no tracing, and OpenTelemetry is not even imported. Raises SettingsError.
    """
    if not _wanted():
        return NoTracing()
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol not in {None, "", "http/protobuf"}:
        raise SettingsError(f"Traces leave as http/protobuf; OTEL_EXPORTER_OTLP_PROTOCOL asks for {protocol}.")
    try:
        module = importlib.import_module("api.tracing_otel")
    except ImportError as error:
        raise SettingsError(
            "OTEL_EXPORTER_OTLP_ENDPOINT asks for tracing, for which a package is missing "
            f"({error.name}): pip install 'velocity-serving[tracing]'"
        ) from None
    try:
        tracer: Tracer = module.OtelTracer(service)
    except ValueError as error:
        raise SettingsError(f"OpenTelemetry can't use its environment variables: {error}") from None
    return tracer


def _wanted() -> bool:
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    return any(os.environ.get(name) for name in _NEEDED)
