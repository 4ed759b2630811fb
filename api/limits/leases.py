"""The requests that this process answers for: their leases are renewed while it lives, and end with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from api.errors import Header
from api.keys import Key


class State(StrEnum):
    """Where an admitted request stands."""

    LEASED = "leased"
    """It holds a slot."""
    WAITING = "waiting"
    """It has a place in its key's line."""


@dataclass(slots=True, eq=False)
class Admission:
    """One request that was let in, from `admit` to `settle`."""

    request: str
    key: Key
    cost: int
    """Tokens that are reserved for it."""
    state: State
    headers: tuple[Header, ...] = ()
    """OpenAI's x-ratelimit-…, for the answer."""
    arrived: int = 0
    """Redis's time (µs) when it was let in."""
    local: bool = False
    """Whether it was decided without Redis."""
    on_end: Callable[[], None] | None = None
    """Called when the key no longer opens anything: the request is to be ended."""

    def end(self) -> None:
        """The key no longer opens anything."""
        if self.on_end is not None:
            self.on_end()


class LeaseBook:
    """All admissions of this process that have not been settled."""

    def __init__(self) -> None:
        self._admissions: dict[str, Admission] = {}
        self._of_key: Counter[str] = Counter()

    def __contains__(self, request: str) -> bool:
        return request in self._admissions

    def add(self, admission: Admission) -> None:
        """Answer for it from now on."""
        self._admissions[admission.request] = admission
        self._of_key[admission.key.id] += 1

    def remove(self, admission: Admission) -> bool:
        """Answer for it no more. False if that was said before."""
        if self._admissions.pop(admission.request, None) is None:
            return False
        self._of_key[admission.key.id] -= 1
        if not self._of_key[admission.key.id]:
            del self._of_key[admission.key.id]
        return True

    def all(self) -> list[Admission]:
        """Those there are now."""
        return list(self._admissions.values())

    def running(self, key_id: str) -> tuple[int, int]:
        """How many a key has here, and how many there are in all."""
        return self._of_key[key_id], len(self._admissions)

    @property
    def waiting(self) -> int:
        """How many stand in a line."""
        return sum(admission.state is State.WAITING for admission in self._admissions.values())

    @property
    def leased(self) -> int:
        """How many hold a slot."""
        return len(self._admissions) - self.waiting
