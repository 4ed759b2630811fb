"""What is measured as processes: started on cores of their own, ended whatever happens; processor time, memory."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_STOP_SECONDS = 10.0
_GONE = (FileNotFoundError, ProcessLookupError)


@dataclass(frozen=True)
class Cores:
    """Which cores run what is measured, and which everything else. On one core they are the same."""

    proxy: frozenset[int]
    others: frozenset[int]

    @classmethod
    def of_this_machine(cls) -> Cores:
        """The first core for the proxy."""
        first, *rest = sorted(os.sched_getaffinity(0))
        return cls(frozenset({first}), frozenset(rest or {first}))

    @property
    def apart(self) -> bool:
        """Whether the proxy has a core to itself."""
        return not self.proxy & self.others


@contextmanager
def pinned(cores: frozenset[int]) -> Iterator[None]:
    """What is started meanwhile by this thread runs on these cores, and so does this thread."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def started(
    command: list[str], log: Path, cores: frozenset[int], environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """In a group of its own, so that Ctrl-C reaches it in our order and not at once; what it says goes to `log`."""
    with log.open("wb") as output, pinned(cores):
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and for its whole group SIGKILL if that does not help."""
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
    finally:  # also when it is interrupted once more
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def tree(root: int | None) -> list[int]:
    """A process and all that descend from it; none of none."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(*_GONE):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [] if root is None else [root]
    for pid in found:
        found.extend(children.get(pid, ()))
    return found


def cpu_ns(pids: list[int]) -> int:
    """Processor time of all their threads so far, in user and in system mode, to the nanosecond."""
    total = 0
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with suppress(*_GONE):
                total += int(thread.read_text().split()[0])
    return total


def memory_kib(pids: list[int]) -> int:
    """Resident memory; what several of them share is counted once."""
    total = 0
    for pid in pids:
        with suppress(*_GONE):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total
