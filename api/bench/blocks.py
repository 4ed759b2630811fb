"""A block: some seconds of one mixture of load against one installation, and the record that it leaves."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from api.bench.canary import Canary
from api.bench.figures import Record
from api.bench.http import HttpCaller
from api.bench.jobs import JobLoad
from api.bench.load import OpenLoad, Prompts, Sizes, Steady, Stream, bulk, open_loop, steady
from api.cli.client import VelocityClient

DEFAULT_DIAL: dict[str, float] = {"interactive_ratio": 1.2, "batch_floor": 1}
STRICT_DIAL: dict[str, float] = {"interactive_ratio": 1.05, "batch_floor": 0}
_DIAL_SECONDS = 1.2
"""The scheduler looks for a new dial about once a second."""
_HEAD_START = 0.2
_BULK_SALT = 1 << 20

Counted = dict[str, float] | None
Wasted = Callable[[], Awaitable[Counted]]
"""How much bulk work was thrown away so far (`lost`), and in the same unit all that was done, if that is known, too."""


@dataclass(frozen=True)
class Target:
    """One installation. Only the gateway's address, a key and a model are needed for a foreign one."""

    name: str
    url: str
    key: str
    model: str
    engine_url: str = ""
    """For bulk that goes straight to the engine."""
    control: Path | None = None
    """VELOCITY_SCHEDULER_DIR: where the scheduler's dial is turned, and its report read."""
    wasted: Wasted | None = None
    """Asked before and after a block. Without it the scheduler's report is asked, which counts tokens."""


@dataclass(frozen=True)
class Arm:
    """One row of the comparison. People always come through the gateway."""

    name: str
    target: str
    people: bool = True
    bulk: Literal["", "job", "direct"] = ""
    window: int = 0
    """Bulk requests in flight: sent so if direct; as configured, for the record, if by jobs (0: not known)."""
    dial: dict[str, float] | None = None
    once: bool = False
    """Only in the first round."""


@dataclass(frozen=True)
class Shape:
    """What all blocks of a run have in common."""

    seconds: float
    lead: float
    """Seconds for which bulk runs before anything counts."""
    bulk: Sizes


class BlockRunner:
    """Runs blocks one after the other. `salt` makes the prompts of this run its own."""

    def __init__(self, shape: Shape, canary: Canary, salt: int) -> None:
        self._shape = shape
        self._canary = canary
        self._salt = salt * 1000

    def prompts(self) -> Prompts:
        """Prompts that nobody else gets."""
        self._salt += 1
        return Prompts(self._salt)

    async def run(self, arm: Arm, target: Target, people: OpenLoad | Steady | None, seed: int) -> Record:
        """One block; its record is plain data, ready for JSON."""
        await turn(target.control, arm.dial or DEFAULT_DIAL)
        before = await _wasted(target)
        zero = time.monotonic() + (self._shape.lead if arm.bulk else _HEAD_START)
        over = asyncio.Event()
        async with (
            HttpCaller(target.url, target.model, target.key) as caller,
            HttpCaller(target.engine_url or target.url, target.model) as engine,
            VelocityClient(target.url, target.key) as client,
        ):
            jobs = JobLoad(client, target.model, self._shape.bulk, self.prompts())
            work: asyncio.Future[Any]
            if arm.bulk == "job":
                work = asyncio.ensure_future(jobs.run(zero, self._shape.seconds, over.is_set))
            elif arm.bulk == "direct":
                sender = bulk(engine, self._shape.bulk, self.prompts(), window=arm.window, zero=zero, over=over.is_set)
                work = asyncio.ensure_future(sender)
            else:
                work = asyncio.ensure_future(over.wait())
            streams = await self._beside(work, self._people(caller, people, zero, seed), over)
            done = work.result() if arm.bulk == "direct" else jobs.done
        record = self._record(arm, target, zero, people, streams)
        record["bulk"] = [(round(at, 3), one.output, one.input) for at, one in done]
        record["bulk_failed"] = jobs.failed + sum(not one.output for _, one in done)
        record["wasted"] = _between(before, await _wasted(target), record) if arm.bulk == "job" else None
        return record

    async def _people(
        self, caller: HttpCaller, people: OpenLoad | Steady | None, zero: float, seed: int
    ) -> list[Stream]:
        seconds = self._shape.seconds
        if isinstance(people, OpenLoad):
            return await open_loop(caller, people, self.prompts(), seconds=seconds, seed=seed, zero=zero)
        if isinstance(people, Steady):
            return await steady(caller, people, self.prompts(), seconds=seconds, zero=zero)
        await asyncio.sleep(max(0.0, zero + seconds - time.monotonic()))
        return []

    @staticmethod
    async def _beside(work: asyncio.Future[Any], people: Awaitable[list[Stream]], over: asyncio.Event) -> list[Stream]:
        """What people saw; bulk goes on until the last of them has got everything, and its fault ends the block."""
        crowd = asyncio.ensure_future(people)
        try:
            await asyncio.wait({work, crowd}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            return await crowd
        finally:
            over.set()
            crowd.cancel()
            await asyncio.gather(work, crowd, return_exceptions=True)

    def _record(
        self, arm: Arm, target: Target, zero: float, people: OpenLoad | Steady | None, streams: list[Stream]
    ) -> Record:
        seconds = self._shape.seconds
        return {
            "arm": arm.name,
            "target": target.name,
            "began": round(time.time() - (time.monotonic() - zero), 3),
            "seconds": seconds,
            "window": (arm.window or -1) if arm.bulk else 0,
            "dial": arm.dial,
            "people": repr(people),
            "streams": [seen.compact() for seen in streams],
            "stalls": [(round(at, 3), lost) for at, lost in self._canary.between(zero, zero + seconds)],
            "scheduler": status(target.control),
        }


async def turn(control: Path | None, dial: dict[str, float]) -> None:
    """Turns the dial of the scheduler with this control folder, and waits until it has looked."""
    if control is None:
        return
    path = control / "dial.json"
    text = json.dumps(dial)
    if await asyncio.to_thread(lambda: path.exists() and path.read_text()) != text:
        await asyncio.to_thread(path.write_text, text)
    await asyncio.sleep(_DIAL_SECONDS)


def status(control: Path | None) -> dict[str, Any] | None:
    """The report of the scheduler with this control folder; None if there is none."""
    path = control / "status.json" if control else None
    if path is None or not path.exists():
        return None
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


async def _wasted(target: Target) -> Counted:
    if target.wasted:
        return await target.wasted()
    if target.control is None:
        return None
    await asyncio.sleep(_DIAL_SECONDS)  # the report is renewed once a second
    return {"lost": float((status(target.control) or {}).get("wasted_tokens", 0))}


def _between(before: Counted, after: Counted, record: Record) -> Counted:
    if before is None or after is None:
        return None
    tokens = float(sum(output + given for _, output, given in record["bulk"]))
    done = after["done"] - before["done"] if "done" in after else tokens
    return {"lost": after["lost"] - before["lost"], "done": max(0.0, done)}
