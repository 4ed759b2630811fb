"""Error tracking against a service that takes Sentry's envelopes; what must not leave is looked for in the bytes."""

from __future__ import annotations

import gzip
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue
from typing import Any

import pytest
from pydantic import SecretStr

from api import error_tracking, error_tracking_sentry
from api.errors import ApiError, from_engine
from engine.client import Answer
from engine.errors import EngineLost, EngineUnreachable, SettingsError
from workers.errors import LedgerUnavailable, StorageError


def canary() -> str:
    """What must never leave; made here, since lines of source do leave."""
    return f"canary-{os.getpid()}"


class Service(ThreadingHTTPServer):
    """Stands for Sentry."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = threading.Event()
        self.answers.set()
        self.asked = threading.Event()
        self.requests: Queue[tuple[str, bytes]] = Queue()

    @property
    def dsn(self) -> SecretStr:
        return SecretStr(f"http://public@127.0.0.1:{self.server_address[1]}/7")


class _Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.set()
        self.server.answers.wait(30)
        if self.headers["content-encoding"] == "gzip":
            body = gzip.decompress(body)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()
        self.server.requests.put((f"{self.path} {self.headers}", body))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    server = Service()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    error_tracking.start(server.dsn, "velocity@1.2.3")
    try:
        yield server
    finally:
        server.answers.set()
        error_tracking.close()
        server.shutdown()
        thread.join()
        server.server_close()


def caught(fail: Callable[[], object]) -> BaseException:
    """What `fail` raises, with its traceback."""
    try:
        fail()
    except BaseException as error:  # noqa: BLE001 - it is what the test wants
        return error
    raise AssertionError("nothing was raised")


def sent(service: Service, error: BaseException, **tags: str) -> dict[str, Any]:
    """Report an error; the one event that arrives, in which the canary is not."""
    error_tracking.report(error, **tags)
    head, body = service.requests.get(timeout=30)
    assert head.startswith("/api/7/envelope/")
    assert canary() not in head
    assert canary().encode() not in body
    envelope, item, payload = body.split(b"\n")[:3]
    assert json.loads(envelope)["event_id"]
    assert json.loads(item)["type"] == "event"
    assert body.count(b"\n") <= 3  # nothing else travels with it
    event: dict[str, Any] = json.loads(payload)
    return event


def errors(event: dict[str, Any]) -> dict[str, str]:
    """The chain's messages by class."""
    return {value["type"]: value["value"] for value in event["exception"]["values"]}


def prompt_in_a_local() -> None:
    prompt = canary()
    headers = {"authorization": f"Bearer {prompt}"}
    assert headers
    raise KeyError(prompt)


def test_an_event_says_where_and_nothing_more(service: Service) -> None:
    event = sent(service, caught(prompt_in_a_local), edge="gate", path="/v1/chat/completions")
    [value] = event["exception"]["values"]
    assert (value["type"], value["value"]) == ("KeyError", "KeyError")
    frames = value["stacktrace"]["frames"]
    assert frames[-1]["function"] == "prompt_in_a_local"
    assert frames[-1]["lineno"] > 0
    assert all("vars" not in frame for frame in frames)
    assert event["release"] == "velocity@1.2.3"
    assert event["level"] == "error"
    assert event["tags"] == {"edge": "gate", "path": "/v1/chat/completions"}
    assert event.keys() <= {"exception", *error_tracking_sentry._EVENT}


def chained() -> None:
    try:
        json.loads('{"messages": ' + canary())
    except ValueError as cause:
        try:
            raise LookupError(canary(), {"content": canary()}) from cause
        except LookupError as context:
            context.add_note(canary())
            raise RuntimeError(f"while answering {canary()}")  # noqa: B904 - the context is what is tested


def grouped() -> None:
    raise ExceptionGroup(canary(), [ValueError(canary()), OSError(5, canary())])


def with_a_message_attribute() -> None:
    """Which Sentry prefers to str()."""
    error = ValueError("x")
    error.message = error.detail = canary()  # type: ignore[attr-defined]
    raise error


def quoted_by_the_engine() -> None:
    body = json.dumps({"error": {"message": f"bad input: {canary()}", "code": 400}}).encode()
    raise from_engine(Answer(400, body))


def quoted_by_redis() -> None:
    raise LedgerUnavailable(f"Redis did not answer: unknown command, with args beginning with: {canary()}")


def password_in_an_address() -> None:
    raise EngineUnreachable(f"No connection to the engine at http://me:{canary()}@host: timeout.")


def noted() -> None:
    error = EngineLost("The connection to the engine was closed.")
    error.add_note(canary())
    raise error


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        (chained, {"JSONDecodeError": "JSONDecodeError", "LookupError": "LookupError", "RuntimeError": "RuntimeError"}),
        (grouped, {"ExceptionGroup": "ExceptionGroup", "ValueError": "ValueError", "OSError": "OSError"}),
        (with_a_message_attribute, {"ValueError": "ValueError"}),
        (quoted_by_the_engine, {"ApiError": "ApiError"}),
        (quoted_by_redis, {"LedgerUnavailable": "LedgerUnavailable"}),
        (password_in_an_address, {"EngineUnreachable": "EngineUnreachable"}),
        (noted, {"EngineLost": "The connection to the engine was closed."}),
    ],
)
def test_no_message_that_could_quote_leaves(service: Service, fail: Callable[[], object], said: dict[str, str]) -> None:
    assert errors(sent(service, caught(fail))) == said


def test_our_own_messages_leave(service: Service) -> None:
    def fail() -> None:
        try:
            raise KeyError(canary())
        except KeyError as error:
            raise StorageError("The result can't be kept: No space left on device.") from error

    event = sent(service, caught(fail))
    assert errors(event) == {
        "KeyError": "KeyError",
        "StorageError": "The result can't be kept: No space left on device.",
    }


def test_nothing_but_reports_leaves(service: Service) -> None:
    """No log line, no breadcrumb, no uncaught error of a thread."""
    logging.getLogger("velocity").error("failed at %s", canary())
    logging.getLogger("velocity").info("handled %s", canary())
    event = sent(service, caught(prompt_in_a_local))
    assert "breadcrumbs" not in event
    assert service.requests.empty()


def test_an_error_that_can_t_be_told_is_no_error(service: Service) -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError(canary())

    [(kind, said)] = errors(sent(service, Odd())).items()
    assert kind == said == Odd.__qualname__


def test_a_storm_is_bounded(service: Service) -> None:
    error = caught(prompt_in_a_local)
    for _ in range(error_tracking_sentry._PER_MINUTE * 3):
        error_tracking.report(error)
    error_tracking.close()
    assert service.requests.qsize() == error_tracking_sentry._PER_MINUTE


def test_a_service_that_hangs_does_not_hold_the_end_up(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_tracking_sentry, "_CLOSE_SECONDS", 0.05)
    service.answers.clear()
    error_tracking.report(caught(prompt_in_a_local))
    assert service.asked.wait(30)
    error_tracking.close()
    assert service.requests.empty()


def test_after_the_end_nothing_is_reported(service: Service) -> None:
    error_tracking.close()
    error_tracking.close()
    error_tracking.report(caught(prompt_in_a_local))
    assert service.requests.empty()


@pytest.mark.parametrize("dsn", ["nonsense", "http://127.0.0.1/1", "http://key@127.0.0.1:port/1"])
def test_a_dsn_that_is_none(dsn: str) -> None:
    with pytest.raises(SettingsError, match="DSN"):
        error_tracking.start(SecretStr(dsn), "velocity@1.2.3")


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code]
    environment = os.environ | {"SENTRY_DSN": "http://public@127.0.0.1:9/7"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("dsn", ["None", "SecretStr('')"])
def test_without_a_dsn_nothing_is_imported(dsn: str) -> None:
    code = (
        "import sys; from pydantic import SecretStr; from api import error_tracking\n"
        f"error_tracking.start({dsn}, 'x'); error_tracking.report(ValueError()); error_tracking.close()\n"
        "print([name for name in sys.modules if name.startswith('sentry_sdk')])"
    )
    assert python(code) == "[]"


def test_a_missing_package_is_named() -> None:
    code = (
        "import sys; sys.modules['sentry_sdk'] = None\n"
        "from pydantic import SecretStr; from api import error_tracking; from engine.errors import SettingsError\n"
        "try: error_tracking.start(SecretStr('http://public@127.0.0.1:9/7'), 'x')\n"
        "except SettingsError as error: print(error)"
    )
    assert "pip install 'velocity-serving[errors]'" in python(code)


def test_an_answer_to_a_client_is_no_secret_either(service: Service) -> None:
    """Its class leaves, its message does not: it may quote what the client sent."""
    event = sent(service, ApiError(404, f"There is no model {canary()!r}."))
    assert errors(event) == {"ApiError": "ApiError"}
