"""nginx as the tests run it: the shipped configuration with other addresses, and what stands before and behind it."""

from __future__ import annotations

import asyncio
import os
import pwd
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import h2.config
import h2.connection
import h2.errors
import h2.events
import httpx
import pytest
import trustme

from engine.ports import free_port

SHIPPED = Path(__file__).parents[2] / "deploy" / "nginx.conf"


def binary() -> str:
    """nginx, wherever it is installed; without it the test is skipped, but under CI it fails."""
    places = [os.environ.get("PATH", ""), "/usr/sbin", f"{sys.prefix}/nginx/usr/sbin"]  # the last: see tests/tools.sh
    found = shutil.which("nginx", path=os.pathsep.join(places))
    if found:
        return found
    reason = "nginx is not installed; tests/tools.sh installs it where it can"
    return pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def last_words(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the other side closes the connection."""
    with suppress(ConnectionError, ssl.SSLError):
        return await reader.read()
    return b""


@dataclass
class Nginx:
    """A running nginx."""

    port: int
    plain_port: int
    directory: Path
    authority: trustme.CA

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def trust(self) -> ssl.SSLContext:
        """A context that believes the test's authority and nobody else."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.authority.configure_trust(context)
        return context

    def client(self, *, http2: bool = False, key: str = "none") -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.AsyncClient(
            base_url=self.url, verify=self.trust(), http1=not http2, http2=http2, headers=headers, timeout=30
        )

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Bytes over TLS: HTTP/1.1, since nothing else is asked for."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=self.trust())
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    def log(self, name: str) -> str:
        return (self.directory / "log" / name).read_text()


def configuration(directory: Path, upstream: str, edits: dict[str, str]) -> tuple[str, int, int]:
    """The shipped file with the values changed that its head names, and `edits`; the TLS port and the plain one.

    Each must be there exactly once, so that what is tested is what is shipped.
    """
    port, plain_port = free_port(), free_port()
    changes = {
        "server 127.0.0.1:8001;": f"server {upstream};",
        "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
        "listen 80;": f"listen 127.0.0.1:{plain_port};",
        "ssl_certificate /etc/velocity/tls/fullchain.pem;": f"ssl_certificate {directory}/fullchain.pem;",
        "ssl_certificate_key /etc/velocity/tls/privkey.pem;": f"ssl_certificate_key {directory}/privkey.pem;",
        "user www-data;": f"user {pwd.getpwuid(os.getuid()).pw_name};",
        "pid /run/nginx.pid;": f"pid {directory}/nginx.pid;",
        "error_log /var/log/nginx/": f"error_log {directory}/log/",
        "access_log /var/log/nginx/": f"access_log {directory}/log/",
        "worker_processes auto;": "worker_processes 2;",
        **{f"{kind}_temp_path /var/lib/nginx/": f"{kind}_temp_path {directory}/lib/"
           for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")},
        **edits,
    }  # fmt: skip
    text = SHIPPED.read_text()
    for old, new in changes.items():
        active = rf"(?m)^([^#\n]*){re.escape(old)}"  # what stands in a comment does not count
        text, times = re.subn(active, rf"\g<1>{new}", text)
        assert times == 1, f"{old!r} stands {times} times in {SHIPPED.name}"
    return text, port, plain_port


@contextmanager
def nginx(directory: Path, upstream: str, edits: dict[str, str] | None = None) -> Iterator[Nginx]:
    """nginx in front of `upstream` (host:port), ended whatever happens."""
    program = binary()
    for name in ("log", "lib"):
        (directory / name).mkdir()
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    certificate.private_key_pem.write_to_path(directory / "privkey.pem")
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(directory / "fullchain.pem", append=True)
    text, port, plain_port = configuration(directory, upstream, edits or {})
    path = directory / "nginx.conf"
    path.write_text(text)
    command = [program, "-p", f"{directory}/", "-c", str(path), "-e", f"{directory}/log/start.log"]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, timeout=30, check=False)
    assert checked.returncode == 0, checked.stderr
    process = subprocess.Popen([*command, "-g", "daemon off;"], stderr=subprocess.DEVNULL)
    try:
        _wait_for(process, port, directory)
        yield Nginx(port, plain_port, directory, authority)
    finally:
        process.terminate()  # the main process, which ends its workers
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
            raise


def _wait_for(process: subprocess.Popen[bytes], port: int, directory: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    logs = "".join(path.read_text() for path in (directory / "log").glob("*.log"))
    pytest.fail(f"nginx did not come up:\n{logs}")


@dataclass
class Request:
    """What came out of nginx towards velocity."""

    line: str
    headers: list[tuple[str, str]]
    body: bytes = b""

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]


@dataclass
class Recorder:
    """A server in velocity's place that writes down what reaches it."""

    address: str = ""
    connections: int = 0
    requests: list[Request] = field(default_factory=list)
    silent: bool = False
    """Close the connection instead of answering."""


class _Recording(asyncio.Protocol):
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.received = b""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.recorder.connections += 1

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, blank, body = self.received.partition(b"\r\n\r\n")
        if not blank:
            return
        line, *lines = head.decode().split("\r\n")
        headers = [(name.lower(), value.strip()) for name, _, value in (entry.partition(":") for entry in lines)]
        request = Request(line, headers, body)
        if len(body) < sum(int(value) for value in request.all("content-length")):
            return
        self.received = b""
        self.recorder.requests.append(request)
        if self.recorder.silent:
            self.transport.close()
            return
        self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")


@asynccontextmanager
async def recording() -> AsyncIterator[Recorder]:
    """A running recorder."""
    recorder = Recorder()
    server = await asyncio.get_running_loop().create_server(lambda: _Recording(recorder), "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    recorder.address = f"{host}:{port}"
    try:
        yield recorder
    finally:
        server.close()


class Http2:
    """An HTTP/2 connection frame by frame: httpx does not reset a stream that it leaves, browsers and Node do."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str) -> None:
        self._reader, self._writer, self._key = reader, writer, key
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self._h2.initiate_connection()

    def post(self, path: str, body: bytes) -> int:
        """Send a request; returns its stream."""
        stream = self._h2.get_next_available_stream_id()
        head = {":method": "POST", ":path": path, ":scheme": "https", ":authority": "velocity.test"}
        head |= {"authorization": f"Bearer {self._key}", "content-type": "application/json"}
        self._h2.send_headers(stream, list(head.items()))
        self._h2.send_data(stream, body, end_stream=True)
        self._flush()
        return stream

    def leave(self, stream: int) -> None:
        self._h2.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
        self._flush()

    async def read_until(self, stream: int, wanted: bytes) -> None:
        """Read the stream's body until `wanted` is in it."""
        body = b""
        async with asyncio.timeout(30):
            while wanted not in body:
                data = await self._reader.read(65536)
                assert data, "nginx closed the connection"
                for event in self._h2.receive_data(data):
                    assert not isinstance(event, h2.events.ConnectionTerminated | h2.events.StreamReset), event
                    if isinstance(event, h2.events.DataReceived) and event.stream_id == stream:
                        body += event.data
                self._flush()

    def _flush(self) -> None:
        self._writer.write(self._h2.data_to_send())


@asynccontextmanager
async def http2_connection(server: Nginx, key: str) -> AsyncIterator[Http2]:
    """An HTTP/2 connection to `server`."""
    context = server.trust()
    context.set_alpn_protocols(["h2"])
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context)
    try:
        yield Http2(reader, writer, key)
    finally:
        writer.transport.abort()
