"""The window by itself: its size changes, places are asked back youngest first, and nobody is passed over."""

from __future__ import annotations

import asyncio

import pytest

from engine.protection import EngineProtection, Protection
from workers.courtesy import Sizes
from workers.settings import WorkerSettings
from workers.window import Place, Tally, Window


class Stage:
    """Items that run in a window until they are let go, each with its place."""

    def __init__(self, size: int, *, credit: float = 1000.0) -> None:
        self.window = Window(size, Tally(useful=10 * credit))
        self.places: dict[str, Place] = {}
        self.begun: list[str] = []
        """Every execution, in order."""
        self.done: list[str] = []
        self._may_end = {name: asyncio.Event() for name in "abcdefgh"}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, names: str) -> None:
        for name in names:
            self._tasks.append(asyncio.create_task(self._item(name)))
            await asyncio.sleep(0.002)

    async def let_go(self, names: str) -> None:
        for name in names:
            self._may_end[name].set()
        await asyncio.sleep(0.01)

    async def shrink(self, size: int) -> None:
        self.window.resize(size)
        self.window.recall()
        await asyncio.sleep(0.01)

    async def over(self) -> None:
        async with asyncio.timeout(5):
            await asyncio.gather(*self._tasks)

    @property
    def running(self) -> str:
        return "".join(name for name, place in self.places.items() if place.held)

    async def _item(self, name: str) -> None:
        place = self.places[name] = await self.window.take()

        async def attempt() -> None:
            self.begun.append(name)
            with place.working():
                await self._may_end[name].wait()
            self.done.append(name)

        await place.run(attempt)
        place.release()


async def test_the_youngest_give_their_places_back_and_run_again_before_those_that_never_ran() -> None:
    stage = Stage(4)
    await stage.start("abcdef")
    assert stage.running == "abcd"
    await stage.shrink(1)
    assert (stage.running, stage.window.tally.given_back, stage.window.tally.in_flight) == ("a", 3, 1)
    stage.window.resize(3)
    await stage.let_go("")
    assert stage.running == "abc"
    await stage.let_go("abcdef")
    await stage.over()
    assert "".join(stage.begun) == "abcd" + "bc" + "def"
    assert sorted(stage.done) == list("abcdef")
    assert stage.window.tally.in_flight == 0


async def test_a_window_without_places_lets_nobody_in_and_asks_all_back() -> None:
    stage = Stage(2)
    await stage.start("abc")
    await stage.shrink(0)
    assert stage.running == ""
    assert stage.window.locked
    stage.window.resize(1)
    await stage.let_go("abc")
    await stage.over()
    assert "".join(stage.done) == "abc"


async def test_an_item_is_given_back_three_times_and_then_left_alone() -> None:
    stage = Stage(1)
    await stage.start("a")
    for _ in range(5):
        await stage.shrink(0)
        stage.window.resize(1)
        await asyncio.sleep(0.01)
    assert stage.begun == ["a"] * 4
    assert stage.window.tally.given_back == 3
    await stage.shrink(0)
    assert stage.running == "a"
    await stage.let_go("a")
    await stage.over()
    assert stage.done == ["a"]


async def test_no_more_than_a_tenth_is_wasted_beyond_a_little() -> None:
    stage = Stage(2, credit=0)
    tally = stage.window.tally
    await stage.start("a")
    await asyncio.sleep(0.2)
    await stage.start("b")
    tally.wasted = 30 - 0.1  # of a credit of 30 s there is so much left: too little for the elder
    await stage.shrink(0)
    assert stage.running == "a"
    assert 29.9 < tally.wasted < 30
    await stage.let_go("a")
    assert tally.useful >= 0.2
    stage.window.resize(1)
    await stage.let_go("b")
    await stage.over()
    assert tally.affords(0.02)
    assert not tally.affords(0.2)


async def test_what_is_not_at_the_engine_makes_room_for_nothing() -> None:
    stage = Stage(1, credit=0)
    stage.window.tally.wasted = 30
    place = await stage.window.take()
    waits = asyncio.create_task(place.run(lambda: asyncio.sleep(0.05)))  # it has failed and waits for its next try
    await asyncio.sleep(0.01)
    await stage.shrink(0)
    assert not place.held
    stage.window.resize(1)
    await asyncio.wait_for(waits, 5)
    assert stage.window.tally.given_back == 0


async def test_a_place_that_is_asked_back_before_its_request_begins_waits_first() -> None:
    window = Window(1)
    place = await window.take()
    window.resize(0)
    window.recall()
    began = asyncio.Event()

    async def attempt() -> None:
        began.set()

    running = asyncio.create_task(place.run(attempt))
    await asyncio.sleep(0.01)
    assert not began.is_set()
    window.resize(1)
    await asyncio.wait_for(running, 5)


async def test_who_is_cancelled_leaves_no_place_behind() -> None:
    stage = Stage(1)
    await stage.start("a")
    waiting = asyncio.create_task(stage.window.take())
    await asyncio.sleep(0.01)
    waiting.cancel()
    granted = asyncio.create_task(stage.window.take())
    await asyncio.sleep(0.01)
    await stage.let_go("a")
    granted.cancel()  # it may have its place already, and not know it
    await asyncio.gather(waiting, granted, return_exceptions=True)
    if not granted.cancelled():
        granted.result().release()
    async with asyncio.timeout(5):
        (await stage.window.take()).release()


async def test_cancelled_while_it_is_asked_back_it_is_cancelled() -> None:
    window = Window(1)
    place = await window.take()
    running = asyncio.create_task(place.run(lambda: asyncio.sleep(60)))
    await asyncio.sleep(0.01)
    window.resize(0)
    window.recall()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, 5)


async def test_a_timeout_of_the_attempts_own_is_its_own() -> None:
    place = await Window(1).take()

    async def attempt() -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        await place.run(attempt)


SCHEDULER, PRIORITY, NONE = Protection


@pytest.mark.parametrize(
    ("protection", "seats", "window", "floor", "workers", "expected"),
    [
        (SCHEDULER, 224, None, 1, 1, (232, 232, 232)),
        (SCHEDULER, 224, None, 1, 3, (83, 83, 83)),
        (SCHEDULER, 4, None, 1, 1, (16, 16, 16)),
        (SCHEDULER, 4000, None, 1, 1, (512, 512, 512)),
        (SCHEDULER, 0, None, 1, 1, (16, 16, 16)),
        (SCHEDULER, 224, 40, 1, 2, (40, 40, 40)),
        (PRIORITY, 0, None, 1, 1, (16, 1, 4)),
        (PRIORITY, 0, None, 0, 1, (16, 0, 4)),
        (PRIORITY, 0, 64, 6, 1, (64, 6, 6)),
        (PRIORITY, 0, 64, 6, 4, (64, 2, 2)),
        (PRIORITY, 0, 2, 6, 1, (2, 2, 2)),
        (NONE, 0, None, 1, 1, (4, 1, 4)),
        (NONE, 0, 64, 1, 2, (2, 1, 2)),
        (NONE, 0, 3, 0, 1, (3, 0, 3)),
        (NONE, 0, None, 9, 9, (1, 1, 1)),
    ],
)
def test_sizes(
    protection: Protection, seats: int, window: int | None, floor: int, workers: int, expected: tuple[int, int, int]
) -> None:
    settings = WorkerSettings(bulk_window=window, batch_floor=floor)
    assert Sizes.of(settings, EngineProtection(protection, seats), workers) == Sizes(*expected)
