"""Who of this process's waiting requests asks Redis for its slot, and when. The lines themselves are in Redis.

Of the requests that wait for one key, the first asks often and the others seldom, so that many do not ask too much.
"""

from __future__ import annotations

import asyncio
from bisect import insort
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

_FIRST_SECONDS = 0.05
_OTHERS_SECONDS = 1.0


@dataclass(order=True, slots=True)
class _Place:
    """One request in a line, by its arrival in Redis."""

    arrived: int
    request: str
    called: asyncio.Event = field(compare=False, default_factory=asyncio.Event)
    line: list[_Place] = field(compare=False, default_factory=list)
    asked: bool = field(compare=False, default=False)

    async def turn(self) -> None:
        """Returns when it is time to ask (again)."""
        if self.asked:
            with suppress(TimeoutError):
                async with asyncio.timeout(_FIRST_SECONDS if self.line[0] is self else _OTHERS_SECONDS):
                    await self.called.wait()
        self.called.clear()
        self.asked = True


class Lines:
    """The lines of all keys, as far as they stand in this process."""

    def __init__(self) -> None:
        self._lines: dict[str, list[_Place]] = {}

    @contextmanager
    def standing(self, key_id: str, arrived: int, request: str) -> Iterator[_Place]:
        """A place in a key's line, left on the way out."""
        line = self._lines.setdefault(key_id, [])
        place = _Place(arrived, request, line=line)
        insort(line, place)
        try:
            yield place
        finally:
            line.remove(place)
            if not line:
                del self._lines[key_id]
            self.next(key_id)

    def next(self, key_id: str) -> None:
        """A slot may have become free: the first in line asks at once."""
        if line := self._lines.get(key_id):
            line[0].called.set()
