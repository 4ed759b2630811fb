"""Runs a job's failed items again, as a job of their own: POST /jobs/{id}/retry."""

from __future__ import annotations

import asyncio
import hashlib
import time

from api.errors import ApiError
from api.gateway import Gateway
from api.job_input import window_seconds
from api.keys import Key
from api.submission import require_room, submit, written
from workers.job import JobSpec, JobState, new_id
from workers.store import JobFiles, encode_item


async def retry(gateway: Gateway, key: Key, job: JobState) -> JobState:
    """A job with the items of `job` that did not complete. Asking again gives the same one, as long as it is there.

    Raises ApiError 409 while the job is not over, and if all of its items completed.
    """
    not_now = (b"x-should-retry", b"false")
    if not job.status.terminal:
        raise ApiError(
            409, f"{job.id} is {job.status.value}. Wait until it is over, or cancel it.", code="job_not_over",
            headers=(not_now,),
        )  # fmt: skip
    if job.completed >= job.total:
        raise ApiError(409, f"No item of {job.id} failed.", code="nothing_to_retry", headers=(not_now,))
    data_dir = gateway.settings.data_dir
    files = JobFiles(data_dir, job.tenant, job.id)
    old = await asyncio.to_thread(files.spec)
    await gateway.watch.resolve(old.model, key)  # this key too must be allowed to use it
    now = time.time()
    count = job.total - job.completed
    spec = old.model_copy(
        update={
            "id": new_id("job"), "account": key.id, "total": count, "created": now, "retry_of": job.id,
            "tokens": -(-old.tokens * count // old.total), "input_file": None, "output_expires_after": None,
            "idempotency": hashlib.sha256(f"retry {job.id}".encode()).hexdigest(), "digest": "retry",
            "shard_items": gateway.settings.shard_items,
            "deadline": int(now) + window_seconds(old.completion_window) if old.completion_window else None,
        }
    )  # fmt: skip
    earlier = await require_room(gateway, key, spec)
    if earlier is not None:
        return earlier
    size = await asyncio.to_thread(files.input_bytes)
    await gateway.pressure.require_room(size)
    target = JobFiles(data_dir, spec.tenant, spec.id)
    await written(gateway, spec, gateway.intake.run(size, _write, files, target, spec))
    return await submit(gateway, key, spec)


def _write(source: JobFiles, target: JobFiles, spec: JobSpec) -> None:
    completed = source.completed()
    with target.draft() as draft:
        for index in range(source.spec().total):
            if index not in completed:
                item = source.item(index)
                draft.add(encode_item(item.id, item.body))
        draft.publish(spec)
