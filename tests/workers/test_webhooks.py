"""Webhooks: what receivers get and can check, and where events are never sent to."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from ipaddress import ip_network
from pathlib import Path

import pytest
import trustme

from tests.webhook_receiver import OK, Event, Receiver, answer, receiving, to
from workers import webhooks
from workers.errors import StorageError
from workers.job import JobState, JobStatus, new_id
from workers.webhooks import SECRET_FILE, Delivery, Webhooks, job_event, signed_headers

TENANT = new_id("tenant")
HERE = (ip_network("127.0.0.0/8"),)
NAME = "hooks.example.com"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def trust(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def certified(authority: trustme.CA, name: str = NAME) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


@pytest.fixture
async def secure(authority: trustme.CA) -> AsyncIterator[Receiver]:
    async with receiving(certified(authority)) as running:
        yield running


@pytest.fixture
async def plain() -> AsyncIterator[Receiver]:
    async with receiving() as running:
        yield running


@pytest.fixture
def local(tmp_path: Path, trust: ssl.SSLContext) -> Webhooks:
    """Every name is this machine, which is allowed."""
    return Webhooks(tmp_path, HERE, resolve=to("127.0.0.1"), tls=trust)


async def send(sender: Webhooks, url: str) -> Delivery:
    result = await sender.send(TENANT, url, "evt_1", b'{"type":"webhook.test"}')
    assert result.error is None or not any(part in result.error for part in ("127.0", "10.0", "::"))
    return result


async def test_an_event_arrives_signed_over_tls(local: Webhooks, secure: Receiver) -> None:
    result = await send(local, f"https://{NAME}:{secure.port}/a/b?c=%20d&e")
    assert (result.delivered, result.status_code, result.error) == (True, 204, None)
    (event,) = secure.events
    assert event.target == "/a/b?c=%20d&e"
    assert event.headers["host"] == f"{NAME}:{secure.port}"
    assert event.headers["content-type"] == "application/json"
    assert (event.id, event.body) == ("evt_1", b'{"type":"webhook.test"}')
    assert abs(int(event.headers["webhook-timestamp"]) - time.time()) < 60
    assert event.signed_with(await local.secret(TENANT))
    assert not event.signed_with(await local.secret(new_id("tenant")))
    event.body += b" "
    assert not event.signed_with(await local.secret(TENANT))


def test_signatures_are_those_of_the_specification() -> None:
    """The example that its reference libraries are tested with."""
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    headers = signed_headers(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_the_event_of_a_job() -> None:
    job = JobState(
        id="job_1", tenant=TENANT, status=JobStatus.EXPIRED, name="n", model="m", endpoint="e", total=3, completed=1,
        failed=2, input_tokens=4, output_tokens=5, shards=1, shard_size=8, metadata={"a": "b"},
        times={"expired_at": 1_700_000_000},
    )  # fmt: skip
    assert job_event(job) == (
        b'{"type":"job.expired","timestamp":"2023-11-14T22:13:20Z","data":{"id":"job_1","object":"job","name":"n",'
        b'"status":"expired","counts":{"total":3,"completed":1,"failed":2},"usage":{"input_tokens":4,"output_tokens":5},'
        b'"metadata":{"a":"b"}}}'
    )


async def test_each_tenant_has_a_secret_of_its_own_that_stays(tmp_path: Path) -> None:
    first, second = Webhooks(tmp_path), Webhooks(tmp_path)
    secret = await first.secret(TENANT)
    assert secret == await second.secret(TENANT)
    assert secret.startswith("whsec_")
    assert secret != await first.secret(new_id("tenant"))
    path = tmp_path / SECRET_FILE
    assert path.stat().st_mode & 0o777 == 0o600
    derived = hmac.new(path.read_bytes(), f"velocity-webhook:{TENANT}".encode(), hashlib.sha256).digest()
    assert base64.b64decode(secret[6:]) == derived


def test_processes_that_race_agree_on_the_secret(tmp_path: Path) -> None:
    path = tmp_path / "data" / SECRET_FILE
    with ThreadPoolExecutor(16) as pool:
        made = set(pool.map(webhooks._master_of, [path] * 64))
    assert len(made) == 1
    assert [found.name for found in path.parent.iterdir()] == [SECRET_FILE]


async def test_a_damaged_secret_is_not_used(tmp_path: Path) -> None:
    (tmp_path / SECRET_FILE).write_bytes(b"short")
    with pytest.raises(StorageError, match="damaged"):
        await Webhooks(tmp_path).secret(TENANT)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(local: Webhooks, plain: Receiver, status: int) -> None:
    async with receiving() as elsewhere:
        plain.reply = answer(status, f"location: {elsewhere.url}")
        result = await send(local, plain.url)
        assert (result.status_code, result.delivered) == (status, False)
        assert "redirects" in str(result.error)
        assert not elsewhere.connections


async def test_neither_proxies_nor_cookies(local: Webhooks, plain: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
    plain.reply = answer(200, "set-cookie: a=b")
    for _ in range(2):
        assert (await send(local, plain.url)).delivered
    assert not any("cookie" in event.headers for event in plain.events)


async def test_certificates_are_checked_against_the_name(
    authority: trustme.CA, tmp_path: Path, trust: ssl.SSLContext, secure: Receiver
) -> None:
    sender = Webhooks(tmp_path, HERE, resolve=to("127.0.0.1"), tls=trust)
    result = await send(sender, f"https://other.example.com:{secure.port}/")
    assert result.error == "The receiver's certificate is not valid for its name."
    strangers = Webhooks(tmp_path, HERE, resolve=to("127.0.0.1"))  # with the authorities that everybody trusts
    assert "certificate" in str((await send(strangers, f"https://{NAME}:{secure.port}/")).error)
    assert not secure.events
    async with receiving(certified(authority, "127.0.0.1")) as by_address:
        assert (await send(sender, f"https://127.0.0.1:{by_address.port}/")).delivered


@pytest.fixture
async def no_tls() -> AsyncIterator[int]:
    """Port of a server that says something else before it is asked."""

    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.com ready\r\n")
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def test_what_can_go_wrong_is_said(local: Webhooks, plain: Receiver, tmp_path: Path, no_tls: int) -> None:
    assert "TLS" in str((await send(local, f"https://{NAME}:{no_tls}/")).error)
    assert "connected" in str((await send(local, "http://127.0.0.1:9/")).error)
    for reply in (b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\n"):
        plain.reply = reply
        assert "not HTTP" in str((await send(local, plain.url)).error)
    plain.reply = answer(500)
    assert (await send(local, plain.url)).error == "The receiver answered 500."

    def unknown(_host: str, _port: int) -> Sequence[str]:
        raise OSError("no such name 10.0.0.1")

    for resolve in (unknown, to()):
        assert "no address" in str((await send(Webhooks(tmp_path, resolve=resolve), f"https://{NAME}/")).error)


async def test_time_is_bounded(
    local: Webhooks, tmp_path: Path, plain: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "DEADLINE", 0.3)

    async def silent(_: Event, __: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async def dripping(_: Event, writer: asyncio.StreamWriter) -> None:
        for byte in OK:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.2)

    for responds in (silent, dripping):
        plain.responds = responds
        assert (await send(local, plain.url)).error == "The receiver did not answer within 0.3 s."

    def slow(_host: str, _port: int) -> Sequence[str]:
        time.sleep(1)
        return ["127.0.0.1"]

    result = await send(Webhooks(tmp_path, HERE, resolve=slow), plain.url)
    assert result.error == "The receiver did not answer within 0.3 s."


async def test_the_status_decides_whatever_becomes_of_the_rest(local: Webhooks, plain: Receiver) -> None:
    plain.reply = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf"
    assert (await send(local, plain.url)).delivered


async def test_an_endless_answer_is_not_read(local: Webhooks, plain: Receiver) -> None:
    ended = asyncio.Event()

    async def endless(_: Event, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n")
        try:
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
        finally:
            ended.set()

    plain.responds = endless
    assert (await send(local, plain.url)).delivered
    async with asyncio.timeout(30):
        await ended.wait()


async def test_a_receiver_may_ask_for_a_pause(local: Webhooks, plain: Receiver) -> None:
    async def pause(status: int, text: str) -> float | None:
        plain.reply = answer(status, f"Retry-After: {text}")
        return (await send(local, plain.url)).retry_after

    assert await pause(429, "120") == 120
    assert await pause(503, "7") == 7
    in_an_hour = await pause(503, formatdate(time.time() + 3600, usegmt=True))
    assert in_an_hour is not None
    assert 3500 < in_an_hour <= 3600
    assert await pause(503, formatdate(time.time() - 3600, usegmt=True)) == 0
    for status, text in ((500, "120"), (503, "soon"), (503, "-5"), (503, "9" * 40)):
        assert await pause(status, text) is None
