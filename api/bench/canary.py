"""Notes when the machine stood still: a process whose only work is to wake up and look at the clock.

    python -m api.bench.canary      # prints "at lost" per spell, in seconds of the monotonic clock, until input ends

It shares the cores with all that is measured, so that a spell means: for so long nothing of low demand could run.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import Self

_NAP = 0.01
_SPELL = 0.05


class Canary:
    """Runs the process while it is entered. `between` may be asked any time, also after."""

    def __init__(self) -> None:
        self._spells: list[tuple[float, float]] = []
        self.process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.terminate()
        process.wait()
        if self._reader:
            self._reader.join()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()

    def between(self, begin: float, end: float) -> list[tuple[float, float]]:
        """The spells that began in a stretch of the monotonic clock: seconds after `begin`, and how long each took."""
        return [(at - begin, lost) for at, lost in list(self._spells) if begin <= at < end]

    def _read(self, process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            at, lost = line.split()
            self._spells.append((float(at), float(lost)))


def main() -> None:
    """Look at the clock until the parent closes our input or ends us."""
    parent = threading.Thread(target=sys.stdin.read, daemon=True)
    parent.start()
    last = time.monotonic()
    while parent.is_alive():
        time.sleep(_NAP)
        now = time.monotonic()
        if now - last > _SPELL:
            sys.stdout.write(f"{last:.3f} {now - last:.3f}\n")
            sys.stdout.flush()
        last = now


if __name__ == "__main__":
    main()
