"""The outbox when senders die, meet, or are late, and when jobs or Redis go away: told at least once, settled once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from tests.conftest import redis_server
from tests.webhook_receiver import OK, Event, Receiver, receiving
from tests.workers.webhook_office import OUTBOX, TENANT, Office, opened
from workers import outbox as module
from workers.errors import LedgerUnavailable
from workers.job import new_id
from workers.outbox import webhook_outcome
from workers.redis import connect


@pytest.fixture
async def office(clean_redis: str, tmp_path: Path) -> AsyncIterator[Office]:
    async with opened(clean_redis, tmp_path) as office:
        yield office


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as running:
        yield running


async def test_a_sender_that_dies_is_followed(
    office: Office, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the delivery and its settlement: the event comes again under the same id."""
    monkeypatch.setattr(module, "_CLOSE_SECONDS", 0)
    arrived = asyncio.Event()

    async def hold(_: Event, __: asyncio.StreamWriter) -> None:
        arrived.set()
        await asyncio.sleep(60)

    receiver.responds = hold
    job, dying, next_one = await office.over(receiver.url), office.sender(), office.sender()
    await dying.send_due()
    await arrived.wait()
    await dying.aclose()
    receiver.responds = None
    await next_one.step()  # the lease still holds
    assert len(receiver.events) == 1
    assert await office.fields(job) == ("", "", "")
    wait = await office.wait(job)
    assert wait is not None
    assert 0 < wait <= 30
    await office.make_due()
    await next_one.step()
    assert [event.id for event in receiver.events] == [f"evt_{job}"] * 2
    assert await office.fields(job) == ("delivered", "1", "")


async def test_what_was_written_down_is_not_sent_again(
    office: Office, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis went away between the marker and the settlement."""
    job, outbox = await office.over(receiver.url), office.sender()

    async def away(*_: object) -> None:
        raise LedgerUnavailable("Redis did not answer.")

    with monkeypatch.context() as patch:
        patch.setattr(outbox, "_settle", away)
        await outbox.step()
    assert await office.fields(job) == ("", "", "")
    await office.make_due()
    await outbox.step()
    assert len(receiver.events) == 1
    assert await office.fields(job) == ("delivered", "1", "")
    assert await office.wait(job) is None


async def test_two_senders_send_each_event_once(office: Office, receiver: Receiver) -> None:
    jobs = [await office.over(receiver.url) for _ in range(40)]
    await asyncio.gather(*(office.sender().step() for _ in range(2)))
    assert sorted(event.id for event in receiver.events) == sorted(f"evt_{job}" for job in jobs)
    assert not await office.redis.zcard(OUTBOX)


async def test_the_first_to_settle_decides_unless_it_was_delivered(office: Office, receiver: Receiver) -> None:
    job, outbox = await office.over(receiver.url), office.sender()
    (entry,) = await outbox._take(1)
    await outbox._settle(entry, "failed", 3, "x")
    await outbox._settle(entry, "failed", 3, "x")
    await outbox._settle(entry, "pending", 4, "y", 5)
    assert await office.fields(job) == ("failed", "3", "x")
    assert await office.redis.get("velocity:webhooks_failed") == b"1"
    await outbox._settle(entry, "delivered", 4, "")
    assert await office.fields(job) == ("delivered", "4", "")
    assert await office.wait(job) is None


async def test_nobody_is_told_before_a_job_is_over(office: Office, receiver: Receiver) -> None:
    job = await office.over(receiver.url, "in_progress")
    await office.sender().step()
    assert not receiver.events
    assert await office.wait(job) is not None


async def test_jobs_that_are_gone_are_dropped(office: Office, receiver: Receiver) -> None:
    job, others = await office.over(receiver.url), await office.over(receiver.url)
    await office.redis.delete(f"velocity:job:{job}")
    await office.redis.zadd(OUTBOX, {f"{new_id('tenant')}/{others}": 1, "nonsense": 1})
    await office.sender().step()
    assert [event.id for event in receiver.events] == [f"evt_{others}"]
    assert not await office.redis.zcard(OUTBOX)


async def test_a_job_that_is_deleted_while_it_is_told_stays_deleted(office: Office, receiver: Receiver) -> None:
    job = await office.over(receiver.url)

    async def delete(_: Event, writer: asyncio.StreamWriter) -> None:
        office.path(job).rmdir()
        await office.redis.delete(f"velocity:job:{job}")
        writer.write(OK)
        await writer.drain()

    receiver.responds = delete
    await office.sender().step()
    assert not await office.redis.exists(f"velocity:job:{job}")
    assert not await office.redis.zcard(OUTBOX)
    assert not office.path(job).exists()


async def test_a_redis_that_is_away_is_waited_for(office: Office, receiver: Receiver) -> None:
    job = await office.over(receiver.url)
    with redis_server() as (url, process):
        slow = connect(url, 0.2)
        await slow.zadd(OUTBOX, {f"{TENANT}/{job}": 1})
        fields = cast("dict[Any, Any]", await office.redis.hgetall(f"velocity:job:{job}"))
        await slow.hset(f"velocity:job:{job}", mapping=fields)
        process.send_signal(signal.SIGSTOP)
        outbox = office.sender(slow)
        with pytest.raises(LedgerUnavailable):
            await outbox.send_due()
        running = asyncio.create_task(outbox.run())
        await asyncio.sleep(0.5)
        assert not running.done()
        process.send_signal(signal.SIGCONT)
        async with asyncio.timeout(30):
            while not webhook_outcome(office.path(job)):
                await asyncio.sleep(0.05)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await outbox.aclose()
        await slow.aclose()
