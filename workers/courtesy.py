"""Courtesy: bulk work stands back while people are at the engine, as far as the engine does not see to that itself.

open      the engine's scheduler decides: all that it can use is sent
cold ──── a person comes ────► hot ──── all gone for a moment ────► warming ──── full again ────► cold
any ───── no sign of the api, or none of Redis ────► blind ──── a sign ────► hot or warming
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum

from engine import log
from engine.client import EngineClient
from engine.errors import EngineError
from engine.protection import EngineProtection, Protection
from workers.errors import LedgerUnavailable
from workers.job import LANE
from workers.ledger import Ledger, People
from workers.settings import WorkerSettings
from workers.window import Tally, Window

_ENGINE_SECONDS = 10.0
_RETRY_SECONDS = 1.0
_POLL_SECONDS = 0.05
_POLL_TIMEOUT = 1.0
_SILENCE = 5.0
"""Seconds without a sign of life of any api process after which nobody knows whether people are there."""
_QUIET = 0.5
"""Seconds without a person after which bulk work comes back: who reads an answer often asks again."""
_DOUBLING = 0.5
"""Seconds in which the window doubles then."""
_SUMMARY_SECONDS = 30.0
_WINDOW = 16
"""Requests of one worker at an engine of which it is not known how many it can use."""
_SMALL = 4
"""Requests of all workers together where they may slow people down and nobody could tell."""
_LEAST, _MOST = 16, 512
"""Bounds of what one worker sends to an engine that decides for itself."""
_SPARE = 8
"""Requests more than the engine has seats for: they are there already when a seat is free."""

logger = log.get(__name__)


class Phase(StrEnum):
    """How much bulk work is sent, and why."""

    OPEN = "open"
    """As much as the engine can use: it protects people itself."""
    COLD = "cold"
    """The whole window: nobody is there."""
    HOT = "hot"
    """The floor: people are at the engine."""
    WARMING = "warming"
    """More and more: they left a moment ago."""
    BLIND = "blind"
    """A little, and nothing is given back: it is not known whether people are there."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """One worker's window. What is meant for all workers together is divided, and rounded up."""

    full: int
    hot: int
    blind: int

    @classmethod
    def of(cls, settings: WorkerSettings, engine: EngineProtection, workers: int) -> Sizes:
        """The sizes at such an engine, with so many workers at it."""

        def share(total: int) -> int:
            return -(-total // max(1, workers))

        full = settings.bulk_window or _WINDOW
        if engine.protection is Protection.SCHEDULER:
            if settings.bulk_window is None and engine.batch_seats:
                full = min(_MOST, max(_LEAST, share(engine.batch_seats) + _SPARE))
            return cls(full, full, full)
        small = share(_SMALL)
        if engine.protection is Protection.NONE:
            full = min(small, full)
        floor = min(full, share(settings.batch_floor))
        return cls(full, floor, min(full, max(floor, small)))


class Courtesy:
    """Sets a window's size by what the engine says of itself, and by the people whom the api has let in."""

    def __init__(self, window: Window, ledger: Ledger, engine: EngineClient, settings: WorkerSettings) -> None:
        self._window = window
        self._ledger = ledger
        self._engine = engine
        self._settings = settings
        self._protection = EngineProtection(Protection.NONE)
        self._workers = 1
        self._people: People | None = None
        self._seen = self._grown = 0.0
        self._diary = _Diary(window.tally)
        self._phase: Phase | None = None
        self._sizes = Sizes.of(settings, self._protection, 1)
        self._over = False

    @asynccontextmanager
    async def following(self) -> AsyncIterator[asyncio.Task[None]]:
        """Look once, so that the window has its size before anything is sent, and go on looking within the block.

        The task ends only with the block, or by an error that nobody expected.
        """
        await asyncio.gather(self._ask_engine(), self._ask_redis())
        self._set()
        task = asyncio.create_task(self._follow())
        try:
            yield task
        finally:
            self._over = True  # asyncio.wait_for, in redis-py, may swallow a cancellation before Python 3.12
            task.cancel()
            await asyncio.wait([task])

    async def _follow(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_engine())
            group.create_task(self._follow_people())

    async def _follow_engine(self) -> None:
        known = True
        while not self._over:
            await asyncio.sleep(_ENGINE_SECONDS if known else _RETRY_SECONDS)
            known = await self._ask_engine()

    async def _follow_people(self) -> None:
        counted = 0.0
        clock = asyncio.get_running_loop().time
        while not self._over:
            aware = self._protection.protection is Protection.SCHEDULER
            await asyncio.sleep(_RETRY_SECONDS if aware or self._people is None else _POLL_SECONDS)
            if clock() - counted >= _RETRY_SECONDS:
                counted = clock()
                await self._count_workers()
            if not aware:
                await self._ask_people()
            self._set()

    async def _ask_engine(self) -> bool:
        """What the engine says of itself; one that does not answer is as it was. False if it did not."""
        try:
            found = await self._engine.protection()
        except EngineError as error:
            logger.debug("protection_unknown", reason=str(error))
            return False
        if found.protection is not self._protection.protection:
            logger.info("engine_protection", protection=found.protection, batch_seats=found.batch_seats)
        self._protection = found
        if found.protection is Protection.NONE and not self._window.tally.warned:
            self._window.tally.warned = True
            logger.warning(
                "engine_unprotected",
                most_in_flight=_SMALL,
                advice="Nothing in the engine keeps bulk requests from slowing people down, so only a few are sent. "
                "Start it with `velocity engine serve`; or, if it runs with --scheduling-policy priority, "
                "set VELOCITY_ENGINE_POLICY=priority.",
            )
        return True

    async def _ask_redis(self) -> None:
        await self._count_workers()
        await self._ask_people()

    async def _count_workers(self) -> None:
        try:
            async with asyncio.timeout(_POLL_TIMEOUT):
                self._workers = max(1, (await self._ledger.at_engine(LANE)).workers)
        except (LedgerUnavailable, TimeoutError) as error:
            logger.debug("workers_unknown", reason=str(error))

    async def _ask_people(self) -> None:
        try:
            async with asyncio.timeout(_POLL_TIMEOUT):
                people = await self._ledger.people()
        except (LedgerUnavailable, TimeoutError):
            self._people = None
        else:
            self._people = people if people.silence is not None and people.silence < _SILENCE else None

    def _set(self) -> None:
        """The next size, and the phase that it follows from."""
        now = asyncio.get_running_loop().time()
        before, window = self._phase, self._window
        sizes = self._sizes = Sizes.of(self._settings, self._protection, self._workers)
        self._phase = phase = self._next(now)
        window.full = sizes.full
        if phase in {Phase.OPEN, Phase.COLD}:
            size = sizes.full
        elif phase is Phase.WARMING:
            if before is not Phase.WARMING:
                self._grown = now
                size = max(1, min(window.size, sizes.full))
            else:
                size = window.size
                if now - self._grown >= _DOUBLING:
                    self._grown = now
                    size = min(2 * size, sizes.full)
        else:
            size = sizes.hot if phase is Phase.HOT else sizes.blind
        if size != window.size:
            window.resize(size)
        if phase is Phase.HOT:
            window.recall()
        if phase is not before:
            self._tell(before, phase, now)

    def _next(self, now: float) -> Phase:
        if self._protection.protection is Protection.SCHEDULER:
            return Phase.OPEN
        if self._people is None:
            return Phase.BLIND
        if self._people.requests:
            self._seen = now
            return Phase.HOT
        if self._phase is Phase.HOT and now - self._seen < _QUIET:
            return Phase.HOT
        stood_back = self._phase in {Phase.HOT, Phase.BLIND, Phase.WARMING}
        return Phase.WARMING if stood_back and self._window.size < self._sizes.full else Phase.COLD

    def _tell(self, before: Phase | None, phase: Phase, now: float) -> None:
        if phase is Phase.HOT:
            self._diary.begins(now)
        elif before is Phase.HOT:
            self._diary.ends(now)
        if phase is Phase.BLIND:
            logger.info("people_unseen", window=self._window.size, reason="no sign of an api process, or none of Redis")
        elif before is Phase.BLIND:
            logger.info("people_seen_again")


class _Diary:
    """Tells of hot phases: each one for who looks closely, now and then of all."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._began = 0.0
        self._at_begin = (0, 0.0)
        self._told = float("-inf")
        self._untold = (0, 0.0, 0, 0.0)

    def begins(self, now: float) -> None:
        """People came."""
        self._began, self._at_begin = now, (self._tally.given_back, self._tally.wasted)

    def ends(self, now: float) -> None:
        """They are gone, or out of sight."""
        given_back, wasted = self._tally.given_back - self._at_begin[0], self._tally.wasted - self._at_begin[1]
        seconds = now - self._began
        logger.debug("bulk_stood_back", seconds=round(seconds, 2), given_back=given_back, wasted=round(wasted, 2))
        phases, in_all, back_in_all, wasted_in_all = self._untold
        self._untold = (phases + 1, in_all + seconds, back_in_all + given_back, wasted_in_all + wasted)
        if now - self._told >= _SUMMARY_SECONDS:
            phases, in_all, back_in_all, wasted_in_all = self._untold
            logger.info(
                "bulk_courtesy", hot_phases=phases, hot_seconds=round(in_all, 1), given_back=back_in_all,
                wasted_seconds=round(wasted_in_all, 1),
            )  # fmt: skip
            self._told, self._untold = now, (0, 0.0, 0, 0.0)
