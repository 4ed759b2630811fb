"""The window: how many bulk requests may be at the engine. Its size may change, and places are asked back."""

from __future__ import annotations

import asyncio
import itertools
from bisect import insort
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

_MOST_RECALLS = 3
"""An item that was given back so often is left alone."""
_CREDIT = 30.0
_WASTE = 0.1

T = TypeVar("T")


@dataclass(slots=True)
class Tally:
    """What one worker process does at the engine: its pumps write it, its heartbeat reads it from another thread."""

    in_flight: int = 0
    given_back: int = 0
    """Requests that were ended early, to run again later."""
    useful: float = 0.0
    """Seconds at the engine of requests that were answered, summed over requests."""
    wasted: float = 0.0
    """Seconds at the engine of requests that were given back."""
    warned: bool = False
    """Whether it was said that this engine lets bulk work slow people down."""

    def affords(self, seconds: float) -> bool:
        """Whether so much may be wasted now: a tenth of what was useful, and a little to begin with."""
        return self.wasted + seconds <= _CREDIT + _WASTE * self.useful


class Place:
    """One item's place in the window, through all its tries. Only `run` may be ended early, and it starts again.

    waits ── its turn ──► held ── release() ──► over
      ▲                     │
      └──── asked back ─────┘
    """

    def __init__(self, window: Window, number: int) -> None:
        self._window = window
        self._scope: asyncio.Timeout | None = None
        self._since: float | None = None
        self._recalls = 0
        self.number = number
        """Who came first has the lower one, and keeps it when the place is given back."""
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.recalled = False
        """Asked back, and still held."""

    @property
    def held(self) -> bool:
        """Whether it counts against the window's size."""
        return self._window.holds(self)

    @property
    def spent(self) -> float:
        """Seconds that its request has been at the engine: what ending it would waste."""
        return 0.0 if self._since is None else asyncio.get_running_loop().time() - self._since

    @property
    def movable(self) -> bool:
        """Whether it may be asked back: where nothing is at the engine, that costs nothing."""
        return not self.recalled and (self._since is None or self._recalls < _MOST_RECALLS)

    async def run(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """What `attempt` returns. Asked for the place back, it is cancelled, and called anew when there is a place."""
        while True:
            while self.recalled or not self.held:
                self.release()
                await self._window.wait(self)
            try:
                async with asyncio.timeout(None) as scope:
                    self._scope = scope
                    return await attempt()
            except TimeoutError:
                if not scope.expired():
                    raise
            finally:
                self._scope = None

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around what is at the engine."""
        tally = self._window.tally
        self._since = asyncio.get_running_loop().time()
        tally.in_flight += 1
        try:
            yield
            tally.useful += self.spent
        except asyncio.CancelledError:
            if self.recalled:
                tally.wasted += self.spent
                tally.given_back += 1
                self._recalls += 1
            raise
        finally:
            self._since = None
            tally.in_flight -= 1

    def recall(self) -> None:
        """Ask for it back; `run` gives it as soon as it is given the time to."""
        self.recalled = True
        if self._scope is not None:
            self._scope.reschedule(asyncio.get_running_loop().time())

    def release(self) -> None:
        """The place is free; nothing happens if it was not held."""
        self.recalled = False
        self._window.free(self)


class Window:
    """Places, given first come first served. May hold more than its size: what is held is asked back, or runs out."""

    def __init__(self, size: int, tally: Tally | None = None) -> None:
        self.full = size
        """Its size when bulk work need not stand back: what memory is planned for."""
        self.tally = tally or Tally()
        self._size = size
        self._held: set[Place] = set()
        self._waiting: list[Place] = []
        self._numbers = itertools.count()

    @property
    def size(self) -> int:
        """How many places may be taken."""
        return self._size

    @property
    def locked(self) -> bool:
        """Whether someone who comes now would have to wait."""
        return bool(self._waiting) or len(self._held) >= self._size

    def holds(self, place: Place) -> bool:
        """Whether a place is taken."""
        return place in self._held

    def resize(self, size: int) -> None:
        """Let so many places be taken from now on."""
        self._size = size
        self._grant()

    async def take(self) -> Place:
        """A place, when it is one's turn."""
        place = Place(self, next(self._numbers))
        await self.wait(place)
        return place

    async def wait(self, place: Place) -> None:
        """Until the place may be taken. One that was given back comes before all that never had one."""
        place.turn = asyncio.get_running_loop().create_future()
        insort(self._waiting, place, key=lambda waiting: waiting.number)
        self._grant()
        try:
            await place.turn
        except asyncio.CancelledError:
            with suppress(ValueError):
                self._waiting.remove(place)
            place.release()
            raise

    def free(self, place: Place) -> None:
        """Take a place out; the next one gets its turn."""
        self._held.discard(place)
        self._grant()

    def recall(self) -> None:
        """Ask back what is held beyond the size, the youngest first, as far as that does not waste too much."""
        recalled = [place for place in self._held if place.recalled]
        excess = len(self._held) - len(recalled) - self._size
        if excess <= 0:
            return
        wasted = sum(place.spent for place in recalled)
        youngest = sorted(
            (place for place in self._held if place.movable), key=lambda place: (place.spent, -place.number)
        )
        for place in youngest[:excess]:
            wasted += place.spent
            if not self.tally.affords(wasted):
                return
            place.recall()

    def _grant(self) -> None:
        while self._waiting and len(self._held) < self._size:
            place = self._waiting.pop(0)
            if not place.turn.done():  # else its owner was cancelled, and does not know it yet
                self._held.add(place)
                place.turn.set_result(None)
