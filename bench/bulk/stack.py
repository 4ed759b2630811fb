"""The velocity that is measured: one of its own, started and ended here, or one that runs already."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.ports import free_port

_VELOCITY = [sys.executable, "-m", "api.cli.main"]
_START_SECONDS = 900
_STOP_SECONDS = 60


@dataclass(frozen=True)
class Stack:
    """Where to ask, and which process works."""

    url: str
    key: str
    engine_url: str
    worker: int | None
    """Process id; None if it is not known."""

    def peak_memory(self) -> float | None:
        """The worker's largest resident memory so far, in MiB."""
        if self.worker is None:
            return None
        status = Path(f"/proc/{self.worker}/status").read_text()
        return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))

    def cpu_seconds(self) -> float | None:
        """Processor time that the worker took so far."""
        if self.worker is None:
            return None
        fields = Path(f"/proc/{self.worker}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def own_velocity(window: int) -> Iterator[Stack]:
    """`velocity up` in an empty data directory, whose worker keeps `window` requests at the engine."""
    with tempfile.TemporaryDirectory(prefix="velocity-bench-bulk-") as directory:
        data, log = Path(directory) / "data", Path(directory) / "up.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*_VELOCITY, "up", "--port", str(free_port()), "--data", str(data)],
                env=os.environ | {"VELOCITY_BULK_WINDOW": str(window)},
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            _wait_for(process, log)
            where = json.loads((data / "up.json").read_text())
            yield Stack(where["url"], _new_key(data), where["engine_url"], _worker_of(process.pid))
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while "ready" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"velocity did not come up:\n{log.read_text()}")
        time.sleep(0.5)


def _new_key(data: Path) -> str:
    command = [*_VELOCITY, "keys", "create", "bench", "--scope", "jobs", "--json"]
    env = os.environ | {"VELOCITY_DATA_DIR": str(data)}
    made = subprocess.run(command, env=env, check=True, capture_output=True, timeout=60)
    return str(json.loads(made.stdout)["key"])


def _worker_of(parent: int) -> int | None:
    """The child of `velocity up` that works on the bulk lane."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            mine = int(stat.read_text().rpartition(")")[2].split()[1]) == parent
            if mine and (stat.parent / "cmdline").read_bytes().endswith(b"\0worker\0"):
                return int(stat.parent.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return None
