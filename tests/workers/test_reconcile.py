"""A Redis that was lost, or came back older, agrees with the data directory again."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from redis.asyncio import Redis

from workers.files import Files
from workers.finalizer import Finalizer
from workers.job import FINAL, BulkQuota, JobSpec, JobStatus, Lease, Record, new_id
from workers.ledger import Ledger
from workers.reconcile import Reconciler
from workers.retention import Retention
from workers.store import JobFiles, encode_item

TENANT = new_id("tenant")
LEASE = 5.0


async def submitted(ledger: Ledger, data: Path, total: int = 24, **more: object) -> tuple[JobSpec, JobFiles]:
    fields = {
        "id": new_id("job"), "tenant": TENANT, "account": "a", "endpoint": "/v1/chat/completions", "model": "tiny",
        "total": total, "shard_items": 8, "created": time.time() - 60, **more,
    }  # fmt: skip
    spec = JobSpec.model_validate(fields)
    files = JobFiles(data, TENANT, spec.id)
    files.create(spec, (encode_item(str(n), {"n": n}) for n in range(total)))
    os.utime(files.path / "job.json", (spec.created, spec.created))
    await ledger.submit(spec)
    return spec, files


def records(indices: Sequence[int]) -> list[Record]:
    body = {"usage": {"prompt_tokens": 2, "completion_tokens": 3}}
    return [Record(index, str(index), 200, "r", body={**body, "said": index}) for index in indices]


async def work(ledger: Ledger, files: JobFiles, most: int = 8) -> Lease:
    """Claim a shard, finish some of it durably, and commit that."""
    lease = await ledger.claim(LEASE)
    assert lease is not None
    todo = [index for index in range(lease.first, lease.first + lease.count) if index not in lease.done][:most]
    with files.segment(lease.segment) as segment:
        await ledger.commit(lease, records(todo), segment.append(records(todo)), LEASE)
    return lease


async def finish(ledger: Ledger, data: Path, files: JobFiles) -> None:
    while (await ledger.job(TENANT, files.path.name)).status is not JobStatus.FINALIZING:
        await work(ledger, files)
    final = await ledger.claim(LEASE, FINAL)
    assert final is not None
    await Finalizer(ledger, data, LEASE).run(final)


def said(files: JobFiles) -> list[int]:
    return [record.body["said"] for record in files.results(-1) if record.body]


async def test_a_job_in_its_middle_goes_on_where_the_disk_says(ledger: Ledger, redis: Redis, tmp_path: Path) -> None:
    spec, files = await submitted(ledger, tmp_path)
    await work(ledger, files)
    await work(ledger, files, most=3)
    await redis.flushall()
    assert await Reconciler(ledger, tmp_path).reconcile() == (1, 0)
    state = await ledger.job(TENANT, spec.id)
    assert (state.status, state.completed, state.left) == (JobStatus.IN_PROGRESS, 11, 13)
    assert (state.input_tokens, state.output_tokens) == (22, 33)
    assert await ledger.queued() == 13
    assert await Reconciler(ledger, tmp_path).reconcile() == (0, 0)
    await finish(ledger, tmp_path, files)
    assert said(files) == list(range(24))


async def test_a_torn_last_line_is_work_to_do_again(ledger: Ledger, redis: Redis, tmp_path: Path) -> None:
    spec, files = await submitted(ledger, tmp_path, 8)
    lease = await work(ledger, files, most=4)
    path = files.path / "seg" / lease.segment
    path.write_bytes(path.read_bytes()[:-20])
    await redis.flushall()
    await Reconciler(ledger, tmp_path).reconcile()
    assert (await ledger.job(TENANT, spec.id)).completed == 3
    await finish(ledger, tmp_path, files)
    assert said(files) == list(range(8))


async def test_a_restoration_that_was_cut_off_is_begun_again(ledger: Ledger, redis: Redis, tmp_path: Path) -> None:
    spec, files = await submitted(ledger, tmp_path)
    await work(ledger, files)
    await redis.flushall()
    await ledger.hold(spec)
    assert await ledger.claim(LEASE) is None, "a held job must not start"
    assert await Reconciler(ledger, tmp_path).reconcile() == (1, 0)
    assert (await ledger.job(TENANT, spec.id)).completed == 8
    await finish(ledger, tmp_path, files)
    assert said(files) == list(range(24))


async def test_a_wish_to_cancel_during_the_restoration_is_heeded(ledger: Ledger, tmp_path: Path, redis: Redis) -> None:
    spec, _ = await submitted(ledger, tmp_path)
    await redis.flushall()
    await ledger.hold(spec)
    assert await ledger.cancel(spec.id)
    await ledger.open(spec.id, cancelled=False)
    assert (await ledger.job(TENANT, spec.id)).outcome == "cancelled"


async def test_what_was_over_is_over(ledger: Ledger, redis: Redis, tmp_path: Path) -> None:
    webhook = "https://example.com/hook"
    spec, files = await submitted(ledger, tmp_path, webhook=webhook, idempotency="k", digest="d")
    told, _ = await submitted(ledger, tmp_path, webhook=webhook)
    await finish(ledger, tmp_path, files)
    await finish(ledger, tmp_path, JobFiles(tmp_path, TENANT, told.id))
    (JobFiles(tmp_path, TENANT, told.id).path / "webhook.json").write_bytes(
        b'{"status": "delivered", "attempts": 2, "error": null}'
    )
    before = await ledger.job(TENANT, spec.id)
    await redis.flushall()
    assert await Reconciler(ledger, tmp_path).reconcile() == (2, 0)
    after = await ledger.job(TENANT, spec.id)
    assert (after.status, after.completed, after.output_tokens) == (before.status, 24, before.output_tokens)
    assert after.times["completed_at"] - before.times["completed_at"] in {-1, 0}
    assert await redis.zrange("velocity:outbox", 0, -1) == [f"{TENANT}/{spec.id}".encode()], "told twice, or never"
    known = await ledger.job(TENANT, told.id)
    assert (known.webhook_status, known.webhook_attempts) == ("delivered", 2)
    again = spec.model_copy(update={"id": new_id("job")})
    assert await ledger.submit(again, BulkQuota()) == spec.id


async def test_a_redis_from_before_the_end_learns_of_the_end(ledger: Ledger, redis: Redis, tmp_path: Path) -> None:
    spec, files = await submitted(ledger, tmp_path)
    await work(ledger, files)
    older = {key: (await redis.dump(key), await redis.pttl(key)) for key in await redis.keys("*")}
    await finish(ledger, tmp_path, files)
    await redis.flushall()
    for key, (dump, ttl) in older.items():
        assert dump is not None
        await redis.restore(key, max(0, ttl), dump)
    assert (await ledger.job(TENANT, spec.id)).status is JobStatus.IN_PROGRESS
    assert await Reconciler(ledger, tmp_path).reconcile() == (1, 0)
    assert (await ledger.job(TENANT, spec.id)).status is JobStatus.COMPLETED
    assert await ledger.claim(LEASE) is None
    assert await ledger.queued() == 0
    assert said(files) == list(range(24))


async def test_what_was_delivered_keeps_its_place_after_a_rebuild(ledger: Ledger, redis: Redis, tmp_path: Path) -> None:
    spec, files = await submitted(ledger, tmp_path, 8)
    for _ in range(2):
        await ledger.release(await work(ledger, files, most=2))

    async def order() -> list[int]:
        (segments,) = await ledger.segments(spec.id, [0])
        return list(files.committed(segments))

    before = await order()
    await redis.flushall()
    await Reconciler(ledger, tmp_path).reconcile()
    await work(ledger, files, most=2)
    assert (await order())[: len(before)] == before


async def test_a_damaged_result_costs_that_item_and_no_other(ledger: Ledger, tmp_path: Path) -> None:
    _, files = await submitted(ledger, tmp_path, 8)
    lease = await work(ledger, files)
    path = files.path / "seg" / lease.segment
    path.write_bytes(path.read_bytes().replace(b'"said":3', b'"said":4'))
    await finish(ledger, tmp_path, files)
    assert {record.index: record.error["code"] for record in files.results(-1) if record.error} == {3: "result_lost"}
    assert said(files) == [0, 1, 2, 4, 5, 6, 7]


async def test_a_job_that_is_deleted_while_it_is_restored_is_gone(ledger: Ledger, redis: Redis, tmp_path: Path) -> None:
    spec, files = await submitted(ledger, tmp_path)
    await redis.flushall()

    class DeletedMeanwhile(Ledger):
        async def hold(self, held: JobSpec) -> str:
            files.discard()
            return await super().hold(held)

    await Reconciler(DeletedMeanwhile(redis), tmp_path).reconcile()
    assert await ledger.statuses([spec.id]) == [None]
    assert (await ledger.queued(), await ledger.claim(LEASE)) == (0, None)


async def test_what_is_no_jobs_is_passed_over(ledger: Ledger, redis: Redis, tmp_path: Path) -> None:
    spec, files = await submitted(ledger, tmp_path)
    damaged, others = await submitted(ledger, tmp_path)
    (others.path / "job.json").write_bytes(b"{")
    for stray in (".DS_Store", f"{TENANT}/notes.txt", "lost+found"):
        (tmp_path / "jobs" / stray).write_bytes(b"x")
    (tmp_path / "files" / "lost+found").mkdir(parents=True)
    await redis.flushall()
    await Reconciler(ledger, tmp_path).reconcile()
    await Retention(ledger, tmp_path, 60).step()
    Files(tmp_path).tidy()
    assert await ledger.statuses([spec.id, damaged.id]) == [JobStatus.QUEUED, None]
    assert files.path.exists()


async def test_a_retry_of_a_job_that_is_gone_leaves_nothing_of_it(ledger: Ledger, redis: Redis, tmp_path: Path) -> None:
    old, files = await submitted(ledger, tmp_path)
    await finish(ledger, tmp_path, files)
    first, _ = await submitted(ledger, tmp_path, retry_of=old.id)
    assert (await ledger.job(TENANT, old.id)).retried_by == first.id
    await ledger.forget(TENANT, old.id)
    await submitted(ledger, tmp_path, retry_of=old.id)
    assert not await redis.exists(f"velocity:job:{old.id}")


async def test_a_cancelled_job_stays_cancelled(ledger: Ledger, redis: Redis, tmp_path: Path) -> None:
    spec, files = await submitted(ledger, tmp_path)
    await work(ledger, files, most=2)
    files.cancel()
    await ledger.cancel(spec.id)
    await redis.flushall()
    await Reconciler(ledger, tmp_path).reconcile()
    await finish(ledger, tmp_path, files)
    assert (await ledger.job(TENANT, spec.id)).status is JobStatus.CANCELLED
    assert said(files) == [0, 1]


async def test_a_job_that_is_just_being_submitted_is_left_alone(ledger: Ledger, redis: Redis, tmp_path: Path) -> None:
    _, files = await submitted(ledger, tmp_path)
    await redis.flushall()
    os.utime(files.path / "job.json")
    assert await Reconciler(ledger, tmp_path).reconcile() == (0, 1)


async def test_the_step_notices_an_emptied_redis_at_once(ledger: Ledger, redis: Redis, tmp_path: Path) -> None:
    spec, _ = await submitted(ledger, tmp_path)
    reconciler = Reconciler(ledger, tmp_path)
    await reconciler.step()
    await redis.delete(f"velocity:job:{spec.id}")
    await reconciler.step()
    assert await ledger.statuses([spec.id]) == [None], "it looks every minute, not every time"
    await redis.flushall()
    await reconciler.step()
    assert await ledger.statuses([spec.id]) == [JobStatus.QUEUED]


async def test_retention_deletes_what_is_old_and_over(ledger: Ledger, redis: Redis, tmp_path: Path) -> None:
    _, running = await submitted(ledger, tmp_path)
    old, files = await submitted(ledger, tmp_path, priority=1, idempotency="k", digest="d")
    await finish(ledger, tmp_path, files)
    await Retention(ledger, tmp_path, 60).step()
    assert files.path.exists()
    await redis.zadd("velocity:finished", {f"{TENANT}/{old.id}": 1000 * (time.time() - 61)})
    await Retention(ledger, tmp_path, 60).step()
    assert not files.path.exists()
    assert running.path.exists()
    assert await ledger.statuses([old.id]) == [None]
    assert list((tmp_path / "trash").iterdir()) == []
    assert await Reconciler(ledger, tmp_path).reconcile() == (0, 0)
