"""One interactive request on its way: what the client is sent, and what is known for limits, log and metrics.

waiting (pings) ──► first token ──► pouring ──► over
   └────────────────────┴── interrupt(): the client left, the key was ended, or time is up ──► over
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from math import inf
from typing import Any

from api import shape
from api.errors import JSON_TYPE, Header, to_api_error
from api.limits.leases import Admission, State
from api.limits.limiter import Used
from api.lookout import Lookout
from api.metrics import Gaps
from api.outlet import Outlet
from api.settings import ApiSettings
from api.usage import Usage, UsageFilter, is_preamble
from engine.errors import EngineTimeout, VelocityError

_STREAM_HEADERS: tuple[Header, ...] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
_PING = b": ping\n\n"
_ERROR_EVENT = b'data: {"error":'
"""How vLLM reports a failure in mid-stream, after which it ends the stream as if nothing had happened."""


@dataclass(slots=True, eq=False)
class Relay:
    """One request on its way: where it goes and what is known of it so far."""

    outlet: Outlet
    request: shape.EngineRequest
    admission: Admission
    settings: ApiSettings
    lookout: Lookout
    began: float = field(default_factory=time.monotonic)
    bulk: bool = False
    """Whether bulk work was at the engine when it began."""
    usage: Usage = field(default_factory=Usage)
    gaps: Gaps | None = None
    """Between its tokens, once there is one."""
    status: int = 0
    """Status that the client was given; 0 until then."""
    entered: float | None = None
    """When it was sent to the engine."""
    first_byte: float | None = None
    refused: bool = False
    """Whether the engine, or the line, did not take it."""
    told: bool = False
    """Whether the engine has written an error into its stream."""
    fault: Exception | None = None
    """Why a copying callback stopped, or what interrupted the request."""
    verdict: str = ""
    """Its outcome, if it was interrupted."""
    _sift: UsageFilter | None = None
    _task: asyncio.Task[Any] | None = None
    _give_up: float = inf
    """When the engine must have begun. This and those below are on the monotonic clock; `inf` is never."""
    _ping_at: float = inf
    _last: float = inf
    """When bytes came last, of a stream that has begun."""

    async def start(self) -> None:
        """Send the 200 of a stream, once."""
        if not self._start():
            await self.outlet.drained()

    async def write(self, data: bytes) -> None:
        """Some bytes of the stream's body."""
        await self.outlet.drained()
        if data and not self.outlet.write(data):
            await self.outlet.drained()

    def take(self, data: bytes) -> bool:
        """Pass on what came from the engine, in the very callback that read it. False when there is a reason to stop:
        the client is slow, or there is a `fault`, or the engine has `told` of one.
        """
        now = time.monotonic()
        try:
            if self.first_byte is None and not is_preamble(self.request.endpoint, data):
                self.first_byte = now
                self._give_up = self._ping_at = inf
            if self.first_byte is not None:
                self._last = now
                self.gaps = gaps = self.gaps or Gaps()
                gaps.token(now)
            self._sift = sift = self._sift or UsageFilter(
                self.request.endpoint, self.usage, hide=self.request.hide_usage
            )
            passed = sift.feed(data)
            self.told = _ERROR_EVENT in passed  # in whole events, so that no cut goes through it
            return (not passed or self.outlet.write(passed)) and not self.told
        except Exception as error:  # noqa: BLE001 - belongs to the request's task, not to the loop that calls this
            self.fault = error
            return False

    async def whole(self, status: int, headers: list[Header], body: bytes, *, limits: bool = True) -> None:
        """A complete answer; with `limits` it says how the key stands."""
        self.status = status
        if not self.outlet.whole(status, [*headers, *self._headers(limits=limits)], body):
            await self.outlet.drained()

    async def end(self) -> None:
        """The clean end of a stream."""
        if self._sift is not None:
            await self.write(self._sift.rest())
        await self.outlet.drained()
        if not self.outlet.end():
            await self.outlet.drained()

    async def fail(self, fault: VelocityError) -> None:
        """Before the head a proper status; after it an error chunk and no clean end, which would look like success."""
        error = to_api_error(fault)
        if not self.status:
            told = any(name.startswith(b"x-ratelimit-") for name, _ in error.headers)
            await self.whole(error.status, [JSON_TYPE, *error.headers], error.body(), limits=not told)
            return
        await self.write(b"data: " + error.body() + b"\n\n")
        # The response is left incomplete, so the server closes the connection instead of ending the body.

    # --- time

    def watched(self, task: asyncio.Task[Any] | None) -> None:
        """`task` is what can be interrupted from now on; None: it is over."""
        self._task = task
        if task is None:
            self.lookout.remove(self)
        else:
            self.lookout.add(self)

    def waits(self, patience: float) -> None:
        """For the engine to begin: after `patience` seconds the client of a stream gets its 200, and pings.

        An answer that is not streamed comes as a whole: only the total time is its limit.
        """
        if self.request.stream:
            now = time.monotonic()
            self._give_up, self._ping_at = now + self.settings.first_token_timeout, now + patience

    async def drained(self) -> None:
        """Until the client has taken what was sent to it."""
        await self.outlet.drained()
        if self._last < inf:
            self._last = time.monotonic()

    def interrupt(self, verdict: str = "", fault: VelocityError | None = None) -> None:
        """End the request: `task` finds why in `verdict` or `fault`."""
        if self._task is not None and not self.interrupted:
            self.verdict, self.fault = verdict, fault
            self._task.cancel()

    @property
    def interrupted(self) -> bool:
        """Whether it was."""
        return bool(self.verdict or self.fault)

    def look(self, now: float) -> None:
        """See what is due."""
        settings = self.settings
        if now >= self.began + settings.total_timeout:
            self._too_late("The request took too long in all.")
        elif now >= self._give_up:
            self._too_late(f"No answer began within {settings.first_token_timeout:g} s.")
        elif now >= self._last + settings.stall_timeout:
            self._too_late(f"The engine sent nothing for {settings.stall_timeout:g} s.")
        elif now >= self._ping_at:
            self._ping_at = now + settings.ping_interval
            self._ping()

    def _too_late(self, why: str) -> None:
        if self.outlet.blocked:  # it is the client that is waited for, and there is nobody to tell
            self.interrupt("client_stalled")
        else:
            self.interrupt(fault=EngineTimeout(why))

    def _ping(self) -> None:
        if self._start():
            self.outlet.write(_PING)

    def _start(self) -> bool:
        if self.status:
            return not self.outlet.blocked
        self.status = 200
        return self.outlet.start(200, [*_STREAM_HEADERS, *self._headers()])

    def _headers(self, *, limits: bool = True) -> tuple[Header, ...]:
        name = (b"x-request-id", self.admission.request.encode())
        return (*self.admission.headers, name) if limits else (name,)

    @property
    def used(self) -> Used:
        """What the limits and the usage are told. An aborted stream's tokens are counted by its events."""
        usage, request = self.usage, self.request
        if self.entered is None:
            return Used(0, ran=self.admission.state is State.LEASED, refused=self.refused)
        if usage.known:
            return Used(usage.input_tokens + usage.output_tokens, usage.input_tokens, usage.output_tokens)
        if self.refused:
            return Used(0)
        output = min(max(0, usage.events - 1), request.output_most)  # the first event of a chat has no token
        if self.first_byte is None and not request.stream:
            return Used(None, request.input_estimate)  # nobody knows how far the engine had come
        return Used(request.input_estimate + output, request.input_estimate, output)
