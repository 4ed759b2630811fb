"""Real processes: `velocity up`, started once per run with the real vLLM, or quickly in front of a fake engine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import orjson
import pytest

from engine.ports import free_port

VELOCITY = [sys.executable, "-m", "api.cli.main"]


@dataclass
class Up:
    """A running `velocity up`."""

    process: subprocess.Popen[str]
    url: str
    data: Path
    key: str = ""
    lines: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def wait_for(self, pattern: str, seconds: float) -> str:
        """The part of its output that matches, once it does."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := re.search(pattern, self.text):
                return found[0]
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        pytest.fail(f"velocity up said no {pattern!r} within {seconds} s but:\n{self.text}")

    def pid_of(self, part: str) -> int:
        """Process id of one of its children, by what it runs."""
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
                command = (stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError):
                continue
            other_lane = "quarantine" in command and "quarantine" not in part
            if parent == self.process.pid and part in command and not other_lane:
                return int(stat.parent.name)
        return pytest.fail(f"velocity up has no child that runs {part!r}")

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {self.key}"}, timeout=120)

    def velocity(
        self, *arguments: str, check: bool = True, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run another velocity command beside it, as a person would."""
        env = {"VELOCITY_DATA_DIR": str(self.data), "VELOCITY_URL": self.url, "VELOCITY_API_KEY": self.key}
        return subprocess.run(
            [*VELOCITY, *arguments], env=os.environ | env, input=stdin, text=True, capture_output=True, check=check,
            timeout=180,
        )  # fmt: skip


@contextmanager
def velocity_up(*options: str, env: dict[str, str] | None = None, ready_seconds: float = 60) -> Iterator[Up]:
    """`velocity up` on a free port and an empty data directory, with an API key; ended whatever happens."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="velocity-e2e-") as directory:
        process = subprocess.Popen(
            [*VELOCITY, "up", "--port", str(port), "--data", directory, *options],
            env=os.environ | {"COLUMNS": "200"} | (env or {}),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        up = Up(process, f"http://127.0.0.1:{port}", Path(directory))
        reader = threading.Thread(target=_read, args=(process, up.lines))
        reader.start()
        try:
            up.wait_for("ready", ready_seconds)
            up.key = orjson.loads(up.velocity("keys", "create", "e2e", "--json").stdout)["key"]
            yield up
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
            finally:
                reader.join()
                assert process.stdout
                process.stdout.close()


def _read(process: subprocess.Popen[str], lines: list[str]) -> None:
    assert process.stdout
    for line in process.stdout:
        lines.append(line)  # noqa: PERF402 - others read the list while it grows


@pytest.fixture(scope="session")
def real() -> Iterator[Up]:
    """velocity with the real vLLM and its embedded model, on short leases so that a killed worker is soon followed."""
    with velocity_up(env={"VELOCITY_LEASE_SECONDS": "4"}, ready_seconds=600) as up:
        yield up
