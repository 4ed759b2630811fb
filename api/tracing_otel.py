"""The tracer with OpenTelemetry behind it. Only api/tracing.py imports this, and only if tracing was asked for.

Spans are sent from a thread of their own, in batches. A collector that fails costs spans, never a request.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Unpack

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from api.metrics import installed_version
from api.tracing import NAMES, Attributes, Span, parent_of
from engine import log

_CLOSE_SECONDS = 3.0
"""What is left at the end may take so long to leave."""

logger = log.get(__name__)


class OtelTracer:
    """Spans to the collector that OTEL_EXPORTER_OTLP_ENDPOINT names. Nothing global is set."""

    def __init__(self, service: str) -> None:
        own = {"service.name": service, "service.version": installed_version()}
        resource = Resource.create({**own, **OTELResourceDetector().detect().attributes})  # the environment wins
        self._exporter = _Exporter(OTLPSpanExporter())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("velocity", installed_version())
        # OpenTelemetry logs every batch and every retry that fails; _Exporter says it once.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)

    def begin(self, name: str, traceparent: bytes | None) -> Span:
        """A span below the client's, if the client has one and says so properly."""
        context = Context()
        if parent := parent_of(traceparent):
            flags = trace.TraceFlags(parent.flags)
            remote = trace.SpanContext(parent.trace_id, parent.span_id, is_remote=True, trace_flags=flags)
            context = trace.set_span_in_context(trace.NonRecordingSpan(remote), context)
        return _OtelSpan(self._tracer.start_span(name, context, kind=trace.SpanKind.SERVER))

    def close(self) -> None:
        """Send what is left; blocks for at most about three seconds."""
        closing = threading.Thread(target=self._provider.shutdown, name="tracing-close", daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)
        if closing.is_alive():
            self._exporter.shutdown()  # ends its retries


class _OtelSpan:
    __slots__ = ("_span", "recording", "traceparent")

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        self.recording = True
        context = span.get_span_context()
        self.traceparent: bytes | None = (
            f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}".encode()
        )

    def set(self, **attributes: Unpack[Attributes]) -> None:
        """Under the names of OpenTelemetry's semantic conventions."""
        for name, value in attributes.items():
            if isinstance(value, str | int | float):
                self._span.set_attribute(NAMES[name], value)

    def end(self, error: str | None = None) -> None:
        """Hand it to the exporter's thread."""
        if error:
            self._span.set_status(trace.StatusCode.ERROR)
            self._span.set_attribute("error.type", error)
        self._span.end()


class _Exporter(SpanExporter):
    """Says once that spans are lost, and once that they arrive again."""

    def __init__(self, inner: SpanExporter) -> None:
        self._inner = inner
        self._failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._inner.export(spans)
        failing = result is not SpanExportResult.SUCCESS
        if failing and not self._failing:
            logger.warning("tracing_failed", meaning="Spans are lost until the collector takes them again.")
        elif self._failing and not failing:
            logger.info("tracing_recovered")
        self._failing = failing
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()
