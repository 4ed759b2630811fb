"""Nobody gets in without a key: every route there is, every method, and every spelling of an address."""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from api import gate, keys
from api.app import build
from api.key_store import Keys
from api.keys import Scope, new_text
from api.settings import ApiSettings
from engine.client import Endpoint
from tests.api.conftest import Door
from tests.api.test_security_wire import HOST, bearer, statuses, talk

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
IDS = {
    "job_id": "job_" + "0" * 32, "key_id": "0" * 12, "name": "tiny", "file_id": "file-" + "0" * 32,
    "batch_id": "batch_" + "0" * 32,
}  # fmt: skip
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def behind(door: Door) -> gate.Gate:
    """The gate, and what is behind it."""
    built = build(door.gateway)
    assert isinstance(built, gate.Gate)
    return built


def own_routes(door: Door) -> Iterator[APIRoute]:
    """Every route of the FastAPI application. Anything that is no such route would have escaped these tests."""
    for route in behind(door).app.routes:  # type: ignore[attr-defined]
        assert isinstance(route, APIRoute), f"{route} is of a kind that these tests do not know"
        yield route


def addresses(door: Door) -> set[str]:
    """An address of every route, wherever it is entered."""
    own = {route.path_format.format(**IDS) for route in own_routes(door)}
    listed = set(gate._ROUTES)
    return own | set(behind(door)._hot) | listed | {f"{path}/x" for path in listed} | {"/", "/nothing", "/docs"}


def scope_of(path: str) -> Scope | None:
    """What a key needs for the address."""
    return gate._ROUTES.get(gate._listed(path) or "")


async def refused(client: httpx.AsyncClient, path: str, *, status: int) -> None:
    """With any method."""
    for method in METHODS:
        response = await client.request(method, path, json=CHAT if method in {"POST", "PUT", "PATCH"} else None)
        assert response.status_code == status, (method, path)
        if method != "HEAD":
            assert set(response.json()) == {"error"}, (method, path)


async def test_only_health_is_public(door: Door) -> None:
    assert frozenset({"/health"}) == gate._PUBLIC
    async with httpx.AsyncClient(base_url=door.url) as client:
        for path in addresses(door) - {"/health"}:
            await refused(client, path, status=401)
        for method in set(METHODS) - {"GET", "HEAD"}:
            assert (await client.request(method, "/health")).status_code == 405
    assert not door.engine.requests


async def test_every_route_is_in_the_gates_table(door: Door) -> None:
    """A new route without an entry answers nobody; one with an entry is covered by the tests here."""
    app = [route.path_format for route in own_routes(door)]
    for path in app:
        assert path in gate._PUBLIC or gate._listed(path), f"{path} is missing in api/gate.py"
    assert set(behind(door)._hot) == {endpoint.value for endpoint in Endpoint}
    led = {gate._listed(path) for path in [*app, *behind(door)._hot]}
    assert set(gate._ROUTES) - led == {"/openapi.json"}  # which is off
    assert {
        **dict.fromkeys((endpoint.value for endpoint in Endpoint), Scope.CHAT),
        **dict.fromkeys(("/jobs", "/v1/files", "/v1/batches", "/webhooks"), Scope.JOBS), "/admin": Scope.ADMIN,
        **dict.fromkeys(("/v1/models", "/v1/usage", "/openapi.json")),
    } == gate._ROUTES  # fmt: skip


async def test_every_route_needs_its_scope(door: Door) -> None:
    without = {scope: await door.new_key(scopes=tuple(set(Scope) - {scope})) for scope in Scope}
    checked = 0
    for path in addresses(door) - {"/health"}:
        if (needed := scope_of(path)) is not None:
            async with door.client(without[needed]) as client:
                await refused(client, path, status=403)
            checked += 1
    assert checked >= len([scope for scope in gate._ROUTES.values() if scope])
    assert not door.engine.requests


async def test_a_key_without_any_scope_reads_what_is_its_own(door: Door) -> None:
    async with door.client(await door.new_key(scopes=())) as client:
        for path in addresses(door) - {"/health"}:
            status = (await client.get(path)).status_code
            assert status == 403 if scope_of(path) else status in {200, 404}, path


async def bad_keys(door: Door) -> dict[str, str]:
    """Authorization headers that open nothing."""
    made = await door.new_key()
    prefix, key_id, secret, checksum = made.split("_")
    other = await door.new_key()
    ended, disabled = await door.new_key(), await door.new_key(enabled=False)
    await door.gateway.keys.revoke(ended.split("_")[1])
    upper = f"{prefix}_{key_id}_{secret.upper()}_{checksum}"
    return {
        "revoked": f"Bearer {ended}", "disabled": f"Bearer {disabled}", "unknown": f"Bearer {new_text()[1]}",
        "expired": f"Bearer {await door.new_key(expires=1)}", "another scheme": f"Basic {made}", "no scheme": made,
        "two": f"Bearer {made}, Bearer {made}", "trailing": f"Bearer {made} x", "mixed": f"Bearer {upper}",
        "no checksum": f"Bearer {made.rpartition('_')[0]}", "of another": f"Bearer {prefix}_{key_id}_"
        f"{other.split('_', 2)[2]}", "new text, known id": f"Bearer {new_text(key_id)[1]}", "traversal":
        "Bearer vk_../../etc_0_0", "long": f"Bearer vk_{'0' * 20_000}", "nothing": "Bearer", "query": "",
    }  # fmt: skip


async def test_what_is_not_a_valid_key_opens_nothing(door: Door) -> None:
    for name, authorization in (await bad_keys(door)).items():
        headers = {"authorization": authorization} if authorization else {}
        async with httpx.AsyncClient(base_url=door.url, headers=headers) as client:
            for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/jobs")):
                response = await client.request(method, f"{path}?api_key={door.key}&key={door.key}")
                assert response.status_code == 401, name
                assert response.headers["www-authenticate"] == "Bearer"
    assert not door.engine.requests


async def test_secrets_are_compared_in_constant_time(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[str, str]] = []

    def recording(one: str, other: str) -> bool:
        compared.append((one, other))
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(keys, "hmac", type("hmac", (), {"compare_digest": staticmethod(recording)}))
    wrong = new_text(door.key.split("_")[1])[1]
    async with door.client(wrong) as client:
        assert (await client.get("/v1/models")).status_code == 401
    assert (next(iter(compared))[0], next(iter(compared))[1]) == (keys.hash_of(door.key), keys.hash_of(wrong))


async def test_a_key_is_looked_up_before_anything_is_done(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before the body is read: it would be up to 200 MB that a stranger makes us hold or write."""
    order: list[str] = []
    authenticate = Keys.authenticate

    async def recording(self: Keys, *args: Any, **options: Any) -> Any:
        order.append("key")
        return await authenticate(self, *args, **options)

    monkeypatch.setattr(Keys, "authenticate", recording)
    for path in (b"/v1/chat/completions", b"/jobs", b"/v1/files", b"/v1/batches", b"/webhooks/test"):
        head = b"POST " + path + b" HTTP/1.1\r\n" + HOST + b"Content-Length: 1000000\r\n\r\n"
        assert statuses(await talk(door, head, until=b"missing_api_key")) == [401]  # not one byte of the body was sent
        assert order.pop() == "key"
    assert not order
    assert not (door.settings.data_dir / "uploads").exists()


WORDS = {"ok", "degraded", "unavailable", "down", "none"}


async def test_health_tells_a_stranger_no_detail(door: Door) -> None:
    async with httpx.AsyncClient(base_url=door.url) as client:
        for query in ("", "?verbose=1&detail=true"):
            response = await client.get(f"/health{query}")
            assert set(response.json()) <= {"status", "engine", "redis", "workers"}
            assert set(response.json().values()) <= WORDS  # no version, address, model, path or number
            assert {name for name in response.headers if name.startswith("x-")} == {"x-request-id"}
            assert "server" not in response.headers


HEALTHY = [  # other ways to write /health: they say no more than it does
    "/health", "/health?a=/jobs", "/health#/jobs", "/%68ealth", "http://elsewhere/health", "http://elsewhere:1/health",
    "/health?",
]  # fmt: skip
ELSEWHERE = [
    "//health", "//health/", "/health/", "/health//", "/HEALTH", "/Health", "/./health", "/health/.", "/health/..",
    "/health/../jobs", "/health/..;/jobs", "/health;/jobs", "/health;x=/../jobs", "/health%2f..%2fjobs",
    "/health%2F", "/health%00", "/health%00/jobs", "/health%20", "/health%0d%0a", "/health%3f", "/health%23/jobs",
    "/%2fhealth", "/%2e/health", "/%2e%2e/health", "/%252e%252e/health", "/health\\..\\jobs", "/health%5c..%5cjobs",
    "http://elsewhere/health/../jobs", "http://elsewhere//health", "http://health/jobs", "http://x@health/jobs",
    "*", "/health/x", "/healthz", "/heal", "/", "//", "/.", "/jobs/../health", "/v1/models/../../health", "/%",
    "/%zz", "/jobs", "/admin/keys", "/metrics", "http:///health", "http://", "health", "x" * 70_000,
]  # fmt: skip


async def test_no_spelling_of_an_address_gets_around_the_key(door: Door) -> None:
    for target in HEALTHY:
        said = await talk(door, f"GET {target} HTTP/1.1\r\n".encode() + HOST + b"Connection: close\r\n\r\n")
        assert statuses(said) == [200], target
        assert b'"status":"degraded"' in said
    for target in ELSEWHERE:
        for method in ("GET", "POST", "CONNECT"):
            head = f"{method} {target} HTTP/1.1\r\n".encode()
            said = await talk(door, head + HOST + b"Connection: close\r\n\r\n")
            assert statuses(said) in ([400], [401]), (method, target)
    assert not door.engine.requests


TO_ADMIN = [
    "//admin/keys", "/./admin/keys", "/v1/models/../../admin/keys", "/v1/models/..%2f..%2fadmin%2fkeys",
    "/v1/models/%2e%2e/%2e%2e/admin/keys", "/ADMIN/keys", "/Admin/Keys", "/admin;/keys", "/jobs/../admin/keys",
    "/v1/usage/../../admin/keys", "/v1/models//admin/keys", "/admin\\keys", "/%61dmin/keys", "/admin%2fkeys",
    "/admin/keys/", "http://admin/admin/keys", "/v1/models/x%00/admin/keys", "/health/../admin/keys",
]  # fmt: skip


async def test_no_spelling_of_an_address_gets_around_a_scope(door: Door) -> None:
    key = await door.new_key(scopes=(Scope.CHAT,))
    for target in TO_ADMIN:
        head = f"GET {target} HTTP/1.1\r\n".encode() + HOST + bearer(key) + b"Connection: close\r\n\r\n"
        said = await talk(door, head)
        assert statuses(said) in ([400], [403], [404]), target
        assert b"tenant_" not in said


async def test_other_sites_are_told_nothing(door: Door) -> None:
    """No CORS: a page elsewhere can't use a key that a browser knows, and preflights are not answered."""
    origin = {"origin": "https://elsewhere.example", "access-control-request-method": "POST"}
    async with door.client() as client, httpx.AsyncClient(base_url=door.url) as stranger:
        for path in addresses(door):
            answers = [await one.request(method, path, headers=origin) for one in (client, stranger)
                       for method in ("OPTIONS", "GET", "POST")]  # fmt: skip
            for answer in answers:
                assert not [name for name in answer.headers if name.startswith("access-control-")]
            if path != "/health":
                assert answers[3].status_code == 401


def test_what_exposes_is_off_by_default() -> None:
    settings = ApiSettings()
    assert not any((settings.docs, settings.open, settings.open_public))
    assert settings.metrics_port is None
    assert settings.host == settings.metrics_host == "127.0.0.1"
