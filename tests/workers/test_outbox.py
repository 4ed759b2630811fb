"""The outbox on a real Redis and real receivers: what is told, when again, when no more, and to whom at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest

from tests.webhook_receiver import OK, Event, Receiver, answer, receiving
from tests.workers.webhook_office import TENANT, Office, opened
from workers.job import new_id
from workers.outbox import SCHEDULE, pause, webhook_outcome
from workers.webhooks import Delivery


@pytest.fixture
async def office(clean_redis: str, tmp_path: Path) -> AsyncIterator[Office]:
    async with opened(clean_redis, tmp_path) as office:
        yield office


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as running:
        yield running


@pytest.mark.parametrize("status", ["completed", "cancelled", "expired", "failed"])
async def test_a_job_that_is_over_is_told_once(office: Office, receiver: Receiver, status: str) -> None:
    job, outbox = await office.over(receiver.url, status), office.sender()
    assert not webhook_outcome(office.path(job))
    await outbox.step()
    await outbox.step()
    (event,) = receiver.events
    assert event.id == f"evt_{job}"
    assert event.signed_with(await outbox.webhooks.secret(TENANT))
    assert orjson.loads(event.body) == {
        "type": f"job.{status}", "timestamp": "2023-11-14T22:13:20Z",
        "data": {
            "id": job, "object": "job", "name": "n", "status": status,
            "counts": {"total": 3, "completed": 2, "failed": 1}, "usage": {"input_tokens": 4, "output_tokens": 5},
            "metadata": {"a": "b"},
        },
    }  # fmt: skip
    assert await office.fields(job) == ("delivered", "1", "")
    assert await office.wait(job) is None
    assert webhook_outcome(office.path(job))
    assert webhook_outcome(office.path(job)) == {"webhook_status": "delivered", "webhook_attempts": "1"}


async def test_it_is_retried_by_the_schedule_and_then_given_up(office: Office, receiver: Receiver) -> None:
    receiver.reply = answer(500)
    job, outbox = await office.over(receiver.url), office.sender()
    for attempts, planned in enumerate(SCHEDULE, 1):
        await outbox.step()
        assert await office.fields(job) == ("pending", str(attempts), "The receiver answered 500.")
        wait = await office.wait(job)
        assert wait is not None
        assert planned * 0.9 - 60 < wait <= planned * 1.1
        assert not webhook_outcome(office.path(job))
        await office.make_due()
    await outbox.step()
    assert await office.fields(job) == ("failed", str(len(SCHEDULE) + 1), "The receiver answered 500.")
    assert await office.wait(job) is None
    assert await office.redis.get("velocity:webhooks_failed") == b"1"
    assert webhook_outcome(office.path(job))["webhook_status"] == "failed"
    assert len(receiver.events) == len(SCHEDULE) + 1
    assert len({(event.id, event.body) for event in receiver.events}) == 1


async def test_a_later_success_ends_it(office: Office, receiver: Receiver) -> None:
    receiver.reply = answer(503)
    job, outbox = await office.over(receiver.url), office.sender()
    await outbox.step()
    await outbox.step()  # it is not due
    assert len(receiver.events) == 1
    receiver.reply = OK
    await office.make_due()
    await outbox.step()
    assert await office.fields(job) == ("delivered", "2", "")


async def test_a_receiver_that_is_gone_is_not_asked_again(office: Office, receiver: Receiver) -> None:
    receiver.reply = answer(410)
    job = await office.over(receiver.url)
    await office.sender().step()
    assert await office.fields(job) == ("failed", "1", "The receiver answered 410.")
    assert await office.wait(job) is None
    assert webhook_outcome(office.path(job))


async def test_a_private_address_is_reached_by_nobody_and_named_nowhere(office: Office) -> None:
    job = await office.over("https://10.1.2.3/x")
    await office.sender().step()
    status, _, error = await office.fields(job)
    assert status == "pending"
    assert "not public" in error
    assert "10." not in error


def test_pauses() -> None:
    assert pause(1, Delivery(204, None, 0)) is None
    assert pause(1, Delivery(410, "gone", 0)) is None
    asked = pause(1, Delivery(429, "busy", 0, retry_after=600))
    assert asked == 600
    assert pause(1, Delivery(503, "busy", 0, retry_after=10**9)) == SCHEDULE[-1]
    sooner = pause(2, Delivery(429, "busy", 0, retry_after=1))
    assert sooner is not None
    assert sooner >= 54
    assert pause(len(SCHEDULE) + 1, Delivery(None, "x", 0, retry_after=5)) is None


async def test_one_host_and_one_tenant_get_few_places(office: Office, receiver: Receiver) -> None:
    async def slowly(_: Event, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.02)
        writer.write(OK)
        await writer.drain()

    receiver.responds = slowly
    for _ in range(10):
        await office.over(receiver.url)
    await office.sender().step()
    assert (len(receiver.events), receiver.most) == (10, 2)
    for tenant in (TENANT, new_id("tenant"), new_id("tenant")):
        for number in range(20):
            await office.over(f"http://{number}-{tenant[7:15]}.example.com:{receiver.port}/", tenant=tenant)
    outbox = office.sender()
    await outbox.send_due()
    places = [count for who, count in outbox._busy.items() if who.startswith("tenant_")]
    assert places == [8, 8]
    await outbox.step()
    assert len(receiver.events) == 70
    assert receiver.most <= 16


async def test_many_entries_of_a_slow_host_hide_no_other(office: Office, receiver: Receiver) -> None:
    release = asyncio.Event()

    async def hold(event: Event, writer: asyncio.StreamWriter) -> None:
        if event.headers["host"].startswith("slow"):
            await release.wait()
        writer.write(OK)
        await writer.drain()

    receiver.responds = hold
    for number in range(520):
        await office.over(f"http://slow.example.com:{receiver.port}/", due=number + 1)
    last = await office.over(f"http://fast.example.com:{receiver.port}/", due=1000)
    outbox = office.sender()
    await outbox.send_due()
    await outbox.send_due()
    async with asyncio.timeout(30):
        while (await office.fields(last))[0] != "delivered":
            await asyncio.sleep(0.02)
    release.set()
    await outbox.aclose()


async def test_tests_are_counted(office: Office) -> None:
    outbox = office.sender()
    assert [await outbox.test_wait("key1") for _ in range(10)] == [0] * 10
    assert 50 < await outbox.test_wait("key1") <= 60
    assert await outbox.test_wait("key2") == 0
    again = ("key3", "test_1", 1, 60_000)
    assert [await outbox._run("outbox_test", *again) for _ in range(2)] == [0, 0]  # a replay
