"""A process under test: started again whenever it ends, as a supervisor would, and gone when the test is."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
CRASHED = 137
"""Exit status of a process that ended itself at a named point."""


class Child:
    """One supervised process. What it says goes to `<directory>/<name>.log`."""

    def __init__(self, name: str, command: Sequence[str | Path], env: Mapping[str, str], directory: Path) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        self.pause = 0.3
        """Seconds until it is started again."""
        self.exits: list[int] = []
        """How it ended each time; a negative number is a signal."""
        self.unasked: list[int] = []
        """Of these, the ends that nobody asked for."""
        self._command = command
        self._env = {**os.environ, **env}
        self._asked = False
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Its process id, or None while it is down."""
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if self._process and running else None

    def start(self) -> None:
        """From now on it runs."""
        self._task = asyncio.create_task(self._supervise())

    async def _supervise(self) -> None:
        while True:
            with self.log.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command, env=self._env, cwd=ROOT, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
                )
            status = await self._process.wait()
            self.exits.append(status)
            if not self._asked and status != CRASHED:
                self.unasked.append(status)
            self._asked = False
            await asyncio.sleep(self.pause)

    def signal(self, number: signal.Signals) -> int | None:
        """Send a signal; the process id that got it, or None while it is down."""
        pid = self.pid
        if pid is not None:
            self._asked = self._asked or number in {signal.SIGKILL, signal.SIGTERM}
            os.kill(pid, number)
        return pid

    async def ended(self, times: int, seconds: float) -> None:
        """Wait until it has ended so many times in all. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while len(self.exits) < times:
                await asyncio.sleep(0.02)

    async def end(self) -> None:
        """Kill it for good."""
        if self._task is None:
            return
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._task = None
        if (pid := self.pid) is not None and self._process:
            os.kill(pid, signal.SIGKILL)
            await self._process.wait()

    def tail(self, most: int = 4000) -> str:
        """The end of what it said."""
        return self.log.read_text(errors="replace")[-most:] if self.log.exists() else ""
