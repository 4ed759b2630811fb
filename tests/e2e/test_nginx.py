"""The shipped nginx configuration in front of velocity: slow clients end at it, streams and their ends pass it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import orjson
import pytest

from api.settings import ApiSettings
from tests.api.conftest import Door, front_door
from tests.conftest import emptied
from tests.e2e.nginx_proxy import Nginx, Recorder, http2_connection, last_words, nginx, recording, until
from tests.fake_engine import FakeEngine, fake_engine

CHAT = "/v1/chat/completions"

both_protocols = pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])


@dataclass
class Site:
    """Clients talk to nginx, nginx to velocity, velocity to a fake engine."""

    nginx: Nginx
    door: Door
    engine: FakeEngine

    def client(self, *, http2: bool = False) -> httpx.AsyncClient:
        return self.nginx.client(http2=http2, key=self.door.key)


@pytest.fixture(scope="module")
async def whole_site(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with fake_engine() as engine:
        settings = ApiSettings(
            redis_url=emptied(redis_url), engine_url=engine.url, data_dir=tmp_path_factory.mktemp("data"),
            head_wait=0.2, ping_interval=0.2, shutdown_seconds=1,
        )  # fmt: skip
        async with front_door(settings, engine) as door:
            await until(lambda: door.gateway.watch.up)
            with nginx(tmp_path_factory.mktemp("nginx"), door.url.removeprefix("http://")) as running:
                yield Site(running, door, engine)


@pytest.fixture
async def site(whole_site: Site) -> Site:
    """The site with an engine that has seen nothing yet."""
    await until(lambda: not whole_site.engine.running)
    whole_site.engine.requests.clear()
    whole_site.engine.aborted.clear()
    return whole_site


@pytest.fixture
async def recorder() -> AsyncIterator[Recorder]:
    async with recording() as running:
        yield running


@pytest.fixture
def front(recorder: Recorder, tmp_path: Path) -> Iterator[Nginx]:
    """nginx in front of a recorder."""
    with nginx(tmp_path, recorder.address) as running:
        yield running


@pytest.fixture
def hasty(recorder: Recorder, tmp_path: Path) -> Iterator[Nginx]:
    """The same with little patience."""
    impatience = {f"client_{part}_timeout {patience};": f"client_{part}_timeout 1s;"
                  for part, patience in (("header", "10s"), ("body", "30s"))}  # fmt: skip
    with nginx(tmp_path, recorder.address, impatience) as running:
        yield running


def chat(content: str, *, stream: bool = True) -> dict[str, object]:
    return {"model": "velocity-30b", "messages": [{"role": "user", "content": content}], "stream": stream}


def code(response: httpx.Response) -> object:
    """OpenAI's error code in an answer of nginx's own."""
    assert response.headers["content-type"] == "application/json"
    error: dict[str, object] = orjson.loads(response.content)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["code"]


# ---- Streams


@both_protocols
async def test_a_stream_passes_whole(site: Site, http2: bool) -> None:
    async with site.client(http2=http2) as client:
        response = await client.post(CHAT, json=chat("tokens 5"))
    assert response.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
    assert response.status_code == 200
    assert response.headers["x-request-id"].startswith("req_")
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["strict-transport-security"] == "max-age=31536000"
    assert "content-encoding" not in response.headers
    assert [f"t{number} " in response.text for number in range(6)] == [True] * 5 + [False]
    assert response.text.endswith("data: [DONE]\n\n")


@both_protocols
async def test_tokens_arrive_while_the_engine_is_still_at_it(site: Site, http2: bool) -> None:
    received = ""
    async with site.client(http2=http2) as client, client.stream("POST", CHAT, json=chat("stall 1")) as response:
        async for text in response.aiter_text():
            received += text
            if "t0 " in received:
                assert site.engine.running == 1  # and it will send no more
                break
    assert "t0 " in received
    await until(lambda: len(site.engine.aborted) == 1)


@both_protocols
async def test_a_broken_stream_is_broken_for_the_client_too(site: Site, http2: bool) -> None:
    received = b""
    async with site.client(http2=http2) as client:
        with pytest.raises(httpx.RemoteProtocolError, match="StreamReset" if http2 else "incomplete chunked read"):
            async with client.stream("POST", CHAT, json=chat("break 2")) as response:
                async for data in response.aiter_bytes():
                    received += data
    assert b"t1 " in received
    assert received.count(b'data: {"error":{') == 1


@both_protocols
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_a_client_that_leaves_frees_the_engine(site: Site, http2: bool, stream: bool) -> None:
    async with site.client(http2=http2) as client:
        asking = asyncio.create_task(client.post(CHAT, json=chat("hang", stream=stream)))
        await until(lambda: site.engine.running == 1 or asking.done())
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await until(lambda: len(site.engine.aborted) == 1)


async def test_leaving_one_http2_stream_frees_the_engine_and_keeps_the_connection(site: Site) -> None:
    async with http2_connection(site.nginx, site.door.key) as connection:
        left = connection.post(CHAT, orjson.dumps(chat("hang")))
        await connection.read_until(left, b": ping")  # pings are not held back either
        connection.leave(left)
        await until(lambda: len(site.engine.aborted) == 1)
        await connection.read_until(connection.post(CHAT, orjson.dumps(chat("tokens 2"))), b"[DONE]")


# ---- Slow and large requests


async def test_a_trickled_head_is_cut_off(hasty: Nginx, recorder: Recorder) -> None:
    async with hasty.connection() as (reader, writer), asyncio.timeout(30):
        writer.write(b"GET /v1/models HTTP/1.1\r\nhost: velocity.test\r\n")
        closed = asyncio.create_task(last_words(reader))
        while not closed.done():  # each header in time, but never the last one
            writer.write(b"x-drip: 1\r\n")
            await asyncio.sleep(0.1)
        assert b"200" not in closed.result()
    assert recorder.connections == 0


async def test_a_slow_body_never_reaches_velocity(hasty: Nginx, recorder: Recorder) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: velocity.test\r\ncontent-length: 1000\r\n\r\n"
    async with hasty.connection() as (reader, writer), asyncio.timeout(30):
        writer.write(head.encode() + b"{")
        assert b"200" not in await last_words(reader)
    assert recorder.connections == 0
    async with hasty.client() as client:  # while one that comes in time does
        assert (await client.post(CHAT, content=b"x" * 1000)).status_code == 200
    assert recorder.requests[0].body == b"x" * 1000


async def test_an_upload_without_a_key_is_refused_before_its_body_has_come(site: Site) -> None:
    async with site.nginx.connection() as (reader, writer), asyncio.timeout(30):
        writer.write(b"POST /jobs HTTP/1.1\r\nhost: velocity.test\r\ncontent-length: 100000000\r\n\r\n{")
        assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")


_LARGE = pytest.mark.parametrize(
    "headers", [{"x-large": "x" * 12000}, {f"x-{number}": "x" * 4000 for number in range(12)}], ids=["one", "many"]
)


@_LARGE
async def test_large_headers_are_refused(front: Nginx, recorder: Recorder, headers: dict[str, str]) -> None:
    async with front.client() as client:
        response = await client.get("/v1/models", headers=headers)
    assert response.status_code == 431
    assert code(response) == "headers_too_large"
    assert recorder.connections == 0


@_LARGE
async def test_large_headers_end_an_http2_connection(front: Nginx, recorder: Recorder, headers: dict[str, str]) -> None:
    async with front.client(http2=True) as client:
        with pytest.raises(httpx.RemoteProtocolError, match="error_code:11"):  # ENHANCE_YOUR_CALM
            await client.get("/v1/models", headers=headers)
    assert recorder.connections == 0


@pytest.mark.parametrize(("path", "mebibytes"), [(CHAT, 9), ("/jobs/x", 9), ("/jobs", 208), ("/v1/files", 208)])
async def test_large_bodies_are_refused(front: Nginx, recorder: Recorder, path: str, mebibytes: int) -> None:
    size = mebibytes * 1024 * 1024 + 1
    async with front.connection() as (reader, writer), asyncio.timeout(30):
        writer.write(f"POST {path} HTTP/1.1\r\nhost: velocity.test\r\ncontent-length: {size}\r\n\r\n".encode())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413 ")
    assert recorder.connections == 0


@both_protocols
async def test_an_upload_passes_whole(front: Nginx, recorder: Recorder, http2: bool) -> None:
    body = bytes(range(256)) * 48 * 1024
    async with front.client(http2=http2) as client:
        assert (await client.post("/v1/files", content=body)).status_code == 200
    assert recorder.requests[0].body == body


# ---- What passes to velocity, and what does not


async def test_forwarding_headers_are_nginxs_own(front: Nginx, recorder: Recorder) -> None:
    claims = {
        "x-forwarded-for": "198.51.100.7", "x-real-ip": "198.51.100.7", "x-forwarded-proto": "http",
        "x-forwarded-host": "elsewhere.test", "x-forwarded-port": "1", "forwarded": "for=198.51.100.7",
        "proxy": "http://elsewhere.test", "proxy-connection": "close", "proxy-authorization": "Basic eDp5",
        "x-request-id": "mine", "te": "trailers", "connection": "close",
    }  # fmt: skip
    async with front.client(key="vk_mine") as client:
        await client.get("/v1/models", headers=claims)
    request = recorder.requests[0]
    assert request.line == "GET /v1/models HTTP/1.1"
    assert request.all("authorization") == ["Bearer vk_mine"]
    expected = {
        "x-forwarded-for": "127.0.0.1", "x-real-ip": "127.0.0.1", "x-forwarded-proto": "https",
        "x-forwarded-host": "127.0.0.1", "x-forwarded-port": str(front.port), "host": "127.0.0.1",
    }  # fmt: skip
    assert {name: request.all(name) for name in claims.keys() | expected} == {
        name: [expected[name]] if name in expected else [] for name in claims.keys() | expected
    }


@pytest.mark.parametrize("path", ["/metrics", "//metrics", "/%6detrics", "/v1/%2e%2e/metrics?x=1", "/admin/keys"])
async def test_metrics_are_not_reachable(front: Nginx, recorder: Recorder, path: str) -> None:
    async with front.connection() as (reader, writer), asyncio.timeout(30):
        writer.write(f"GET {path} HTTP/1.1\r\nhost: velocity.test\r\nconnection: close\r\n\r\n".encode())
        assert (await reader.read()).startswith(b"HTTP/1.1 404 ")
    assert recorder.connections == 0


async def test_a_post_is_never_sent_twice(front: Nginx, recorder: Recorder) -> None:
    async with front.client() as client:
        assert (await client.post(CHAT, content=b"1")).status_code == 200
        recorder.silent = True  # closes the connection that nginx has kept open
        response = await client.post(CHAT, content=b"2")
    assert response.status_code == 502
    assert code(response) == "unreachable"
    assert response.headers["retry-after"] == "5"
    assert [request.body for request in recorder.requests] == [b"1", b"2"]
    assert recorder.connections == 1


async def test_http10_is_refused_since_it_could_not_tell_a_broken_stream(front: Nginx, recorder: Recorder) -> None:
    async with front.connection() as (reader, writer), asyncio.timeout(30):
        writer.write(f"POST {CHAT} HTTP/1.0\r\ncontent-length: 1\r\n\r\n1".encode())
        assert (await reader.read()).startswith(b"HTTP/1.1 426 ")
    assert recorder.connections == 0


async def test_plain_http_leads_to_tls(front: Nginx, recorder: Recorder) -> None:
    async with httpx.AsyncClient() as client:
        response = await client.post(f"http://127.0.0.1:{front.plain_port}{CHAT}?x=1", content=b"{}")
    assert response.status_code == 308
    assert response.headers["location"] == f"https://127.0.0.1{CHAT}?x=1"
    assert "/" not in response.headers["server"]
    assert recorder.connections == 0


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_tls(front: Nginx, version: ssl.TLSVersion) -> None:
    context = front.trust()
    context.minimum_version = context.maximum_version = version
    async with httpx.AsyncClient(verify=context) as client:
        assert (await client.get(f"{front.url}/health")).status_code == 200


async def test_the_log_keeps_secrets(front: Nginx) -> None:
    async with front.client(key="vk_canary") as client:
        await client.get("/jobs?after=canary", headers={"referer": "https://canary.test", "cookie": "canary=1"})
    await until(lambda: bool(front.log("access.log")))
    assert orjson.loads(front.log("access.log"))["path"] == "/jobs"
    assert "canary" not in front.log("access.log")
    assert front.log("error.log") == ""
