"""The arms: what stands between client and engine. Each is started on the proxy's core and waits idly for its turn."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from api import redis_server
from bench.gateway.native import Ask, Engine
from bench.gateway.processes import Cores, started
from engine.errors import StartError
from engine.ports import free_port

ARMS = ("direct", "nginx", "vllm-router", "plain", "velocity")
_ROOT = Path(__file__).resolve().parents[2]
_VELOCITY = [sys.executable, "-m", "api.cli.main"]
_START_SECONDS = 60.0
_PLENTY = "1000000000"
"""A limit that is checked, and never reached."""
_MANY = "100000"

_NGINX = """\
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
    uwsgi_temp_path {folder}; scgi_temp_path {folder};
    client_body_buffer_size 1m;
    keepalive_requests 1000000000;
    upstream engine {{ server 127.0.0.1:{engine}; keepalive 1024; keepalive_requests 1000000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://engine;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
}}
"""


@dataclass(frozen=True)
class Arm:
    """One of them, up and answering."""

    name: str
    port: int
    pid: int | None = None
    """Of the proxy; `direct` has none."""
    redis: int | None = None
    """Process id of its Redis."""
    key: str = "none"


@dataclass(frozen=True)
class Site:
    """What an arm is started with."""

    engine: Engine
    cores: Cores
    out: Path

    @contextmanager
    def proxy(
        self, name: str, command: list[str], port: int, environment: dict[str, str] | None = None, key: str = "none",
        redis: int | None = None,
    ) -> Iterator[Arm]:  # fmt: skip
        """A process on the proxy's core that answers. Raises StartError with the end of its log."""
        log = self.out / f"{name}.log"
        with started(command, log, self.cores.proxy, environment) as process:
            request = Ask(1, stream=False).request(key)
            deadline = time.monotonic() + _START_SECONDS
            while not _answers(port, request):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise StartError(f"{name} did not come up. The end of its log:\n{_end(log)}")
                time.sleep(0.1)
            yield Arm(name, port, process.pid, redis, key)


@contextmanager
def running(names: list[str], site: Site, say: Callable[[str], None]) -> Iterator[list[Arm]]:
    """All of these arms, in this order; one that is not installed is left out, and that is said."""
    starts = {"direct": _direct, "nginx": _nginx, "vllm-router": _router, "plain": _plain, "velocity": _velocity}
    with ExitStack() as stack:
        found = []
        for name in names:
            try:
                found.append(stack.enter_context(starts[name](site)))
            except _NotInstalled as error:
                say(f"{name} is left out: {error}")
        yield found


class _NotInstalled(StartError):
    """There is no such program."""


@contextmanager
def _direct(site: Site) -> Iterator[Arm]:
    yield Arm("direct", site.engine.port)


@contextmanager
def _nginx(site: Site) -> Iterator[Arm]:
    places = [os.environ.get("PATH", ""), "/usr/sbin", f"{sys.prefix}/nginx/usr/sbin"]  # the last: see tests/tools.sh
    found = shutil.which("nginx", path=os.pathsep.join(places))
    if not found:
        raise _NotInstalled("nginx is not installed")
    port, folder = free_port(), (site.out / "nginx").resolve()
    folder.mkdir(exist_ok=True)
    configuration = folder / "nginx.conf"
    configuration.write_text(_NGINX.format(folder=folder, engine=site.engine.port, port=port))
    with site.proxy("nginx", [found, "-p", str(folder), "-e", "stderr", "-c", str(configuration)], port) as arm:
        yield arm


@contextmanager
def _router(site: Site) -> Iterator[Arm]:
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    found = shutil.which("vllm-router", path=os.pathsep.join(places))
    if not found:  # it agrees with what .venv has; one in another environment does as well, if it is on the PATH
        raise _NotInstalled("there is no vllm-router; .venv/bin/pip install 'vllm-router>=0.1.17'")
    port = free_port()
    command = [
        found, "--host", "127.0.0.1", "--port", str(port), "--worker-urls", site.engine.url, "--policy", "round_robin",
        "--prometheus-port", str(free_port()), "--log-level", "warning",
    ]  # fmt: skip
    with site.proxy("vllm-router", command, port) as arm:
        yield arm


@contextmanager
def _plain(site: Site) -> Iterator[Arm]:
    port = free_port()
    with site.proxy(
        "plain", [sys.executable, "-m", "bench.gateway.plain", site.engine.url, str(port)], port, _environment()
    ) as arm:
        yield arm


@contextmanager
def _velocity(site: Site) -> Iterator[Arm]:
    """With its Redis, which runs where there is room: a core that the load keeps busy would let every call wait."""
    data = site.out / "velocity"
    shutil.rmtree(data, ignore_errors=True)
    (data / redis_server.FOLDER).mkdir(parents=True)
    url, spec = redis_server.child(data, site.out / "redis.log", lambda _: None)
    try:
        with (
            started(list(spec.command), site.out / "redis.log", site.cores.proxy | site.cores.others) as redis,
            velocity(site, data, url, redis.pid) as arm,
        ):
            yield arm
    finally:
        redis_server.remove_socket(data)


@contextmanager
def velocity(site: Site, data: Path, redis_url: str, redis: int | None = None) -> Iterator[Arm]:
    """The api process as shipped: a key, every limit checked, usage accounted, metrics served, requests logged."""
    port = free_port()
    environment = _environment() | {
        "VELOCITY_REDIS_URL": redis_url, "VELOCITY_ENGINE_URL": site.engine.url, "VELOCITY_DATA_DIR": str(data),
        "VELOCITY_PORT": str(port), "VELOCITY_METRICS_PORT": str(free_port()), "VELOCITY_LOG_JSON": "1",
        "VELOCITY_GLOBAL_RPM": _PLENTY, "VELOCITY_GLOBAL_TPM": _PLENTY, "VELOCITY_GLOBAL_CONCURRENCY": _MANY,
    }  # fmt: skip
    with site.proxy("velocity", [*_VELOCITY, "api"], port, environment, _new_key(environment), redis) as arm:
        yield arm


def _new_key(environment: dict[str, str]) -> str:
    """Tried again while Redis is still starting. Raises StartError."""
    limits = ["--rpm", _PLENTY, "--tpm", _PLENTY, "--concurrency", _MANY, "--scope", "chat"]
    command = [*_VELOCITY, "keys", "create", "bench", *limits, "--json"]
    deadline = time.monotonic() + _START_SECONDS
    while True:
        made = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not made.returncode:
            return str(json.loads(made.stdout)["key"])
        if time.monotonic() > deadline:
            raise StartError(f"There is no key: {made.stderr}")
        time.sleep(0.2)


def _environment() -> dict[str, str]:
    """Of this process, without velocity's settings, so that what is shipped is measured; it finds this checkout."""
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    return {name: value for name, value in os.environ.items() if not name.startswith("VELOCITY_")} | {
        "PYTHONPATH": path
    }


def _answers(port: int, request: bytes) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(request)
        return connection.recv(65536).split(b" ", 2)[1:2] == [b"200"]
    return False


def _end(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]
