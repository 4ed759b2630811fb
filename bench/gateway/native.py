"""The two C programs: the synthetic engine and the load generator. Compiled at every start, into the output folder."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gateway.processes import end, pinned
from engine.errors import StartError

_SOURCES = Path(__file__).parent
_OVERTIME_SECONDS = 120.0
MODEL = "velocity-30b"
_PROMPT = (
    "You build pages with React and Tailwind. Write one component per answer, in TypeScript, without explanations. "
    "Keep what the page has and change only what is asked for. The page shows products in a grid, with a search field "
    "above it, a cart on the right and a footer with links. Make the cart collapse on small screens."
)

Report = dict[str, Any]
"""What the load generator prints: see the head of load.c."""


@dataclass(frozen=True)
class Programs:
    """Where the compiled programs are."""

    engine: Path
    load: Path


def compiled(out: Path) -> Programs:
    """Both, made anew. Raises StartError with what the compiler said."""
    out.mkdir(parents=True, exist_ok=True)
    programs = Programs(out / "engine", out / "load")
    for program in (programs.engine, programs.load):
        source = _SOURCES / f"{program.name}.c"
        command = ["cc", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-o", str(program), str(source)]
        try:
            made = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise StartError("There is no C compiler: the benchmark needs one that is called cc.") from None
        if made.returncode:
            raise StartError(f"{source.name} could not be compiled:\n{made.stderr}")
    return programs


@dataclass(frozen=True)
class Engine:
    """The synthetic engine."""

    port: int

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def stats(self) -> dict[str, Any]:
        """`requests`, `tokens`, `open` connections, and `aborts`: [number of the request, when it was noticed (ns)]."""
        with urllib.request.urlopen(f"{self.url}/stats", timeout=5) as reply:  # noqa: S310 - our own engine
            found: dict[str, Any] = json.load(reply)
        return found


@contextmanager
def running_engine(programs: Programs, cores: frozenset[int]) -> Iterator[Engine]:
    """The engine on a free port."""
    with pinned(cores):
        process = subprocess.Popen([str(programs.engine)], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout  # noqa: S101 - it was asked for
        port = process.stdout.readline()
        if not port:
            raise StartError("The synthetic engine did not start.")
        yield Engine(int(port))
    finally:
        end(process)
        if process.stdout:
            process.stdout.close()


@dataclass(frozen=True)
class Ask:
    """A request, and how the engine is to answer it."""

    tokens: int
    stream: bool = True
    rate: int = 0
    """Tokens per second; 0: as fast as they are taken."""
    prefill_ms: int = 0
    delay_ms: int = 0
    """Before an answer that is no stream."""

    def request(self, key: str) -> bytes:
        """The whole of it, as any OpenAI client writes it; its number is filled in by the load generator."""
        how = f"bench-rate-{self.rate} bench-prefill-{self.prefill_ms * 1000} bench-delay-{self.delay_ms * 1000}"
        content = f"bench-request-0000000000 {how} {_PROMPT}"
        body: dict[str, Any] = {
            "model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": self.tokens,
        }  # fmt: skip
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        text = json.dumps(body, separators=(",", ":")).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: application/json\r\n"
            f"content-type: application/json\r\nuser-agent: OpenAI/Python\r\nauthorization: Bearer {key}\r\n"
            f"content-length: {len(text)}\r\n\r\n"
        )
        return head.encode() + text


class Load:
    """One run of the load generator."""

    def __init__(self, programs: Programs, cores: frozenset[int], out: Path) -> None:
        self._program = programs.load
        self._cores = cores
        self._out = out

    def run(
        self, mode: str, port: int, request: bytes, *, meanwhile: Callable[[], None] | None = None, limit: float = 60.0,
        **options: float,
    ) -> Report:  # fmt: skip
        """Options as on its command line, with _ for -. `meanwhile` is called a few times a second.

        `limit` is how many seconds it is meant to take at most. Raises StartError if it takes far longer, or breaks.
        """
        asked, told = self._out / "request.http", self._out / "load.json"
        asked.write_bytes(request)
        command = [str(self._program), mode, "--port", str(port), "--request", str(asked)]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else str(value)]
        with told.open("wb") as output, pinned(self._cores):
            process = subprocess.Popen(command, stdout=output, start_new_session=True)
        try:
            _follow(process, meanwhile, time.monotonic() + limit + _OVERTIME_SECONDS)
        finally:
            end(process)
        if process.returncode:
            raise StartError(f"The load generator ended with {process.returncode}.")
        report: Report = json.loads(told.read_text(errors="replace"))
        return report


def _follow(process: subprocess.Popen[bytes], meanwhile: Callable[[], None] | None, deadline: float) -> None:
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise StartError("The load generator did not come to an end.")
        try:
            process.wait(0.25)
        except subprocess.TimeoutExpired:
            if meanwhile:
                meanwhile()
