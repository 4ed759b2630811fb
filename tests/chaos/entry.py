"""What worker.py and api.py share: the faults that the environment asks for, put in before the process begins."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.chaos.child import CRASHED
from tests.chaos.points import Crash
from workers import reconcile
from workers.job import Item, Lease
from workers.request import Requester

MARKERS = "CHAOS_MARKERS"
"""Variable with the directory in which markers lie."""
POINT = "CHAOS_POINT"
"""Variable with the name of the point at which the process crashes, if any."""
POISON = "poison"
"""A worker that executes a prompt with this word in it dies of that."""
NO_SPACE = "no-space"
"""While a marker of this name exists, writes to files fail for want of space."""


def arm(points: Mapping[str, Callable[[Crash], None]]) -> None:
    """Put in what the environment asks for."""
    markers = Path(os.environ[MARKERS])
    name = os.environ.get(POINT, "")
    if name in points:
        points[name](Crash(markers / f"{name}.crashed"))
    _poison()
    _no_space(markers / NO_SPACE)


def hurry() -> None:
    """What is done every minute is done every two seconds: a test does not wait."""
    setattr(reconcile, "_EVERY", 2.0)  # noqa: B010 - it is a constant
    setattr(reconcile, "_SETTLED", 2.0)  # noqa: B010 - it is a constant


def _poison() -> None:
    wrapped = Requester.run

    async def run(self: Requester, item: Item, lease: Lease, *args: Any, **kwargs: Any) -> Any:
        if POISON in item.body["messages"][-1]["content"]:
            os._exit(CRASHED)
        return await wrapped(self, item, lease, *args, **kwargs)

    setattr(Requester, "run", run)  # noqa: B010 - mypy lets nobody assign a method


def _no_space(marker: Path) -> None:
    """Of what is written to a full disk the first half still fits, as a real one has it."""
    write = os.write

    def failing(file: int, data: bytes | memoryview) -> int:
        if marker.exists() and stat.S_ISREG(os.fstat(file).st_mode):
            if len(data) < 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(file, data[: len(data) // 2])
        return write(file, data)

    setattr(os, "write", failing)  # noqa: B010 - mypy lets nobody assign a function
