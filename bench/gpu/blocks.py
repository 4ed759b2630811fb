"""A block: some seconds of one mixture of load against one running engine, and the record that it leaves."""

from __future__ import annotations

import asyncio
import tempfile
import time
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from api.bench.blocks import status, turn
from api.bench.load import Done
from bench.gpu.load import Client, OpenLoad, Sizes, Stream, bulk, closed_loop, open_loop, prompts
from bench.gpu.tools import Tools, round_trips

INTERACTIVE = 0
BULK = 10
"""Request priorities as velocity sends them: lower is earlier, above zero is bulk."""


@dataclass(frozen=True)
class Closed:
    """`users` streams that start together, each sending `rounds` requests."""

    sizes: Sizes
    users: int
    rounds: int


@dataclass(frozen=True)
class Window:
    """Bulk requests kept in flight. The engine sees them `lead` seconds before the block starts counting."""

    sizes: Sizes
    size: int
    lead: float = 3.0


@dataclass(frozen=True)
class Block:
    """One row of the plan. `dial` is what the co-serving scheduler is told first (None: leave it alone)."""

    arm: str
    seconds: float = 0.0
    people: OpenLoad | Closed | Tools | None = None
    window: Window | None = None
    prioritised: bool = False
    dial: dict[str, float] | None = None
    seed: int = 1
    through: bool = False
    """People come through velocity's gateway; bulk goes straight to the engine all the same."""


@dataclass(frozen=True)
class Door:
    """Where people's requests go."""

    url: str
    model: str
    key: str = ""


def _bulk_process(
    url: str, model: str, window: Window, priority: int | None, salt: int, zero: float, stop: Path
) -> list[tuple[float, Done]]:
    """Runs in its own process, so that bulk answers never delay the clock of a stream."""

    async def run() -> list[tuple[float, Done]]:
        client = Client(url, model)
        try:
            return await bulk(
                client,
                window.sizes,
                prompts(salt),
                window=window.size,
                zero=zero,
                over=lambda: stop.exists() or not stop.parent.exists(),
                priority=priority,
            )
        finally:
            await client.close()

    return asyncio.run(run())


async def _people(door: Door, block: Block, salt: int, zero: float) -> list[Stream]:
    priority = INTERACTIVE if block.prioritised and not block.through else None
    if block.people is None:
        await asyncio.sleep(max(0.0, zero + block.seconds - time.monotonic()))
        return []
    client = Client(door.url, door.model, door.key)
    try:
        await asyncio.sleep(max(0.0, zero - time.monotonic()))
        if isinstance(block.people, Tools):
            return await round_trips(client, block.people, prompts(salt), zero, priority)
        if isinstance(block.people, Closed):
            shape = block.people
            return await closed_loop(
                client, shape.sizes, users=shape.users, rounds=shape.rounds, salt=salt, zero=zero, priority=priority
            )
        return await open_loop(
            client,
            block.people,
            prompts(salt),
            seconds=block.seconds,
            seed=block.seed,
            zero=zero,
            priority=priority,
        )
    finally:
        await client.close()


async def run_block(
    engine: Door, block: Block, *, salt: int, control: Path | None, pool: Executor, gateway: Door | None = None
) -> dict[str, Any]:
    """Runs a block and returns its record (plain data, ready for JSON). `salt` makes its prompts its own."""
    door = gateway if block.through and gateway else engine
    if block.dial is not None:
        await turn(control, block.dial)
    zero = time.monotonic() + (block.window.lead if block.window else 0.2)
    done: list[tuple[float, Done]] = []
    if block.window is None:
        streams = await _people(door, block, salt, zero)
    else:
        priority = BULK if block.prioritised else None
        with tempfile.TemporaryDirectory() as folder:
            stop = Path(folder) / "stop"  # bulk ends when the last person has got everything
            future = asyncio.get_running_loop().run_in_executor(
                pool, _bulk_process, engine.url, engine.model, block.window, priority, salt + 1, zero, stop
            )
            try:
                streams = await _people(door, block, salt, zero)
            finally:
                stop.touch()
            done = await future
    report = status(control)
    await asyncio.sleep(0.5)
    return {
        "arm": block.arm,
        "block": asdict(block),
        "seconds": block.seconds,
        "window": block.window.size if block.window else 0,
        "streams": [seen.compact() for seen in streams],
        "bulk": [(round(at, 3), one.output, one.input) for at, one in done],
        "bulk_failed": sum(not one.output for _, one in done),
        "wasted": None,
        "stalls": [],
        "scheduler": report,
    }
