"""What is one tenant's does not exist for another: not by its address, not in a list, not by what differs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from api.keys import Scope, Terms
from tests.api.conftest import Door
from tests.api.test_security import own_routes
from workers.job import new_id

SHARED = {"key_id", "name"}
"""Parts of addresses that name what is no tenant's: keys are the operator's, models everybody's."""
VARIABLE = {"x-request-id", "date"}


@dataclass
class Tenant:
    """A stranger to the others, with a job in every state that a test can bring about."""

    name: str
    key: str
    jobs: dict[str, str]


def job(*contents: str) -> dict[str, Any]:
    items = [{"id": f"i{n}", "messages": [{"role": "user", "content": text}]} for n, text in enumerate(contents)]
    return {"model": "tiny", "items": items, "name": "of somebody"}


async def submit(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    response = await client.post("/jobs", json=body)
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


async def tenant_with_jobs(door: Door) -> Tenant:
    text = await door.new_key()
    record = await door.gateway.keys.get(text.split("_")[1])
    async with door.client(text) as client:
        completed, failed = await submit(client, job("hi", "hi")), await submit(client, job("status 400"))
        await door.drain()
        cancelled, queued = await submit(client, job("hi")), await submit(client, job("hi"))
        await client.post(f"/jobs/{cancelled}/cancel")
    jobs = {"completed": completed, "failed": failed, "cancelled": cancelled, "queued": queued}
    return Tenant(record.tenant, text, jobs)


def requests_about(door: Door, thing: str) -> Iterator[tuple[str, str]]:
    """Every request that names it: each route with an id in its address, and the queries that take one."""
    for route in own_routes(door):
        names = set(re.findall(r"{(\w+)", route.path)) - SHARED
        if names:
            assert names == {"job_id"}, f"teach this test what {route.path} is about"
            for method in sorted(route.methods or ()):
                yield method, route.path_format.format(job_id=thing)
    yield "GET", f"/jobs?after={thing}"
    yield "GET", f"/jobs?limit=1&after={thing}"
    yield "GET", f"/jobs/{thing}/results?after=0"


async def answers(door: Door, client: httpx.AsyncClient, thing: str) -> list[tuple[int, str, dict[str, str]]]:
    """What it is told, with the id taken out."""
    told = []
    for method, path in requests_about(door, thing):
        response = await client.request(method, path)
        headers = {name: value for name, value in response.headers.items() if name not in VARIABLE}
        told.append((response.status_code, response.text.replace(thing, "ID"), headers))
    return told


async def test_a_foreign_job_is_like_one_that_never_was(door: Door) -> None:
    one, other = await tenant_with_jobs(door), await tenant_with_jobs(door)
    for owner, stranger in ((one, other), (other, one)):
        every_scope = await door.new_key(scopes=tuple(Scope))
        for key in (stranger.key, every_scope):
            async with door.client(key) as client:
                never = await answers(door, client, new_id("job"))
                assert {status for status, _, _ in never} == {404}
                for state, foreign in owner.jobs.items():
                    assert await answers(door, client, foreign) == never, state
        async with door.client(owner.key) as client:
            own = await answers(door, client, owner.jobs["completed"])
            assert {status for status, _, _ in own} == {200}  # the test asks the right questions


async def test_a_stranger_changes_nothing(door: Door) -> None:
    owner, stranger = await tenant_with_jobs(door), await tenant_with_jobs(door)

    async def seen() -> list[Any]:
        async with door.client(owner.key) as client:
            lists = [(await client.get("/jobs")).json()]
            return lists + [(await client.get(f"/jobs/{one}/results")).text for one in owner.jobs.values()]

    before = await seen()
    async with door.client(stranger.key) as client:
        for foreign in owner.jobs.values():
            await answers(door, client, foreign)
    assert await seen() == before
    await door.drain()
    async with door.client(owner.key) as client:
        assert (await client.get(f"/jobs/{owner.jobs['queued']}")).json()["status"] == "completed"


async def test_lists_hold_what_is_ones_own(door: Door) -> None:
    tenants = [await tenant_with_jobs(door) for _ in range(3)]
    for tenant in tenants:
        foreign = [one for other in tenants if other is not tenant for one in (*other.jobs.values(), other.name)]
        async with door.client(tenant.key) as client:
            told = [await client.get(path) for path in ("/jobs?limit=100", "/v1/usage?days=400", "/v1/models")]
            told += [await client.get(f"/jobs?limit=1&after={one}") for one in tenant.jobs.values()]
        listed = {entry["id"] for entry in told[0].json()["data"]}
        assert listed == set(tenant.jobs.values())
        assert {day["key"] for day in told[1].json()["data"]} == {tenant.key.split("_")[1]}
        for response in told:
            assert response.status_code == 200
            assert not [one for one in foreign if one in response.text]


async def test_keys_of_one_tenant_share_its_jobs(door: Door) -> None:
    owner = await tenant_with_jobs(door)
    _, text = await door.gateway.keys.create(Terms(name="second"), tenant=owner.name)
    async with door.client(text) as client:
        assert {entry["id"] for entry in (await client.get("/jobs")).json()["data"]} == set(owner.jobs.values())
        assert {status for status, _, _ in await answers(door, client, owner.jobs["queued"])} == {200}


async def test_the_same_ids_and_names_do_not_meet(door: Door) -> None:
    """Items and jobs are named by their owners; two that choose alike get their own results."""
    keys = [await door.new_key() for _ in range(2)]
    ids = []
    for number, key in enumerate(keys):
        async with door.client(key) as client:
            ids.append(await submit(client, job(f"tokens {number + 1}")))
    await door.drain()
    for number, key in enumerate(keys):
        async with door.client(key) as client:
            line = (await client.get(f"/jobs/{ids[number]}/results")).json()
        assert line["response"]["usage"]["completion_tokens"] == number + 1


async def test_files_lie_in_their_tenants_folder(door: Door) -> None:
    tenants = [await tenant_with_jobs(door) for _ in range(2)]
    for tenant in tenants:
        for one in tenant.jobs.values():
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
