"""Looks at every running request now and then: a timer for each of them would cost more than all the looks."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Watched(Protocol):
    """What wants to be looked at."""

    def look(self, now: float) -> None:
        """See whether something is due at `now`, on the monotonic clock."""


class Lookout:
    """One per event loop. `tick` is the time between two looks, in seconds: that late something may be noticed."""

    def __init__(self, tick: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._tick = tick
        self._watched: set[Watched] = set()
        self._ticking = False

    def add(self, watched: Watched) -> None:
        """Look at it from now on."""
        self._watched.add(watched)
        if not self._ticking:
            self._ticking = True
            self._loop.call_later(self._tick, self._look)

    def remove(self, watched: Watched) -> None:
        """Look at it no more."""
        self._watched.discard(watched)

    def _look(self) -> None:
        self._ticking = bool(self._watched)
        if self._ticking:
            self._loop.call_later(self._tick, self._look)
        now = time.monotonic()
        for watched in tuple(self._watched):
            watched.look(now)
