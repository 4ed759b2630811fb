"""What one api process counts, for Prometheus. Names end in their unit; every label has a small, fixed set of values.

Nothing that a client chooses becomes a label: no key, model, path or error message.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Gauge, Info, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from api.counting import Count, Spread
from engine.protection import Protection

# Fine where an H200 lives, long enough for a CPU. The upper ends are the defaults of the timeouts.
_DURATION = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0)
_TTFT = (0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5,
         10.0, 20.0, 30.0, 60.0, 120.0, 300.0)  # fmt: skip
_ITL = (0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1,
        0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0)  # fmt: skip
_REDIS = (0.0001, 0.0002, 0.0003, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

_BULK = ("no", "yes")
"""Whether bulk work was at the engine when a request began: people's latencies with it and without it, side by side."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Refusal(StrEnum):
    """Why a request was not let in."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    CONCURRENCY = "concurrency"
    GLOBAL_REQUESTS = "global_requests"
    GLOBAL_TOKENS = "global_tokens"
    GLOBAL_CONCURRENCY = "global_concurrency"
    NEVER_FITS = "never_fits"
    """It asks for more than the limit would allow at any time."""
    MAX_WAITING = "max_waiting"
    """Too many requests wait for a slot already."""
    QUEUE_WAIT = "queue_wait"
    """It has waited too long for a slot."""
    REDIS = "redis"
    """Redis is down, and there is no local share to decide by."""
    BULK_JOBS = "bulk_jobs"
    BULK_ITEMS = "bulk_items"
    BULK_TOKENS = "bulk_tokens"
    DISK_FULL = "disk_full"
    REDIS_FULL = "redis_full"
    QUEUE_FULL = "queue_full"
    """Too many items of bulk jobs wait already."""
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    TOO_LARGE = "too_large"


class Outcome(StrEnum):
    """How a request that went to the engine ended."""

    OK = "ok"
    CLIENT_LEFT = "client_left"
    CLIENT_STALLED = "client_stalled"
    ENGINE_ERROR = "engine_error"
    REFUSED = "refused"
    """The engine found a fault in the request (4xx)."""
    TIMEOUT = "timeout"
    ABORTED = "aborted"
    """velocity itself was stopped, or failed."""
    REVOKED = "revoked"
    OTHER = "other"

    @classmethod
    def of(cls, text: str) -> Outcome:
        """The outcome that the request log writes as `text`: an outcome, engine_<status> or the name of an error."""
        try:
            return cls(text)
        except ValueError:
            if text == "EngineTimeout":
                return cls.TIMEOUT
            if text.startswith("engine_4"):
                return cls.REFUSED
            return cls.ENGINE_ERROR if text.lower().startswith("engine") else cls.OTHER


class Gaps:
    """The times between the tokens of one stream: counted with plain integers, since this runs at every token."""

    __slots__ = ("_counts", "_first", "_last", "tokens")

    def __init__(self) -> None:
        self.tokens = 0
        """How often `token` was called."""
        self._counts = [0] * (len(_ITL) + 1)
        self._first = self._last = 0.0

    def token(self, now: float) -> None:
        """A token has come at `now`, in seconds of any clock that does not go back."""
        if self.tokens:
            self._counts[bisect_left(_ITL, now - self._last)] += 1
        else:
            self._first = now
        self._last = now
        self.tokens += 1

    @property
    def counts(self) -> Sequence[int]:
        """Gaps by bucket, not cumulative; the last bucket has no upper bound."""
        return self._counts

    @property
    def seconds(self) -> float:
        """Sum of all gaps: what lies between the first token and the last."""
        return self._last - self._first


class Metrics(Collector):
    """The metrics of one process, in a registry of their own. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        Info("velocity_build", "What is running.", registry=registry).info(
            {"version": installed_version(), "python": sys.version.partition(" ")[0]}
        )
        self._requests = Count("velocity_http_requests", "Requests answered.", ["route", "method", "status"])
        self._duration = Spread(
            "velocity_request_duration_seconds", "Time from a request's head to its end.", _DURATION,
            ["endpoint", "stream"],
        )  # fmt: skip
        self._ttft = Spread(
            "velocity_ttft_seconds", "Time from a request's head to its first token.", _TTFT, ["endpoint", "bulk"]
        )
        self._itl = Spread("velocity_itl_seconds", "Time between two events of a stream.", _ITL, ["bulk"])
        self._tokens = Count("velocity_tokens", "Tokens, as the engine counted them.", ["direction", "traffic"])
        self._refusals = Count("velocity_refusals", "Requests that were not let in.", ["reason"])
        self._outcomes = Count("velocity_stream_outcomes", "How requests to the engine ended.", ["outcome"])
        self._in_flight = Gauge("velocity_requests_in_flight", "Requests at the engine.", registry=registry)
        self._waiting = Gauge("velocity_requests_waiting", "Requests waiting for a slot.", registry=registry)
        self._engine_up = Gauge("velocity_engine_up", "Whether the engine answers.", registry=registry)
        self._protection = Gauge(
            "velocity_engine_protection", "What keeps bulk work from slowing people down in the engine.",
            ["protection"], registry=registry,
        )  # fmt: skip
        self._redis = Spread("velocity_redis_seconds", "Time that an operation on Redis took.", _REDIS, ["operation"])
        self._redis_failures = Count("velocity_redis_failures", "Operations on Redis that failed.", ["operation"])
        self._local = Count("velocity_local_decisions", "Limits decided without Redis.", ["outcome"])
        for collector in (
            self._requests, self._duration, self._ttft, self._itl, self._tokens, self._refusals, self._outcomes,
            self._redis, self._redis_failures, self._local,
        ):  # fmt: skip
            registry.register(collector)
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """A series that appears with its first event hides that event from `rate()`."""
        for reason in Refusal:
            self._refusals.add(reason, by=0)
        for outcome in Outcome:
            self._outcomes.add(outcome, by=0)
        for direction in ("input", "output"):
            self._tokens.add(direction, "interactive", by=0)
        for decision in ("admitted", "refused"):
            self._local.add(decision, by=0)
        for bulk in _BULK:
            self._itl.add((), 0.0, bulk)
        for protection in Protection:
            self._protection.labels(protection)

    def observe_gauges(self, in_flight: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Ask these at every scrape: requests at the engine, and requests that wait for a slot."""
        self._in_flight.set_function(in_flight)
        self._waiting.set_function(waiting)

    def observe_engine(self, up: Callable[[], bool], protection: Callable[[], Protection | None]) -> None:
        """Ask these at every scrape: whether the engine answers, and what protects people in there (None: unknown)."""
        self._engine_up.set_function(up)
        for each in Protection:
            self._protection.labels(each).set_function(partial(_is, each, protection))

    def register(self, collector: Collector) -> None:
        """Ask this one, too, at every scrape."""
        self._registry.register(collector)

    def request(self, route: str, method: str, status: int) -> None:
        """A request has ended. `route` is the template ("/jobs/{id}"), never the path; status 0 is no answer at all."""
        known = method if method in _METHODS else "other"
        self._requests.add(route, known, str(status) if status else "none")

    def duration(self, endpoint: str, seconds: float, *, stream: bool) -> None:
        """A request to the engine took so many seconds in all."""
        self._duration.observe(seconds, endpoint, "true" if stream else "false")

    def ttft(self, endpoint: str, seconds: float, *, bulk: bool) -> None:
        """The first token of an answer came after so many seconds; `bulk` was at the engine when it began, or not."""
        self._ttft.observe(seconds, endpoint, _BULK[bulk])

    def add_gaps(self, gaps: Gaps, *, bulk: bool) -> None:
        """Add a stream that has ended, once per stream; `bulk` was at the engine when it began, or not."""
        self._itl.add(gaps.counts, gaps.seconds, _BULK[bulk])

    def tokens(self, input: int, output: int) -> None:  # noqa: A002 - as OpenAI calls it
        """Tokens of one interactive request."""
        self._tokens.add("input", "interactive", by=input)
        self._tokens.add("output", "interactive", by=output)

    def outcome(self, text: str) -> None:
        """A request to the engine has ended; `text` is the outcome as the request log has it."""
        self._outcomes.add(text if text == Outcome.OK else Outcome.of(text))

    def refused(self, reason: Refusal) -> None:
        """A request was not let in."""
        self._refusals.add(reason)

    def redis(self, operation: str, seconds: float) -> None:
        """An operation on Redis took so many seconds. `operation` is a name of ours, never a key."""
        self._redis.observe(seconds, operation)

    def redis_failed(self, operation: str) -> None:
        """An operation on Redis failed."""
        self._redis_failures.add(operation)

    def local(self, admitted: bool) -> None:
        """A limit was decided without Redis."""
        self._local.add("admitted" if admitted else "refused")

    def collect(self) -> Iterable[Metric]:
        """For prometheus_client."""
        return self._registry.collect()

    def render(self, accept: str | None = None) -> tuple[bytes, str]:
        """All of it as text in the format that an Accept header asks for, and its content type."""
        return rendered(self, accept)


def rendered(collector: Collector, accept: str | None = None) -> tuple[bytes, str]:
    """What it collects as text in the format that an Accept header asks for, and its content type."""
    try:
        encode, content_type = choose_encoder(accept or "")
    except TypeError:  # prometheus_client stumbles over a version that is no number
        encode, content_type = choose_encoder("")
    return encode(collector), content_type


def _is(wanted: Protection, current: Callable[[], Protection | None]) -> bool:
    return current() is wanted


def installed_version() -> str:
    """The version of velocity that is installed."""
    try:
        return version("velocity-serving")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
