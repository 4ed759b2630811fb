"""Small jobs, each with one thing that goes wrong on its way: afterwards every item is there once, in its place."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from api import redis_server
from tests.chaos.checker import check
from tests.chaos.child import CRASHED
from tests.chaos.entry import NO_SPACE
from tests.chaos.front import Submission
from tests.chaos.points import OF_THE_API, OF_THE_WORKER
from tests.chaos.rig import CRASHING_API, CRASHING_WORKER, Rig, explained, rig

ITEMS = 40
PATIENCE = 120
"""Seconds within which a story ends well: several run at once, on few cores."""
Story = Callable[[Path], Awaitable[None]]


async def worker_dies(point: str, directory: Path) -> None:
    """At a named point, once; its successor finishes the job."""
    async with rig(directory, worker=CRASHING_WORKER, env={"CHAOS_POINT": point}) as running, explained(running):
        job = await running.front.submit(Submission(point, ITEMS, running.front.keys[0]))
        await running.front.finished(job, PATIENCE)
        await running.workers[0].ended(1, 10)
        assert running.workers[0].exits == [CRASHED]
        await require_whole(running, job)


async def api_dies(point: str, directory: Path) -> None:
    """At a named point, once, so that the client has no answer and asks again."""
    async with rig(directory, api=CRASHING_API, env={"CHAOS_POINT": point}) as running, explained(running):
        job = await running.front.submit(Submission(point, ITEMS, running.front.keys[0]))
        await running.front.finished(job, PATIENCE)
        assert running.apis[0].exits == [CRASHED]
        assert job.tries > 1
        await require_whole(running, job)


async def client_changes_its_mind(directory: Path) -> None:
    """What it asked for first is on the disk only; then it uses the same Idempotency-Key for something else."""
    env = {"CHAOS_POINT": "after-rename-before-submit"}
    async with rig(directory, api=CRASHING_API, env=env) as running, explained(running):
        first, second = (Submission(tag, ITEMS, running.front.keys[0], same_as="one") for tag in ("first", "second"))
        asking = asyncio.create_task(running.front.submit(first))
        await running.apis[0].ended(1, PATIENCE)
        asking.cancel()
        await running.front.submit(second)
        await running.front.finished(second, PATIENCE)
        await require_whole(running, first, second)
        assert running.apis[0].exits == [CRASHED]


async def poison(directory: Path) -> None:
    """One item kills whoever executes it: it fails, and all others are done."""
    async with rig(directory, worker=CRASHING_WORKER, quarantine=True) as running, explained(running):
        job = Submission("one-kills", ITEMS, running.front.keys[0], poison=frozenset({17}))
        await running.front.submit(job)
        await running.front.finished(job, PATIENCE)
        await require_whole(running, job)


async def redis_is_emptied(directory: Path) -> None:
    """In mid-job, all of it: what was acknowledged comes to its end."""
    async with rig(directory, api=CRASHING_API, worker=CRASHING_WORKER) as running, explained(running):
        jobs = [await running.front.submit(job) for job in _several(running, "before")]
        await _some_results(running, jobs[0])
        await running.direct.flushall()
        jobs += [await running.front.submit(job) for job in _several(running, "after")]
        for job in jobs:
            await running.front.finished(job, PATIENCE)
        await require_whole(running, *jobs)


async def redis_comes_back_older(directory: Path) -> None:
    """It is replaced by a copy that was made in mid-job: what came after that is not forgotten."""
    redis = directory / "data" / redis_server.FOLDER
    async with rig(directory, api=CRASHING_API, worker=CRASHING_WORKER) as running, explained(running):
        jobs = [await running.front.submit(job) for job in _several(running, "before")]
        await _some_results(running, jobs[0])
        await asyncio.to_thread(shutil.copytree, redis, directory / "copy")
        jobs += [await running.front.submit(job) for job in _several(running, "after")]
        await running.front.finished(jobs[0], PATIENCE)
        await running.redis.end()
        await asyncio.to_thread(shutil.rmtree, redis)
        await asyncio.to_thread((directory / "copy").rename, redis)
        running.redis.start()
        await running.redis_answers()
        for job in jobs:
            await running.front.finished(job, PATIENCE)
        await require_whole(running, *jobs)


async def disk_is_full(directory: Path) -> None:
    """For a while, in mid-job: nothing is lost, and what is refused meanwhile is not half there."""
    async with rig(directory, api=CRASHING_API, worker=CRASHING_WORKER) as running, explained(running):
        first = await running.front.submit(Submission("before", 20 * ITEMS, running.front.keys[0]))
        await _some_results(running, first)
        (directory / NO_SPACE).touch()
        second = asyncio.create_task(running.front.submit(Submission("meanwhile", ITEMS, running.front.keys[0])))
        await asyncio.sleep(4)
        assert not second.done()
        (directory / NO_SPACE).unlink()
        for job in (first, await second):
            await running.front.finished(job, PATIENCE)
        await require_whole(running, first, await second)


async def require_whole(running: Rig, *jobs: Submission) -> None:
    """Everything is as it should be."""
    findings = await check(running, jobs, tidy_seconds=75)
    assert not findings.wrong, findings


def _several(running: Rig, tag: str) -> list[Submission]:
    return [Submission(f"{tag}-{number}", number * 2 * ITEMS, running.front.keys[0]) for number in (6, 1, 2)]


async def _some_results(running: Rig, job: Submission) -> None:
    async with asyncio.timeout(PATIENCE):
        while not (await running.front.state(job))["counts"]["completed"]:
            await asyncio.sleep(0.1)


STORIES: dict[str, Story] = {
    **{f"worker-{point}": partial(worker_dies, point) for point in OF_THE_WORKER},
    **{f"api-{point}": partial(api_dies, point) for point in OF_THE_API},
    "client-changes-its-mind": client_changes_its_mind,
    "poison": poison,
    "redis-emptied": redis_is_emptied,
    "redis-older": redis_comes_back_older,
    "disk-full": disk_is_full,
}
