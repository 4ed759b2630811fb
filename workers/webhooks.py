"""Webhooks after the Standard Webhooks specification (https://www.standardwebhooks.com): signed with a secret of the
tenant's own, sent without proxies, redirects or cookies, and only where workers/webhook_guard.py lets them.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
import secrets
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpcore
import httpx
import orjson

from workers import durable
from workers.errors import InputError, StorageError
from workers.job import JobState
from workers.webhook_guard import Guarded, Network, parse_url

Resolve = Callable[[str, int], Sequence[str]]
"""Addresses of a host, for a port. May block; raises OSError."""

SECRET_FILE = "webhook.secret"  # noqa: S105 - a file's name
DEADLINE = 10.0
"""Seconds for one delivery: name, connection, TLS, request and answer."""
_CONNECT = 3.0
"""Seconds for each address of a name."""
_ANSWER_MOST = 64 * 1024
_MASTER_BYTES = 32


@dataclass(frozen=True, slots=True)
class Delivery:
    """What came of sending an event once."""

    status_code: int | None
    """None if there was no answer."""
    error: str | None
    """A sentence without addresses; None if it was delivered."""
    seconds: float
    retry_after: float | None = None
    """Seconds that an overloaded receiver asks to be left alone for."""

    @property
    def delivered(self) -> bool:
        """Whether the receiver said that it has it."""
        return self.error is None


def check_url(url: str, allow: Sequence[Network], param: str = "webhook") -> None:
    """Raises InputError for an address that no event will ever be sent to. Asks no name server."""
    parse_url(url, allow, param)


def _resolve(host: str, port: int) -> list[str]:
    # As bytes: a name that is ASCII already must not go through Python's IDNA codec.
    found = socket.getaddrinfo(host.encode(), port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Webhooks:
    """Signs events with the tenant's secret and sends them, one connection each. Raises StorageError."""

    def __init__(
        self,
        data_dir: Path,
        allow: Sequence[Network] = (),
        *,
        resolve: Resolve = _resolve,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._path = data_dir / SECRET_FILE
        self._allow = allow
        self._resolve = resolve
        self._tls = tls
        self._master: bytes | None = None
        # Threads of its own: name servers that keep silent, which a tenant may choose, must not hold up anything else.
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="webhook-names")

    def check_url(self, url: str, param: str = "webhook") -> None:
        """Raises InputError for an address that no event will ever be sent to. Asks no name server."""
        check_url(url, self._allow, param)

    async def secret(self, tenant: str) -> str:
        """What a tenant's receivers check signatures with, as the specification writes it."""
        if self._master is None:
            self._master = await asyncio.to_thread(_master_of, self._path)
        key = hmac.digest(self._master, b"velocity-webhook:" + tenant.encode(), hashlib.sha256)
        return "whsec_" + base64.b64encode(key).decode()

    async def send(self, tenant: str, url: str, event: str, body: bytes) -> Delivery:
        """POST an event whose id is `event` (the same at every attempt), in at most ten seconds."""
        headers = signed_headers(await self.secret(tenant), event, int(time.time()), body)
        if self._tls is None:
            self._tls = await asyncio.to_thread(httpx.create_ssl_context)
        began = time.monotonic()
        answer: list[httpcore.Response] = []
        error: str | None = None
        try:
            async with asyncio.timeout(DEADLINE):
                await self._post(parse_url(url, self._allow), headers, body, answer)
        except InputError as refusal:
            error = str(refusal)
        except (TimeoutError, httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as failure:
            error = _sentence(failure)
        seconds = round(time.monotonic() - began, 3)
        if not answer:
            return Delivery(None, error, seconds)
        status = answer[0].status  # it decides, whatever became of the rest
        if 200 <= status < 300:
            return Delivery(status, None, seconds)
        where = "; redirects are not followed" if 300 <= status < 400 else ""
        wait = _retry_after(answer[0]) if status in {429, 503} else None
        return Delivery(status, f"The receiver answered {status}{where}.", seconds, wait)

    async def _post(
        self, url: httpx.URL, headers: dict[str, str], body: bytes, answer: list[httpcore.Response]
    ) -> None:
        """Append the answer as soon as its head is there; read and forget the beginning of its body."""
        guarded = Guarded(self._lookup, self._allow, plain=url.scheme == "http")
        to = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        async with (
            httpcore.AsyncHTTPConnection(to.origin, ssl_context=self._tls, network_backend=guarded) as connection,
            connection.stream(
                "POST", to, headers=list(headers.items()), content=body, extensions={"timeout": {"connect": _CONNECT}}
            ) as response,
        ):
            answer.append(response)
            size = 0
            async for part in response.aiter_stream():
                size += len(part)
                if size >= _ANSWER_MOST:
                    return

    def _lookup(self, host: str, port: int) -> asyncio.Future[Sequence[str]]:
        return asyncio.get_running_loop().run_in_executor(self._threads, self._resolve, host, port)


def signed_headers(secret: str, event: str, at: int, body: bytes) -> dict[str, str]:
    """Headers of one attempt at `at` (unix seconds)."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signature = hmac.digest(key, f"{event}.{at}.".encode() + body, hashlib.sha256)
    return {
        "content-type": "application/json", "user-agent": "velocity-webhooks", "connection": "close",
        "webhook-id": event, "webhook-timestamp": str(at),
        "webhook-signature": "v1," + base64.b64encode(signature).decode(),
    }  # fmt: skip


def job_event(job: JobState) -> bytes:
    """The body that says that a job is over: the same at every attempt."""
    return event_body(f"job.{job.status}", job.times.get(f"{job.status}_at", 0), {
        "id": job.id, "object": "job", "name": job.name, "status": job.status.value,
        "counts": {"total": job.total, "completed": job.completed, "failed": job.failed},
        "usage": {"input_tokens": job.input_tokens, "output_tokens": job.output_tokens},
        "metadata": dict(job.metadata),
    })  # fmt: skip


def event_body(kind: str, at: float, data: dict[str, Any]) -> bytes:
    """An event of that type at `at` (unix seconds)."""
    when = datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return orjson.dumps({"type": kind, "timestamp": when, "data": data})


def _sentence(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"The receiver did not answer within {DEADLINE:g} s."
    if isinstance(error.__cause__, ssl.SSLCertVerificationError):
        return "The receiver's certificate is not valid for its name."
    if isinstance(error.__cause__, ssl.SSLError):
        return "The receiver does not speak TLS as it should."
    if isinstance(error, httpcore.ConnectError | httpcore.ConnectTimeout):
        return "The receiver can't be connected to."
    return "The receiver broke the connection off, or answered with something that is not HTTP."


def _retry_after(response: httpcore.Response) -> float | None:
    """Seconds, which may also be written as a date."""
    text = next((value for name, value in response.headers if name.lower() == b"retry-after"), b"").decode("latin-1")
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    with suppress(ValueError, OverflowError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return None


def _master_of(path: Path) -> bytes:
    """What every tenant's secret is derived from; made once, by whichever process is first."""
    with durable.storage("The webhook secret can't be kept"):
        if not path.exists():
            durable.create_once(path, secrets.token_bytes(_MASTER_BYTES), 0o600)
        master = path.read_bytes()
    if len(master) != _MASTER_BYTES:
        raise StorageError(f"{path.name} in the data directory is damaged: it must have {_MASTER_BYTES} bytes.")
    return master
