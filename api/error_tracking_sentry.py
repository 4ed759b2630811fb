"""Error tracking with Sentry's SDK behind it. Only api/error_tracking.py imports this, and only if it was asked for.

The SDK's client is used without its global scope and its integrations, so that no request, log line, header, argument
or patched library can add anything. What leaves is then cut down to an allow-list.
"""

from __future__ import annotations

import time
from typing import Any

from pydantic import SecretStr
from sentry_sdk import Client
from sentry_sdk.types import Event, Hint
from sentry_sdk.utils import capture_internal_exceptions, event_from_exception

from engine.errors import EngineLost, EngineProtocolError, EngineTimeout, SettingsError
from workers.errors import StorageError

_CLOSE_SECONDS = 2.0
_PER_MINUTE = 30
"""Reports; a fault that every request runs into says nothing new after that."""

_TELLING = frozenset(
    (kind.__module__, kind.__qualname__) for kind in (EngineLost, EngineProtocolError, EngineTimeout, StorageError)
)
"""Errors whose message is ours alone. An ApiError or InputError may quote the request or the engine's answer,
LedgerUnavailable Redis's, others an address with a password in it; so they, and every foreign error, leave unsaid."""

_EVENT = ("event_id", "timestamp", "level", "platform", "release", "environment", "server_name", "sdk", "tags")
_FRAME = ("filename", "abs_path", "module", "function", "lineno", "in_app", "pre_context", "context_line",
          "post_context")  # fmt: skip


class SentryTracker:
    """Sends reports from a thread of its own."""

    def __init__(self, dsn: SecretStr, release: str) -> None:
        try:
            self._client = Client(
                dsn.get_secret_value(),
                release=release,
                before_send=_cut_down,
                include_local_variables=False,
                max_request_body_size="never",
                max_breadcrumbs=0,
                default_integrations=False,
                auto_enabling_integrations=False,
                auto_session_tracking=False,
                send_client_reports=False,
                enable_backpressure_handling=False,
                traces_sample_rate=None,
                spotlight=False,
                shutdown_timeout=_CLOSE_SECONDS,
            )  # send_default_pii stays unset, which means False: naming it is deprecated
        except ValueError as error:
            raise SettingsError(f"The Sentry DSN can't be used: {error}.") from None
        self._window = 0.0
        self._reported = 0

    def report(self, error: BaseException, tags: dict[str, str]) -> None:
        """Report an error with what led to it."""
        if self._too_many():
            return
        with capture_internal_exceptions():  # a report must not fail whoever reports
            event, hint = event_from_exception(error, client_options=self._client.options)
            event["tags"] = dict(tags)
            self._client.capture_event(event, hint)

    def _too_many(self) -> bool:
        now = time.monotonic()
        if now - self._window >= 60 or not self._reported:
            self._window, self._reported = now, 0
        self._reported += 1
        return self._reported > _PER_MINUTE

    def close(self) -> None:
        """Send what is left, for at most two seconds."""
        self._client.close(timeout=_CLOSE_SECONDS)


def _cut_down(event: Event, hint: Hint) -> Event | None:  # noqa: ARG001 - Sentry's signature
    """The event with nothing in it but what is known to be no content."""
    given: dict[str, Any] = dict(event)
    kept: Any = {name: given[name] for name in _EVENT if name in given}
    kept["exception"] = {"values": [_error(value) for value in given["exception"]["values"]]}
    return kept  # type: ignore[no-any-return]


def _error(value: dict[str, Any]) -> dict[str, Any]:
    """One error of the chain; its message only if it is one of ours, without the notes that others may have added."""
    kind = value["type"]
    telling = (value.get("module"), kind) in _TELLING
    message = str(value.get("value")).partition("\n")[0]
    frames = (value.get("stacktrace") or {}).get("frames") or []
    return {
        "type": kind,
        "module": value.get("module"),
        "value": message if telling else kind,
        "mechanism": value.get("mechanism"),
        "stacktrace": {"frames": [{name: frame[name] for name in _FRAME if name in frame} for frame in frames]},
    }
