"""Keys over HTTP and on the command line: made, shown, changed, renewed, ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import pytest
from typer.testing import CliRunner

from api.cli.main import app
from api.key_store import Keys
from api.keys import Scope, Terms
from api.settings import ApiSettings
from tests.api.conftest import Door
from tests.api.test_limits import CHAT, chat, settled
from workers.errors import LedgerUnavailable

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def operator(door: Door) -> AsyncIterator[httpx.AsyncClient]:
    async with door.client(await door.new_key(scopes=(Scope.ADMIN,))) as client:
        yield client


async def works(door: Door, text: str) -> int:
    async with door.client(text) as client:
        return (await client.get("/v1/models")).status_code


async def test_a_key_from_its_making_to_its_end(door: Door, operator: httpx.AsyncClient) -> None:
    made = await operator.post("/admin/keys", json={"name": "app", "rpm": 60, "scopes": ["chat"]})
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    key = made.json()
    assert (key["rpm"], key["scopes"], key["usable"], key["tenant"][:7]) == (60, ["chat"], True, "tenant_")
    assert not {"hash", "former_hash"} & set(key)
    assert await works(door, key["key"]) == 200
    shown = (await operator.get(f"/admin/keys/{key['id']}")).json()
    assert "key" not in shown
    assert shown["id"] in {one["id"] for one in (await operator.get("/admin/keys")).json()["data"]}
    changed = await operator.patch(f"/admin/keys/{key['id']}", json={"rpm": None, "tpm": 5000, "enabled": False})
    assert (changed.json()["rpm"], changed.json()["tpm"], changed.json()["name"]) == (None, 5000, "app")
    assert await works(door, key["key"]) == 401
    await operator.patch(f"/admin/keys/{key['id']}", json={"enabled": True})
    assert await works(door, key["key"]) == 200
    assert (await operator.post(f"/admin/keys/{key['id']}/revoke")).json()["usable"] is False
    assert await works(door, key["key"]) == 401
    for again in ({"enabled": True}, {"name": "x", "enabled": True}):
        assert (await operator.patch(f"/admin/keys/{key['id']}", json=again)).status_code == 409
    assert (await operator.post(f"/admin/keys/{key['id']}/rotate")).status_code == 409


async def test_rotation_keeps_everything_but_the_text(door: Door, operator: httpx.AsyncClient) -> None:
    before = (await operator.post("/admin/keys", json={"name": "app", "rpm": 5})).json()
    after = (await operator.post(f"/admin/keys/{before['id']}/rotate", json={"grace_seconds": 60})).json()
    assert after["key"] != before["key"]
    assert (after["id"], after["tenant"], after["rpm"]) == (before["id"], before["tenant"], 5)
    assert [await works(door, text) for text in (before["key"], after["key"])] == [200, 200]
    last = (await operator.post(f"/admin/keys/{before['id']}/rotate")).json()
    assert [await works(door, text) for text in (before["key"], after["key"], last["key"])] == [401, 401, 200]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("POST", "", {}, 400, "name"),
        ("POST", "", {"name": "x", "rpm": -1}, 400, "rpm"),
        ("POST", "", {"name": "x", "rpm": "many"}, 400, "rpm"),
        ("POST", "", {"name": "x", "scopes": ["root"]}, 400, "scopes.0"),
        ("POST", "", {"name": "x", "hash": "0"}, 400, "hash"),
        ("POST", "", {"name": "x", "tenant": "../.."}, 400, "tenant"),
        ("PATCH", "/{id}", {"tenant": "tenant_0"}, 400, "tenant"),
        ("PATCH", "/{id}", {"tpm": 0}, 400, "tpm"),
        ("PATCH", "/" + "0" * 12, {"tpm": 5}, 404, None),
        ("GET", "/" + "0" * 12, None, 404, None),
        ("GET", "/..%2f..%2fpasswd", None, 404, None),
        ("POST", "/{id}/rotate", {"grace_seconds": -1}, 400, "grace_seconds"),
    ],
)
async def test_bad_input_is_named(
    operator: httpx.AsyncClient, door: Door, method: str, path: str, body: object, status: int, param: str | None
) -> None:
    key_id = door.key.split("_")[1]
    answer = await operator.request(method, "/admin/keys" + path.replace("{id}", key_id), json=body)
    assert answer.status_code == status
    assert answer.json()["error"]["param"] == param


async def test_admin_needs_its_scope(door: Door) -> None:
    async with door.client() as client:
        for method, path in (("GET", "/admin/keys"), ("POST", "/admin/keys"), ("GET", "/admin/keys/" + "0" * 12)):
            answer = await client.request(method, path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_scope")


async def test_changes_outlive_the_loss_of_redis(door: Door, operator: httpx.AsyncClient) -> None:
    text = await door.new_key()
    await operator.post(f"/admin/keys/{text.split('_')[1]}/revoke")
    await door.gateway.limiter._redis.call("flush", "FLUSHALL")
    assert await works(door, text) == 401


async def test_an_old_record_does_not_undo_a_revocation(door: Door) -> None:
    """Records reach Redis in any order."""
    text = await door.new_key()
    before = await door.gateway.keys.get(text.split("_")[1])
    await door.gateway.keys.revoke(before.id)
    await door.gateway.keys._enter(before)
    assert await works(door, text) == 401


async def test_a_repeated_rotation_still_takes_what_clients_hold(door: Door) -> None:
    """The first reached the disk and not Redis; its text was never shown."""
    text = await door.new_key()
    keys, key_id = door.gateway.keys, text.split("_")[1]
    with pytest.MonkeyPatch.context() as patch:

        async def lost(_: object) -> None:
            raise LedgerUnavailable("gone")

        patch.setattr(keys, "_enter", lost)
        with pytest.raises(LedgerUnavailable, match="repeat it"):
            await keys.rotate(key_id, 3600)
    after = (await keys.rotate(key_id, 3600))[1]
    assert [await works(door, old) for old in (text, after)] == [200, 200]


@pytest.mark.parametrize(
    ("change", "status"), [({"enabled": False}, 401), ({"scopes": ("jobs",)}, 403), ({"models": ("other",)}, 403)]
)
async def test_a_change_elsewhere_is_noticed_at_the_next_request(
    door: Door, change: dict[str, Any], status: int
) -> None:
    text = await door.new_key(scopes=("chat", "jobs", "admin"))
    elsewhere = Keys(door.gateway.limiter._redis, door.settings.data_dir)
    async with door.client(text) as client:
        for path, body in ((CHAT, chat("hi")), ("/admin/keys", {"name": "x"})):
            assert (await client.post(path, json=body)).status_code in {200, 201}
        await elsewhere.update(text.split("_")[1], **change)
        assert (await client.post(CHAT, json=chat("hi"))).status_code == status
        if "models" not in change:
            assert (await client.post("/admin/keys", json={"name": "x"})).status_code == status
    assert len(door.engine.requests) == 1


async def test_many_changes_at_once_are_all_kept(door: Door, operator: httpx.AsyncClient) -> None:
    key_id = door.key.split("_")[1]
    fields = ("rpm", "burst", "tpm", "concurrency", "max_tokens", "bulk_jobs", "bulk_items", "bulk_tokens")
    await asyncio.gather(*(operator.patch(f"/admin/keys/{key_id}", json={field: 7}) for field in fields))
    shown = (await operator.get(f"/admin/keys/{key_id}")).json()
    assert all(shown[field] == 7 for field in fields)


async def test_usage_by_key_and_day(door: Door, operator: httpx.AsyncClient) -> None:
    text = await door.new_key(rpm=2, bulk_items=2)
    async with door.client(text) as client:
        answers = [await client.post(CHAT, json=chat("tokens 4")) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        items = [{"id": name, "messages": [{"role": "user", "content": "tokens 5"}]} for name in "ab"]
        assert (await client.post("/jobs", json={"model": "tiny", "items": items})).status_code == 202
        assert (await client.post("/jobs", json={"model": "tiny", "items": items})).status_code == 429
        await door.drain()
        await settled(door)
        own = (await client.get("/v1/usage")).json()["data"]
    assert len(own) == 1
    assert own[0]["date"] == time.strftime("%Y-%m-%d", time.gmtime())
    assert own[0]["interactive"] == {"requests": 2, "input_tokens": 14, "output_tokens": 8, "refused": 1}
    assert own[0]["bulk"] == {"requests": 2, "input_tokens": 14, "output_tokens": 10, "refused": 1}
    assert own[0] in (await operator.get("/v1/usage?days=2")).json()["data"]
    async with door.client() as stranger:
        assert (await stranger.get("/v1/usage")).json()["data"] == []


async def test_bulk_quota_is_the_tenants_and_comes_back(door: Door) -> None:
    first = (await door.gateway.keys.create(Terms(name="a", bulk_jobs=1)))[0]
    text = (await door.gateway.keys.create(Terms(name="b", bulk_jobs=1), first.tenant))[1]
    other = (await door.gateway.keys.create(Terms(name="c", bulk_tokens=50), first.tenant))[1]
    body = {"model": "tiny", "defaults": {"max_tokens": 10}, "items": [{"id": "a", "messages": MESSAGES}]}
    async with door.client(text) as client, door.client(other) as sibling:
        assert (await client.post("/jobs", json=body)).status_code == 202
        refused = await client.post("/jobs", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert "at most 1 active jobs, 1 in use" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"]
        assert len(list((door.settings.data_dir / "jobs" / first.tenant).iterdir())) == 1
        never = await sibling.post("/jobs", json={**body, "defaults": {"max_tokens": 51}})
        assert (never.status_code, never.headers["x-should-retry"]) == (429, "false")
        assert (await sibling.post("/jobs", json=body)).status_code == 429  # the tenant's tokens are in use
        await door.drain()
        assert (await client.post("/jobs", json=body)).status_code == 202
        cancelled = (await client.get("/jobs")).json()["data"][0]["id"]
        assert (await client.post(f"/jobs/{cancelled}/cancel")).status_code == 200
        await door.drain()
        assert (await client.post("/jobs", json=body)).status_code == 202


def test_keys_on_the_command_line(clean_redis: str, settings: ApiSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VELOCITY_REDIS_URL", clean_redis)
    monkeypatch.setenv("VELOCITY_DATA_DIR", str(settings.data_dir))
    monkeypatch.setenv("COLUMNS", "200")
    runner = CliRunner()

    def run(*words: str, code: int = 0) -> str:
        result = runner.invoke(app, list(words))
        assert result.exit_code == code, result.output
        return result.output

    assert "no keys yet" in run("keys", "list")
    made = orjson.loads(
        run("keys", "create", "app", "--rpm", "60", "--scope", "chat", "--expires", "30d", "--model", "m", "--json")
    )
    assert (made["rpm"], made["scopes"], made["models"]) == (60, ["chat"], ["m"])
    assert 29 * 86400 < made["expires"] - time.time() <= 30 * 86400
    listed = run("keys", "list")
    assert made["id"] in listed
    assert "rpm 60" in listed
    changed = orjson.loads(
        run(
            "keys",
            "update",
            made["id"],
            "--rpm",
            "0",
            "--tpm",
            "900",
            "--model",
            "any",
            "--expires",
            "never",
            "--disable",
        )
    )
    assert [changed[name] for name in ("rpm", "tpm", "models", "expires", "enabled")] == [None, 900, None, None, False]
    assert "disabled" in run("keys", "list")
    assert "Nothing to change" in run("keys", "update", made["id"], code=1)
    assert "name: String should have" in run("keys", "create", "", code=1)
    assert "is no tenant" in run("keys", "create", "x", "--tenant", "../..", code=1)
    assert "There is no key" in run("keys", "show", "nothing", code=1)
    assert "is no time" in run("keys", "rotate", made["id"], "--grace", "soon", code=1)
    rotated = run("keys", "rotate", made["id"], "--grace", "1h")
    assert f"vk_{made['id']}_" in rotated
    assert "The old one is accepted until" in rotated
    assert "is revoked" in run("keys", "revoke", made["id"])
    assert orjson.loads(run("keys", "show", made["id"]))["usable"] is False
    assert "Nothing was used" in run("usage")
