"""Faults to a Sentry-compatible service, if its address (a DSN) is configured; else nothing at all.

Where a fault arose leaves this process: classes, files, functions, lines. What it was about does not: no prompt,
output, header, body or local variable, and no message that could quote one.
"""

from __future__ import annotations

import importlib
from typing import Protocol

from pydantic import SecretStr

from engine.errors import SettingsError


class _Tracker(Protocol):
    def report(self, error: BaseException, tags: dict[str, str]) -> None: ...

    def close(self) -> None: ...


class _Process:
    """What this process has started."""

    tracker: _Tracker | None = None


def start(dsn: SecretStr | None, release: str) -> None:
    """Report to `dsn` from now on; None reports nowhere. `release` is velocity's version. Raises SettingsError."""
    close()
    if dsn is None or not dsn.get_secret_value():
        return
    try:
        module = importlib.import_module("api.error_tracking_sentry")
    except ImportError as error:
        raise SettingsError(
            "A Sentry DSN asks for error tracking, for which a package is missing "
            f"({error.name}): pip install 'velocity-serving[errors]'"
        ) from None
    _Process.tracker = module.SentryTracker(dsn, release)


def report(error: BaseException, **tags: str) -> None:
    """Report a fault, at the edge of the process where it is caught. `tags` are bounded words of ours, never content.

    Returns at once and never raises: a thread of its own sends it.
    """
    if _Process.tracker:
        _Process.tracker.report(error, tags)


def close() -> None:
    """Send what is left; blocks for at most about two seconds. Does nothing if nothing was started."""
    if _Process.tracker:
        _Process.tracker.close()
        _Process.tracker = None
