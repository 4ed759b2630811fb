"""What goes wrong, at moments drawn from a seed, and what is measured of it."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from redis.exceptions import RedisError

from tests.chaos.child import Child
from tests.chaos.rig import Rig, paused
from workers import redis_keys

_FOLLOWED_SECONDS = 60.0
_RESUMED_SECONDS = 60.0


@dataclass
class Times:
    """What was measured, in seconds."""

    followed: list[float] = field(default_factory=list)
    """From the kill -9 of a worker to the first result of a shard of its own by another."""
    stopped: list[float] = field(default_factory=list)
    """From SIGTERM to a worker's end, before which it gives its shards back."""
    resumed: list[float] = field(default_factory=list)
    """From the kill -9 of Redis to the first commit."""
    faults: Counter[str] = field(default_factory=Counter)


class Faults:
    """Draws faults from a bag of which each comes as often as it weighs, and lets them overlap."""

    def __init__(self, rig: Rig, seed: int, lease: float, gap: float) -> None:
        self._rig = rig
        self._chance = Random(seed)  # noqa: S311 - a schedule of faults
        self._lease = lease
        self._gap = gap
        self._running: set[asyncio.Task[None]] = set()
        self._all: dict[str, tuple[int, Callable[[], Coroutine[Any, Any, None]]]] = {
            "worker killed": (8, self._kill_worker),
            "worker frozen": (3, self._freeze_worker),
            "worker stopped": (2, self._stop_worker),
            "api killed": (2, self._kill_api),
            "api frozen": (1, self._freeze_api),
            "engine killed": (1, self._kill_engine),
            "engine frozen": (1, self._freeze_engine),
            "redis killed": (1, self._kill_redis),
            "redis frozen": (1, self._freeze_redis),
            "rq wiped": (1, self._wipe_rq),
            "calls lost": (2, self._lose_calls),
        }
        self.times = Times()
        self.ended = 0.0
        """When the last fault began (monotonic)."""

    async def go_on(self, seconds: float) -> None:
        """Faults for so long; then everything is well again, and measured to its end."""
        until = time.monotonic() + seconds
        bag: list[str] = []
        while time.monotonic() < until:
            if not bag:
                bag = [name for name, (weight, _) in self._all.items() for _ in range(weight)]
                self._chance.shuffle(bag)
            name = bag.pop()
            self.times.faults[name] += 1
            self._also(self._all[name][1]())
            await asyncio.sleep(self._chance.uniform(0, 2 * self._gap))
        self.ended = time.monotonic()
        await self.settle()

    async def settle(self) -> None:
        """The faults that last end, and what is being measured is."""
        while self._running:
            await asyncio.gather(*self._running)
        self._rig.heal()

    def _also(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _kill_worker(self) -> None:
        """One that is at work, if any is."""
        worker = self._chance.choice(self._rig.workers)
        for other in self._chance.sample(self._rig.workers, len(self._rig.workers)):
            segments = await asyncio.to_thread(_open_segments, other)
            if segments:
                worker = other
                break
        began = time.monotonic()
        if worker.signal(signal.SIGKILL) is not None:
            for segment in segments:
                self._also(self._follow(segment, began))

    async def _follow(self, segment: Path, began: float) -> None:
        """Until another lease of the same shard has a result; one that was finished needs none, and ends unmeasured."""
        unit = segment.name.partition(".")[0]
        before = set(segment.parent.glob(f"{unit}.*"))
        while segment.exists() and time.monotonic() < began + _FOLLOWED_SECONDS:
            if set(segment.parent.glob(f"{unit}.*")) - before:
                self.times.followed.append(time.monotonic() - began)
                return
            await asyncio.sleep(0.1)

    async def _freeze_worker(self) -> None:
        await paused(self._chance.choice(self._rig.workers), self._lease * self._chance.uniform(1.2, 2))

    async def _stop_worker(self) -> None:
        worker = self._chance.choice(self._rig.workers)
        ends, began = len(worker.exits), time.monotonic()
        if worker.signal(signal.SIGTERM) is None:
            return
        await worker.ended(ends + 1, 60)
        if worker.exits[ends] == 0:  # else it was killed meanwhile
            self.times.stopped.append(time.monotonic() - began)

    async def _kill_api(self) -> None:
        self._chance.choice(self._rig.apis).signal(signal.SIGKILL)

    async def _freeze_api(self) -> None:
        await paused(self._chance.choice(self._rig.apis), self._chance.uniform(1, 7))

    async def _kill_engine(self) -> None:
        self._rig.engine.signal(signal.SIGKILL)

    async def _freeze_engine(self) -> None:
        await paused(self._rig.engine, self._chance.uniform(0.5, 3))

    async def _freeze_redis(self) -> None:
        await paused(self._rig.redis, self._chance.uniform(0.5, 4))

    async def _kill_redis(self) -> None:
        began = time.monotonic()
        self._rig.redis.signal(signal.SIGKILL)
        await asyncio.sleep(0.1)
        await self._rig.redis_answers()
        at = await self._committed()
        while time.monotonic() < began + _RESUMED_SECONDS:
            if await self._committed() > at:
                self.times.resumed.append(time.monotonic() - began)
                return
            await asyncio.sleep(0.05)

    async def _committed(self) -> int:
        """Items that count, of all jobs that the ledger knows."""
        try:
            names = [name async for name in self._rig.direct.scan_iter(redis_keys.job("job_" + "?" * 32), 1000)]
            async with self._rig.direct.pipeline(transaction=False) as pipe:
                for name in names:
                    pipe.hget(name, "completed")
                return sum(int(count or 0) for count in await pipe.execute())
        except (RedisError, OSError):  # it was killed or frozen again
            return 0

    async def _wipe_rq(self) -> None:
        """Tickets, registrations and started jobs of RQ are gone, as after an operator's `rq empty`."""
        try:
            names = [name async for name in self._rig.direct.scan_iter("rq:*", 1000)]
            if names:
                await self._rig.direct.delete(*names)
        except (RedisError, OSError):  # it is away just now
            return

    async def _lose_calls(self) -> None:
        self._rig.proxy.share = self._chance.uniform(0.05, 0.4)
        await asyncio.sleep(self._chance.uniform(1, 3))
        self._rig.proxy.share = 0.0


def _open_segments(worker: Child) -> list[Path]:
    """The segment files that a worker is writing to."""
    pid = worker.pid
    found = []
    for link in Path(f"/proc/{pid}/fd").glob("*") if pid else ():
        try:
            target = link.readlink()
        except FileNotFoundError:
            continue
        if target.parent.name == "seg":
            found.append(target)
    return found
