"""What is one tenant's does not exist for another: not by its address, not in a list, not by what differs."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import orjson

from api.keys import Scope, Terms
from tests.api.conftest import Door
from tests.api.test_security import own_routes
from workers.job import new_id

SHARED = {"key_id", "name"}
"""Parts of addresses that name what is no tenant's: keys are the operator's, models everybody's."""
NAMED = {"job": {"job_id"}, "batch": {"job_id", "batch_id"}, "file": {"file_id"}}
"""Which parts of addresses a thing's id fits into."""
VARIABLE = {"x-request-id", "date"}


@dataclass
class Tenant:
    """A stranger to the others, with things in every state that a test can bring about."""

    name: str
    key: str
    jobs: dict[str, str]
    """Batches among them."""
    files: dict[str, str]

    @property
    def things(self) -> dict[str, str]:
        return {**self.jobs, **self.files}


def job(*contents: str) -> dict[str, Any]:
    items = [{"id": f"i{n}", "messages": [{"role": "user", "content": text}]} for n, text in enumerate(contents)]
    return {"model": "tiny", "items": items, "name": "of somebody"}


def lines(*contents: str) -> bytes:
    asked = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions"}
    bodies = [{"model": "tiny", "messages": item["messages"]} for item in job(*contents)["items"]]
    return b"\n".join(orjson.dumps({**asked, "custom_id": f"c{n}", "body": body}) for n, body in enumerate(bodies))


async def submit(client: httpx.AsyncClient, body: dict[str, Any], **headers: str) -> str:
    response = await client.post("/jobs", json=body, headers=headers)
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


async def upload(client: httpx.AsyncClient, content: bytes) -> str:
    response = await client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("of somebody", content)})
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


async def batch(client: httpx.AsyncClient, file: str) -> httpx.Response:
    asked = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    return await client.post("/v1/batches", json=asked)


async def tenant_with_things(door: Door) -> Tenant:
    text = await door.new_key()
    record = await door.gateway.keys.get(text.split("_")[1])
    async with door.client(text) as client:
        completed, failed = await submit(client, job("hi", "hi")), await submit(client, job("status 400"))
        file = await upload(client, lines("hi", "status 400"))
        done = (await batch(client, file)).json()["id"]
        await door.drain()
        cancelled, queued = await submit(client, job("hi")), await submit(client, job("hi"))
        await client.post(f"/jobs/{cancelled}/cancel")
        waiting = (await batch(client, file)).json()["id"]
        over = (await client.get(f"/v1/batches/{done}")).json()
    jobs = {"completed": completed, "failed": failed, "cancelled": cancelled, "queued": queued, "batch": done,
            "queued batch": waiting}  # fmt: skip
    files = {"input": file, "output": over["output_file_id"], "errors": over["error_file_id"]}
    return Tenant(record.tenant, text, jobs, files)


def requests_about(door: Door, thing: str) -> Iterator[tuple[str, str, Any]]:
    """Every request that names it: each route with an id in its address, the queries and bodies that take one."""
    kind = re.split("[-_]", thing)[0]
    if kind == "file":
        asked = {"input_file_id": thing, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        yield "POST", "/v1/batches", asked
    else:
        for query in (f"after={thing}", f"limit=1&after={thing}"):
            yield "GET", f"/jobs?{query}", None
            if kind == "batch":
                yield "GET", f"/v1/batches?{query}", None
        yield "GET", f"/jobs/{thing}/results?after=0", None
    last = []
    for route in own_routes(door):
        names = set(re.findall(r"{(\w+)", route.path)) - SHARED
        assert not names or names <= set.union(*NAMED.values()), f"teach this test what {route.path} is about"
        if names and names <= NAMED[kind]:
            for method in sorted(route.methods or ()):
                request = method, route.path_format.format(**dict.fromkeys(names, thing)), None
                last += [request] if method == "DELETE" else []
                if method != "DELETE":
                    yield request
    yield from last


Told = list[tuple[str, int, str, dict[str, str]]]


async def answers(door: Door, client: httpx.AsyncClient, thing: str) -> Told:
    """What it is told, with the id taken out. Streams are read to their end."""
    told = []
    for method, path, body in requests_about(door, thing):
        async with asyncio.timeout(30):  # a stream of what runs would not end
            response = await client.request(method, path, json=body)
        headers = {name: value for name, value in response.headers.items() if name not in VARIABLE}
        said = response.text.replace(thing, "ID")
        told.append((f"{method} {path.replace(thing, 'ID')}", response.status_code, said, headers))
    return told


def like(thing: str) -> str:
    """An id of the same kind that names nothing; a file's stands at the same place in a list."""
    kind = re.split("[-_]", thing)[0]
    return thing[:-1] + ("1" if thing[-1] == "0" else "0") if kind == "file" else new_id(kind)


async def test_a_foreign_thing_is_like_one_that_never_was(door: Door) -> None:
    one, other = await tenant_with_things(door), await tenant_with_things(door)
    for owner, stranger in ((one, other), (other, one)):
        every_scope = await door.new_key(scopes=tuple(Scope))
        for key in (stranger.key, every_scope):
            async with door.client(key) as client:
                for state, foreign in owner.things.items():
                    never = await answers(door, client, like(foreign))
                    assert {status for _, status, _, _ in never} == {404}
                    assert await answers(door, client, foreign) == never, state
        async with door.client(owner.key) as client:
            for state in ("failed", "output", "batch"):  # the test asks the right questions
                own = await answers(door, client, owner.things[state])
                refused = {request for request, status, _, _ in own if status not in {200, 202}}
                assert refused == ({"POST /v1/batches"} if state == "output" else set()), state


async def test_a_page_after_a_foreign_file_is_as_after_none(door: Door) -> None:
    """A file's id holds its time, and that alone decides where a page begins."""
    owner, stranger = await tenant_with_things(door), await tenant_with_things(door)
    async with door.client(stranger.key) as client:
        for query in ("", "&limit=1", "&order=asc", "&purpose=batch"):
            for foreign in owner.files.values():
                never, told = [
                    (await client.get(f"/v1/files?after={file}{query}")).text for file in (like(foreign), foreign)
                ]
                assert told == never
                assert not [file for file in owner.files.values() if file in told]


async def test_a_stranger_changes_nothing(door: Door) -> None:
    owner, stranger = await tenant_with_things(door), await tenant_with_things(door)

    async def seen() -> list[Any]:
        async with door.client(owner.key) as client:
            told = [(await client.get(path)).json() for path in ("/jobs", "/v1/batches", "/v1/files")]
            told += [(await client.get(f"/jobs/{one}/results")).text for one in owner.jobs.values()]
            return told + [(await client.get(f"/v1/files/{one}/content")).text for one in owner.files.values()]

    before = await seen()
    async with door.client(stranger.key) as client:
        for foreign in owner.things.values():
            await answers(door, client, foreign)
    assert await seen() == before
    await door.drain()
    async with door.client(owner.key) as client:
        for state in ("queued", "queued batch"):
            assert (await client.get(f"/jobs/{owner.jobs[state]}")).json()["status"] == "completed"


async def test_lists_hold_what_is_ones_own(door: Door) -> None:
    tenants = [await tenant_with_things(door) for _ in range(3)]
    for tenant in tenants:
        foreign = [one for other in tenants if other is not tenant for one in (*other.things.values(), other.name)]
        batches = {one for one in tenant.jobs.values() if one.startswith("batch_")}
        paths = ("/jobs?limit=100", "/v1/batches?limit=100", "/v1/files", "/v1/usage?days=400", "/v1/models")
        async with door.client(tenant.key) as client:
            told = [await client.get(path) for path in paths]
            told += [await client.get(f"/jobs?limit=1&after={one}") for one in tenant.jobs.values()]
            told += [await client.get(f"/v1/batches?limit=1&after={one}") for one in batches]
        listed = [{entry["id"] for entry in answer.json()["data"]} for answer in told[:3]]
        assert listed[:2] == [set(tenant.jobs.values()), batches]
        assert listed[2] >= set(tenant.files.values())
        assert {day["key"] for day in told[3].json()["data"]} == {tenant.key.split("_")[1]}
        for response in told:
            assert response.status_code == 200
            assert not [one for one in foreign if one in response.text]


async def test_keys_of_one_tenant_share_its_things(door: Door) -> None:
    owner, stranger = await tenant_with_things(door), await tenant_with_things(door)
    _, text = await door.gateway.keys.create(Terms(name="second"), tenant=owner.name)
    async with door.client(text) as client, door.client(owner.key) as first, door.client(stranger.key) as other:
        assert {entry["id"] for entry in (await client.get("/jobs")).json()["data"]} == set(owner.jobs.values())
        secrets = [(await one.get("/webhooks/secret")).json()["secret"] for one in (client, first, other)]
        for state in ("failed", "batch", "input"):
            told = await answers(door, client, owner.things[state])
            assert {status for _, status, _, _ in told} <= {200, 202}, state
    assert secrets[0] == secrets[1] != secrets[2]


async def test_the_same_ids_and_names_do_not_meet(door: Door) -> None:
    """Items, jobs and requests are named by their owners; two that choose alike get their own results."""
    keys = [await door.new_key() for _ in range(2)]
    ids = []
    for number, key in enumerate(keys):
        async with door.client(key) as client:
            ids.append(await submit(client, job(f"tokens {number + 1}"), **{"idempotency-key": "the same"}))
    await door.drain()
    for number, key in enumerate(keys):
        async with door.client(key) as client:
            line = (await client.get(f"/jobs/{ids[number]}/results")).json()
        assert line["response"]["usage"]["completion_tokens"] == number + 1


async def test_files_lie_in_their_tenants_folder(door: Door) -> None:
    tenants = [await tenant_with_things(door) for _ in range(2)]
    for tenant in tenants:
        for one in tenant.things.values():
            places = [path for path in door.settings.data_dir.rglob(f"*{one}*") if path.is_dir()]
            assert places
            assert all(tenant.name in path.parts for path in places)


async def test_only_operators_see_tenants_and_keys(door: Door) -> None:
    other = (await door.new_key()).split("_")[1]
    asked = [
        ("GET", "/admin/keys"), ("POST", "/admin/keys"), ("GET", f"/admin/keys/{other}"),
        ("PATCH", f"/admin/keys/{other}"), ("POST", f"/admin/keys/{other}/revoke"),
        ("POST", f"/admin/keys/{other}/rotate"), ("GET", "/admin/keys/" + "0" * 12),
    ]  # fmt: skip
    for scopes in ((Scope.CHAT, Scope.JOBS, Scope.METRICS), ()):
        async with door.client(await door.new_key(scopes=scopes)) as client:
            for method, path in asked:
                response = await client.request(method, path, json={"name": "x"})
                assert response.status_code == 403, (method, path)
                assert other not in response.text
    assert (await door.gateway.keys.get(other)).version == 1
