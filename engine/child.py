"""One supervised child process: in its own group, its output forwarded, restarted when it dies, ended cleanly."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine import log
from engine.errors import StartError, VelocityError

_RESTART_WINDOW = 600.0
_BACKOFF_FIRST = 1.0
_BACKOFF_MOST = 30.0
_POLL_SECONDS = 0.1
_TAIL_LINES = 400
_SHOWN_LINES = 6
_CAUSE = re.compile(r"\w+(Error|Exception): \S")

logger = log.get(__name__)


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to start and when it counts as up.

    `stop_seconds` is the time between SIGTERM and SIGKILL (to the whole process group); `restarts` within ten minutes
    are allowed before the supervisor gives up. `line` gets every line of output; `log_file` gets it too. It inherits
    the file `descriptors`.
    """

    name: str
    command: Sequence[str]
    ready: Callable[[], Awaitable[bool]]
    env: Mapping[str, str] = field(default_factory=dict)
    start_seconds: float = 60.0
    stop_seconds: float = 10.0
    restarts: int = 5
    log_file: Path | None = None
    line: Callable[[str], None] | None = None
    tell: Callable[[str], None] | None = None
    """Gets a sentence for people when it dies and when it is back; without it, the log gets an event."""
    descriptors: Sequence[int] = ()
    own_output: bool = True
    """Without, it writes to where this process writes, also when this process has gone; then there are no lines."""
    fault: Callable[[], VelocityError | None] | None = None
    """Asked when it ended while starting; what it returns is raised, since no restart would mend it."""


class Child:
    """The process of one ChildSpec: `start()` once, then `supervise()`, then `stop()`."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.restarts = 0
        self._process: asyncio.subprocess.Process | None = None
        self._forwarder: asyncio.Task[None] | None = None
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._deaths: deque[float] = deque()

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def start(self) -> None:
        """Start it and wait until it is ready.

        Raises StartError with the end of its output if it isn't in time, or the fault that the spec knows of.
        """
        self._process = await asyncio.create_subprocess_exec(
            *_bound_to_parent(self.spec.command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE if self.spec.own_output else None,
            stderr=asyncio.subprocess.STDOUT if self.spec.own_output else None,
            pass_fds=self.spec.descriptors,
            env={**os.environ, **self.spec.env},
            start_new_session=True,
            limit=1 << 20,
        )
        self._forwarder = asyncio.create_task(self._forward(self._process)) if self.spec.own_output else None
        started = time.monotonic()
        while not await self.spec.ready():
            if self._process.returncode is not None:
                if self._forwarder is not None:
                    await self._forwarder
                if self.spec.fault and (fault := self.spec.fault()):
                    raise fault
                raise StartError(self._reason(f"ended with {_ending(self._process.returncode)} while starting"))
            if time.monotonic() - started > self.spec.start_seconds:
                await self.stop()
                raise StartError(self._reason(f"was not ready within {self.spec.start_seconds:g} s"))
            await asyncio.sleep(0.2)

    async def supervise(self) -> None:
        """Restart it, with growing pauses, whenever it dies.

        Raises StartError when it dies too often, or the fault that the spec knows of.
        """
        while True:
            assert self._process is not None  # noqa: S101 - start() came first
            code = await _exit_code(self._process)
            now = time.monotonic()
            self._deaths.append(now)
            while self._deaths and now - self._deaths[0] > _RESTART_WINDOW:
                self._deaths.popleft()
            if len(self._deaths) > self.spec.restarts:
                raise StartError(
                    self._reason(f"died {len(self._deaths)} times within ten minutes, last with {_ending(code)}")
                )
            pause = min(_BACKOFF_MOST, _BACKOFF_FIRST * 2 ** (len(self._deaths) - 1))
            if self.spec.tell:
                self.spec.tell(f"{self.spec.name} died ({_ending(code)}); restarting in {pause:g} s")
            else:
                logger.warning("child_died", child=self.spec.name, ending=_ending(code), restart_in_seconds=pause)
            _signal_group(self._process.pid, signal.SIGKILL)  # what it started must not outlive it
            await asyncio.sleep(pause)
            self.restarts += 1
            try:
                await self.start()
            except StartError as error:
                logger.warning("child_restart_failed", child=self.spec.name, reason=str(error))
                if self.pid is None:
                    continue
            else:
                if self.spec.tell:
                    self.spec.tell(f"{self.spec.name} is back")
                else:
                    logger.info("child_restarted", child=self.spec.name, pid=self.pid)

    async def stop(self) -> None:
        """SIGTERM, then after `stop_seconds` SIGKILL to the whole group. Safe to call at any time, also twice."""
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(self.spec.stop_seconds):
                    await _exit_code(process)
            except TimeoutError:
                logger.warning("child_killed", child=self.spec.name, after_seconds=self.spec.stop_seconds)
        _signal_group(process.pid, signal.SIGKILL)
        await process.wait()
        if self._forwarder is not None:
            await self._forwarder

    def kill(self) -> None:
        """SIGKILL to the whole group, now."""
        if self._process is not None:
            _signal_group(self._process.pid, signal.SIGKILL)

    async def _forward(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None  # noqa: S101 - asked for in start()
        sink = self.spec.log_file.open("ab") if self.spec.log_file else None
        try:
            async for raw in process.stdout:
                line = raw.decode(errors="replace").rstrip()
                self._tail.append(line)
                if sink:
                    sink.write(raw)
                    sink.flush()
                if self.spec.line:
                    self.spec.line(line)
        finally:
            if sink:
                sink.close()

    def _reason(self, what: str) -> str:
        """What went wrong, with the first error in its output (later ones mostly follow from it) and its last words."""
        where = f" The whole log: {self.spec.log_file}" if self.spec.log_file else ""
        lines = list(self._tail)
        shown = [line for line in lines if _CAUSE.search(line)][:1] + lines[-_SHOWN_LINES:]
        return f"{self.spec.name} {what}.{where}" + "".join(f"\n  | {line}" for line in dict.fromkeys(shown))


async def _exit_code(process: asyncio.subprocess.Process) -> int:
    """Wait for the process alone: `process.wait()` also waits until whatever it started has closed its output."""
    while process.returncode is None:
        await asyncio.sleep(_POLL_SECONDS)
    return process.returncode


def _bound_to_parent(command: Sequence[str]) -> list[str]:
    """The command, ended by the kernel when this process is killed and can't do it (where util-linux is there)."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--", *command] if setpriv else list(command)


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return
