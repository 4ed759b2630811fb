"""Which batch sequences run and which are parked: left out of steps for a while, their KV cache kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TURN = 64
"""Steps that a sequence runs once it was parked too long: changing places costs the engine a little each time."""


@dataclass
class _Place:
    parked_since: float | None = None
    turn: int = 0


class Parking:
    """Remembers who is parked since when. Names are request ids, oldest request first in every list."""

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}

    def choose(self, names: Sequence[str], seats: int, now: float, max_parked: float) -> set[str]:
        """The names that may run, at most `seats` of them; the others are parked from now on.

        First those whose turn it is, then those parked for longer than `max_parked` seconds (they get a turn), then
        the oldest: they finish soonest, and a finished request gives its KV cache back.
        """
        if seats >= len(names):
            self._places = {}
            return set(names)
        places = {name: self._places.get(name) or _Place() for name in names}

        def rank(name: str) -> tuple[int, float]:
            place = places[name]
            if place.turn > 0:
                return (0, 0.0)
            if place.parked_since is not None and now - place.parked_since >= max_parked:
                return (1, place.parked_since)
            return (2, 0.0)

        chosen = set(sorted(names, key=rank)[:seats])
        for name, place in places.items():
            if name not in chosen:
                place.parked_since = now if place.parked_since is None else place.parked_since
                continue
            if rank(name)[0] == 1:
                place.turn = TURN
            place.turn = max(0, place.turn - 1)
            place.parked_since = None
        self._places = places
        return chosen

    def longest(self, now: float) -> float:
        """Seconds for which the longest-parked sequence has been parked; 0 if none is."""
        return max((now - p.parked_since for p in self._places.values() if p.parked_since is not None), default=0.0)
