"""Tracing against a collector that speaks OTLP over HTTP, and without one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

from api import tracing, tracing_otel
from engine.errors import SettingsError

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01".encode()


class Collector(ThreadingHTTPServer):
    """Takes spans, says no, or says nothing."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = 200
        self.answers = threading.Event()
        self.answers.set()
        self.asked = threading.Event()
        self.batches: Queue[ExportTraceServiceRequest] = Queue()
        self.heads: list[str] = []

    def spans(self) -> list[trace_pb2.Span]:
        """The spans of the next batch."""
        batch = self.batches.get(timeout=30)
        return [span for resource in batch.resource_spans for scope in resource.scope_spans for span in scope.spans]


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.set()
        self.server.answers.wait(30)
        self.server.heads.append(f"{self.path} {self.headers['content-type']}")
        self.send_response(self.server.status)
        self.send_header("content-length", "0")
        self.end_headers()
        self.server.batches.put(ExportTraceServiceRequest.FromString(body))

    def log_message(self, *_: object) -> None:
        pass


class Lines:
    """What was logged, by event."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def warning(self, event: str, **_: str) -> None:
        self.events.append(event)

    info = warning


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without any variable of OpenTelemetry, and with batches that leave soon."""
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    return monkeypatch


@pytest.fixture
def collector(environment: pytest.MonkeyPatch) -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    try:
        yield server
    finally:
        server.answers.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def tracer(collector: Collector) -> Iterator[tracing.Tracer]:
    loaded = tracing.load("velocity-api")
    yield loaded
    collector.answers.set()
    loaded.close()


def attributes(given: object) -> dict[str, object]:
    pairs: list[KeyValue] = list(given.attributes)  # type: ignore[attr-defined] # spans and resources have them
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "") for pair in pairs}


def test_a_client_s_span_is_the_parent(collector: Collector, tracer: tracing.Tracer) -> None:
    span = tracer.begin("POST /v1/chat/completions", TRACEPARENT)
    assert span.traceparent is not None
    version, trace, own, flags = span.traceparent.decode().split("-")
    assert (version, trace, flags) == ("00", TRACE, "01")
    assert own != PARENT
    span.end()

    [exported] = collector.spans()
    assert exported.trace_id.hex() == TRACE
    assert exported.parent_span_id.hex() == PARENT
    assert exported.span_id.hex() == own
    assert exported.name == "POST /v1/chat/completions"
    assert exported.kind == trace_pb2.Span.SPAN_KIND_SERVER
    assert exported.status.code == trace_pb2.Status.STATUS_CODE_UNSET
    assert collector.heads == ["/v1/traces application/x-protobuf"]


def test_without_a_parent_a_trace_begins(collector: Collector, tracer: tracing.Tracer) -> None:
    first, second = tracer.begin("a", None), tracer.begin("b", b"00-nonsense")
    first.end()
    second.end()
    exported = collector.spans()
    while len(exported) < 2:
        exported += collector.spans()
    assert [span.parent_span_id for span in exported] == [b"", b""]
    told = {tuple((span.traceparent or b"").decode().split("-")[1:3]) for span in (first, second)}
    assert {(span.trace_id.hex(), span.span_id.hex()) for span in exported} == told
    assert len({span.trace_id for span in exported}) == 2


def test_attributes_have_their_conventional_names(collector: Collector, tracer: tracing.Tracer) -> None:
    span = tracer.begin("POST /v1/chat/completions", None)
    span.set(method="POST", path="/v1/chat/completions", operation="chat", model="velocity-30b", stream=True)
    span.set(status=502, input_tokens=7, output_tokens=None, ttft=0.25, request_id="req_1", outcome="EngineLost")
    span.end("EngineLost")

    [exported] = collector.spans()
    assert attributes(exported) == {
        "http.request.method": "POST", "url.path": "/v1/chat/completions", "http.response.status_code": 502,
        "gen_ai.operation.name": "chat", "gen_ai.request.model": "velocity-30b", "gen_ai.request.stream": True,
        "gen_ai.usage.input_tokens": 7, "gen_ai.response.time_to_first_chunk": 0.25,
        "velocity.request_id": "req_1", "velocity.outcome": "EngineLost", "error.type": "EngineLost",
    }  # fmt: skip
    assert exported.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    assert exported.status.message == ""


def test_every_attribute_has_a_name() -> None:
    assert tracing.NAMES.keys() == tracing.Attributes.__annotations__.keys()


def test_the_service_is_named(collector: Collector, environment: pytest.MonkeyPatch) -> None:
    """By velocity, unless OpenTelemetry's own variable names it."""
    environment.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    for variable, name in ("", "velocity-api"), ("mine", "mine"):
        environment.setenv("OTEL_SERVICE_NAME", variable)
        tracer = tracing.load("velocity-api")
        tracer.begin("a", None).end()
        tracer.close()
        described = attributes(collector.batches.get(timeout=30).resource_spans[0].resource)
        assert described["service.name"] == name
        assert described["deployment.environment.name"] == "test"
        assert described["service.version"]


def test_a_client_that_samples_nothing_is_heeded(collector: Collector, tracer: tracing.Tracer) -> None:
    """The engine hears so too, and the trace stays whole."""
    span = tracer.begin("a", TRACEPARENT[:-2] + b"00")
    assert span.traceparent
    assert span.traceparent.startswith(f"00-{TRACE}-".encode())
    assert span.traceparent.endswith(b"-00")
    span.end()
    tracer.begin("b", None).end()
    assert [exported.name for exported in collector.spans()] == ["b"]


def test_closing_sends_what_is_left(collector: Collector, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    tracer = tracing.load("velocity-api")
    tracer.begin("last", None).end()
    tracer.close()
    assert [span.name for span in collector.spans()] == ["last"]
    tracer.begin("after the end", None).end()
    tracer.close()


def test_a_collector_that_hangs_does_not_hold_the_end_up(collector: Collector, environment: pytest.MonkeyPatch) -> None:
    environment.setattr(tracing_otel, "_CLOSE_SECONDS", 0.05)
    environment.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "3600")
    collector.answers.clear()
    tracer = tracing.load("velocity-api")
    tracer.begin("a", None).end()
    assert collector.asked.wait(30)
    tracer.close()
    assert collector.batches.empty()


def test_a_collector_that_fails_is_reported_once(
    collector: Collector, environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once when it begins to fail, once when it works again; requests notice neither."""
    lines = Lines()
    environment.setattr(tracing_otel, "logger", lines)
    tracer = tracing.load("velocity-api")
    for status in (200, 500, 500, 400, 200, 200):
        collector.status = status
        tracer.begin("a", None).end()
        collector.spans()
    tracer.close()
    assert lines.events == ["tracing_failed", "tracing_recovered"]
    assert [record.name for record in caplog.records if record.name.startswith("opentelemetry")] == []


@pytest.mark.parametrize(
    ("given", "handed_on"),
    [
        (TRACEPARENT, True),
        (TRACEPARENT[:-2] + b"00", True),
        (None, False),
        (b"", False),
        (TRACEPARENT + b"\n", False),
        (TRACEPARENT.upper(), False),
        (b"01" + TRACEPARENT[2:], False),
        (b"00-" + b"0" * 32 + TRACEPARENT[35:], False),
        (TRACEPARENT[:36] + b"0" * 16 + b"-01", False),
    ],
)
def test_without_tracing_a_proper_traceparent_is_handed_on(
    environment: pytest.MonkeyPatch,  # noqa: ARG001 - no endpoint
    given: bytes | None, *, handed_on: bool,
) -> None:  # fmt: skip
    tracer = tracing.load("velocity-api")
    assert isinstance(tracer, tracing.NoTracing)
    span = tracer.begin("a", given)
    span.set(model="m", status=200)
    span.end("EngineLost")
    assert span.traceparent == (given if handed_on else None)


@pytest.mark.parametrize(
    ("name", "value"),
    [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none"), ("OTEL_EXPORTER_OTLP_ENDPOINT", "")],
)
def test_tracing_can_be_turned_off(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    environment.setenv(name, value)
    assert isinstance(tracing.load("velocity-api"), tracing.NoTracing)


@pytest.mark.parametrize(
    ("name", "value"), [("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"), ("OTEL_BSP_MAX_QUEUE_SIZE", "-1")]
)
def test_what_can_t_work_is_said_at_the_start(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    environment.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:9/v1/traces")
    environment.setenv(name, value)
    with pytest.raises(SettingsError):
        tracing.load("velocity-api")


def python(code: str, **variables: str) -> str:
    """What a fresh interpreter prints."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=clean | variables, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def test_without_an_endpoint_nothing_is_imported() -> None:
    code = (
        "import sys; from api import tracing\n"
        "tracer = tracing.load('x'); tracer.begin('a', None).end(); tracer.close()\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    assert python(code) == "[]"


def test_a_missing_package_is_named() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from api import tracing; from engine.errors import SettingsError\n"
        "try: tracing.load('x')\n"
        "except SettingsError as error: print(error)"
    )
    said = python(code, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    assert "pip install 'velocity-serving[tracing]'" in said
