"""What reaches the door as bytes: heads that no client of ours sends, and requests that hide another one."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import httpx
import pytest

from api.settings import ApiSettings
from tests.api.conftest import Door, front_door
from tests.fake_engine import FakeEngine

HOST = b"Host: velocity.test\r\n"
CHAT = b'{"model":"tiny","messages":[{"role":"user","content":"hi"}]}'
HIDDEN = b"GET /v1/models HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
"""A request without a key that follows another on the same connection, and ends it."""
PATIENCE = 60.0


def bearer(key: str) -> bytes:
    return f"Authorization: Bearer {key}\r\n".encode()


def statuses(said: bytes) -> list[int]:
    """Of all the answers, in order."""
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", said)]


async def talk(door: Door, *data: bytes, until: bytes | None = None) -> bytes:
    """All that the server answers to these bytes until it closes, or has said `until`."""
    parts = urlsplit(door.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    said = b""
    try:
        async with asyncio.timeout(PATIENCE):
            for part in data:
                writer.write(part)
                await writer.drain()
            while (until is None or until not in said) and (got := await reader.read(65536)):
                said += got
    except ConnectionError:  # closed while there was more to come
        pass
    finally:
        writer.close()
    return said


def post(door: Door, head: bytes, body: bytes = b"") -> bytes:
    """A chat request with a valid key, and the head's own lines."""
    return b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + bearer(door.key) + head + b"\r\n" + body


CHUNKED = b"Transfer-Encoding: chunked\r\n"
EMPTY = b"0\r\n\r\n"
AMBIGUOUS: dict[str, tuple[bytes, bytes]] = {
    "length and chunks": (b"Content-Length: 5\r\n" + CHUNKED, EMPTY),
    "chunks and length": (CHUNKED + b"Content-Length: 5\r\n", EMPTY),
    "two lengths": (b"Content-Length: 0\r\nContent-Length: 90\r\n", b""),
    "the same length twice": (b"Content-Length: 0\r\nContent-Length: 0\r\n", b""),
    "a list of lengths": (b"Content-Length: 0, 0\r\n", b""),
    "a signed length": (b"Content-Length: +2\r\n", b"{}"),
    "a negative length": (b"Content-Length: -2\r\n", b"{}"),
    "a hexadecimal length": (b"Content-Length: 0x2\r\n", b"{}"),
    "a length with a space": (b"Content-Length: 1 0\r\n", b"{}"),
    "a length beyond 64 bits": (b"Content-Length: 99999999999999999999\r\n", b"{}"),
    "an unknown coding": (b"Transfer-Encoding: xchunked\r\n", EMPTY),
    "identity": (b"Transfer-Encoding: identity\r\n", EMPTY),
    "chunked is not last": (b"Transfer-Encoding: chunked, gzip\r\n", EMPTY),
    "chunked twice": (CHUNKED * 2, EMPTY),
    "a space before the colon": (b"Transfer-Encoding : chunked\r\n", EMPTY),
    "a folded header": (b"X-A: b\r\n c\r\nContent-Length: 2\r\n", b"{}"),
    "a folded coding": (b"Transfer-Encoding:\r\n chunked\r\n", EMPTY),
    "a bare CR": (b"X-A: b\rContent-Length: 2\r\n", b"{}"),
    "a bare LF": (b"X-A: b\n\r\n", b"{}"),
    "NUL in a header": (b"X-A: b\x00c\r\nContent-Length: 2\r\n", b"{}"),
    "a name with a space": (b"X A: b\r\nContent-Length: 2\r\n", b"{}"),
    "no colon": (b"nonsense\r\nContent-Length: 2\r\n", b"{}"),
    "chunks that end in LF": (CHUNKED, b"2\n{}\n0\n\n"),
    "a chunk longer than said": (CHUNKED, b"1\r\n{}\r\n0\r\n\r\n"),
    "a chunk size beyond 64 bits": (CHUNKED, b"ffffffffffffffff2\r\n{}\r\n0\r\n\r\n"),
    "a signed chunk size": (CHUNKED, b"+2\r\n{}\r\n0\r\n\r\n"),
    "a prefixed chunk size": (CHUNKED, b"0x2\r\n{}\r\n0\r\n\r\n"),
    "a line end in a chunk extension": (CHUNKED, b'2;a="\n"\r\n{}\r\n0\r\n\r\n'),
}


async def test_requests_that_can_be_read_in_two_ways_end_the_connection(door: Door) -> None:
    for name, (head, body) in AMBIGUOUS.items():
        said = await talk(door, post(door, head, body) + HIDDEN + HIDDEN)
        assert statuses(said) == [400], name
    assert not door.engine.requests


HARMLESS: dict[str, tuple[bytes, bytes]] = {
    "a body that is a request": (b"Content-Length: %d\r\n" % len(HIDDEN), HIDDEN),
    "chunks that are a request": (CHUNKED, b"%x\r\n%s\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN)),
    "a coding before chunked": (b"Transfer-Encoding: gzip, chunked\r\n", b"2\r\n{}\r\n0\r\n\r\n"),
    "a tab before the value": (b"Transfer-Encoding:\tchunked\r\n", b"2\r\n{}\r\n0\r\n\r\n"),
    "an extension": (CHUNKED, b"2;a=b\r\n{}\r\n0\r\n\r\n"),
    "leading zeros": (b"Content-Length: 00002\r\n", b"{}"),
}


async def test_what_follows_a_request_needs_a_key_of_its_own(door: Door) -> None:
    for name, (head, body) in HARMLESS.items():
        request = post(door, head, body)
        said = await talk(door, request + HIDDEN + HIDDEN)
        assert statuses(said) == [400, 401], name
        said = await talk(door, request.replace(bearer(door.key), b"") + HIDDEN + HIDDEN)
        assert statuses(said) == [401, 401], name


async def test_trailers_are_no_headers(door: Door) -> None:
    """Neither of this request nor of the next one."""
    chunks = b"2\r\n{}\r\n0\r\n" + bearer(door.key) + b"\r\n"
    head = b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + CHUNKED + b"\r\n"
    said = await talk(door, head + chunks + HIDDEN)
    assert b'"object":"list"' not in said
    assert set(statuses(said)) <= {400, 401}


@pytest.mark.parametrize("known", [True, False])
async def test_there_is_no_other_protocol_to_change_to(door: Door, known: bool) -> None:
    """A request that asks for one is answered as ever, and its connection takes no second request."""
    for upgrade in (b"h2c", b"websocket", b"TLS/1.0"):
        lines = (
            HOST + b"Connection: keep-alive, Upgrade\r\nUpgrade: " + upgrade + b"\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
            + (bearer(door.key) if known else b"")
        )  # fmt: skip
        said = await talk(door, b"GET /v1/models HTTP/1.1\r\n" + lines + b"\r\n" + HIDDEN)
        assert statuses(said) == [200 if known else 401]
        for body in (b"Content-Length: %d\r\n\r\n" % len(CHAT) + CHAT, CHUNKED + b"\r\n" + EMPTY):
            said = await talk(door, b"POST /v1/chat/completions HTTP/1.1\r\n" + lines + body + HIDDEN)
            assert statuses(said) == [400]
            assert b"Upgrade" in said
    assert not door.engine.requests


async def test_half_of_a_proxys_websocket_settings_does_no_harm(door: Door) -> None:
    """Connection: upgrade alone is what nginx sends where it was set up for websockets, and nobody asks for one."""
    head = b"Connection: upgrade\r\nContent-Length: %d\r\n" % len(CHAT)
    assert statuses(await talk(door, post(door, head, CHAT), until=b'"usage"')) == [200]


HEADS = [
    (b"GET /health HTTP/1.1\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\n" + HOST + b"Host: other\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\n" + HOST * 2 + b"\r\n", 400),
    (b"GET /health HTTP/1.0\r\n\r\n", 200),
    (b"GET /health HTTP/1.1\r\n" + HOST + b"Connection: close\r\n" + b"X-A: b\r\n" * 98 + b"\r\n", 200),
    (b"GET /health HTTP/1.1\r\n" + HOST + b"X-A: b\r\n" * 100 + b"\r\n", 431),
    (b"GET /health HTTP/1.1\r\n" + HOST + b"X-A: " + b"b" * 40_000 + b"\r\n\r\n", 431),
    (b"GET /health HTTP/1.1\r\n" + HOST + b"X-" + b"a" * 40_000 + b": b\r\n\r\n", 431),
    (b"GET /health HTTP/1.1\r\n" + HOST + b"Connection: close\r\nX-A: " + b"b" * 32_000 + b"\r\n\r\n", 200),
    (b"GET /health\r\n\r\n", 400),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    (b"GET /health HTTP/9.9\r\n" + HOST + b"\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    (b"\x00" * 100, 400),
    (b"GET\t/health\tHTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"BREW /health HTTP/1.1\r\n" + HOST + b"\r\n", 400),
]


async def test_heads(door: Door) -> None:
    for head, status in HEADS:
        assert statuses(await talk(door, head)) == [status], head[:80]


async def test_the_limits_on_heads_come_before_the_key(door: Door) -> None:
    many = b"".join(b"X-%d: y\r\n" % number for number in range(101))
    for key in (b"", bearer(door.key)):
        said = await talk(door, b"GET /v1/models HTTP/1.1\r\n" + HOST + key + many + b"\r\n")
        assert statuses(said) == [431]
        assert b"headers_too_large" in said


@pytest.fixture
async def small(settings: ApiSettings, engine: FakeEngine) -> AsyncIterator[Door]:
    """A front door with little room."""
    tight = {"max_body_bytes": 100_000, "max_job_bytes": 200_000}
    async with front_door(settings.model_copy(update=tight), engine) as door:
        yield door


@pytest.fixture
async def hasty(settings: ApiSettings, engine: FakeEngine) -> AsyncIterator[Door]:
    """A front door with little patience."""
    async with front_door(settings.model_copy(update={"body_timeout": 0.2}), engine) as door:
        yield door


ROOM = [
    ("/v1/chat/completions", 100_000), ("/v1/embeddings", 100_000), ("/jobs", 200_000), ("/admin/keys", 65_536),
    ("/v1/batches", 131_072), ("/webhooks/test", 16_384),
]  # fmt: skip


@pytest.mark.parametrize("counted", [True, False])
async def test_bodies_have_a_limit_however_they_come(small: Door, counted: bool) -> None:
    """Also a client that sends far too much is told so, rather than being cut off."""

    async def chunks(body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), 8192):
            yield body[start : start + 8192]

    key = await small.new_key(scopes=("chat", "jobs", "admin"))
    for path, most in ROOM:
        for size, status in ((most, 400), (most + 1, 413), (most * 50, 413)):
            body = b" " * size
            async with small.client(key) as client:
                response = await client.post(path, content=body if counted else chunks(body))
            assert response.status_code == status, (path, size)
            assert response.json()["error"]["code"] == ("request_too_large" if status == 413 else "invalid_json")
    assert not small.engine.requests


def test_the_default_room() -> None:
    assert ApiSettings().max_body_bytes == 8 * 1024 * 1024


async def test_a_length_is_only_a_hint(door: Door, hasty: Door) -> None:
    """It is what comes that counts; a promise of much is neither refused at once nor waited for."""
    said = await talk(door, post(door, b"Content-Length: 2\r\n", b"{}" + HIDDEN))
    assert statuses(said) == [400, 401]
    said = await talk(hasty, post(hasty, b"Content-Length: 999999999999\r\n", b"{"))
    assert statuses(said) == [408]


async def test_slow_bodies_are_given_up(hasty: Door) -> None:
    for head in (b"Content-Length: 10\r\n", CHUNKED):
        for path in (b"/v1/chat/completions", b"/jobs", b"/v1/batches", b"/webhooks/test"):
            said = await talk(hasty, post(hasty, head, b"1\r\n{\r\n").replace(b"/v1/chat/completions", path))
            assert statuses(said) == [408]
            assert b"request_timeout" in said  # and then the connection ended, or this would not have returned
    assert not hasty.engine.requests


async def test_compressed_bodies_are_refused(door: Door) -> None:
    async with door.client() as client:
        for encoding in ("gzip", "br", "deflate", "GZIP", "identity, gzip", "x-unknown"):
            headers = {"content-encoding": encoding}
            path = "/jobs" if encoding == "br" else "/v1/chat/completions"
            response = await client.post(path, content=b"\x1f\x8b\x08\x00" + b"x" * 100, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_encoding")
        plain = await client.post("/v1/chat/completions", content=CHAT, headers={"content-encoding": "Identity"})
        assert plain.status_code == 200


async def test_a_refused_stranger_leaves_the_connection_usable(door: Door) -> None:
    async with httpx.AsyncClient(base_url=door.url) as client:
        for _ in range(3):
            refused = await client.post("/v1/chat/completions", content=b"x" * 100_000)
            assert refused.status_code == 401
        headers = {"authorization": f"Bearer {door.key}"}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
