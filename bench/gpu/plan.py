"""What is run: the blocks of each plan, for each server."""

from __future__ import annotations

from bench.gpu.blocks import Block, Closed, Window
from bench.gpu.load import OpenLoad, Sizes
from bench.gpu.tools import Tools

CHAT = Sizes(prompt=(200, 800), output=(80, 220))
SHORT = Sizes(prompt=(20, 60), output=(24, 24))
"""A short request: a one-sentence answer."""
BULK = Sizes(prompt=(200, 400), output=(64, 192))
HALF = OpenLoad(CHAT, rate=14.0, on=1.0, period=4.5)
"""People about half of the time: bursts of 1 s every 4.5 s, some ten streams at once, the last ones trailing off."""
RARE = OpenLoad(Sizes(prompt=(200, 800), output=(16, 32)), rate=0.7, on=1.0, period=1.0)
"""Short, lonely requests, about a tenth of the time: each one arrives while only bulk runs."""
ALWAYS = OpenLoad(CHAT, rate=8.0, on=1.0, period=1.0)
"""Somebody always reads."""

DEFAULT = {"interactive_ratio": 1.2, "batch_floor": 1}
STRICT = {"interactive_ratio": 1.05, "batch_floor": 0}
WIDE = {"interactive_ratio": 1.5, "batch_floor": 1}

Plan = dict[str, list[Block]]


def gpu(seconds: float = 22.5, window: int = 256) -> Plan:
    """The full plan: one stock server, one velocity server, the same arrivals in every arm."""
    bulk = Window(BULK, window)
    stock = [
        Block("A", seconds, HALF),
        Block("B", seconds / 2, None, bulk),
        Block("C", seconds, HALF, bulk),
        *(Block(f"S{n}", seconds, HALF, Window(BULK, n)) for n in (4, 32, 128)),
        *_streams(None, prioritised=False),
    ]
    dials = {"V": DEFAULT, "V wide": WIDE, "V strict": STRICT}
    velocity = [
        Block("A", seconds, HALF, prioritised=True),
        Block("B", seconds / 2, None, bulk, prioritised=True),
        *(Block(n, seconds, HALF, bulk, prioritised=True, dial=d) for n, d in dials.items()),
        Block("A10", seconds, RARE, prioritised=True),
        Block("V10", seconds, RARE, bulk, prioritised=True, dial=DEFAULT),
        Block("A100", seconds, ALWAYS, prioritised=True),
        Block("V100", seconds, ALWAYS, bulk, prioritised=True, dial=DEFAULT),
        *_streams(bulk, prioritised=True),
        *_streams(None, prioritised=True, through=True),
        *_streams(bulk, prioritised=True, through=True),
    ]
    return {"stock": stock, "velocity": velocity}


def _streams(window: Window | None, *, prioritised: bool, through: bool = False) -> list[Block]:
    """The user's figures: one stream, 50 and 200 at once, a short request, a round trip with two tools.

    Alone or while bulk runs, straight at the engine or through velocity's gateway.
    """
    shapes: dict[str, Closed | Tools] = {
        "1 stream": Closed(CHAT, 1, 5), "50 streams": Closed(CHAT, 50, 2), "200 streams": Closed(CHAT, 200, 1),
        "short": Closed(SHORT, 1, 20), "two tools": Tools(10),
    }  # fmt: skip
    return [
        Block(named(name, window, through=through), 0.0, shape, window, prioritised=prioritised, through=through)
        for name, shape in shapes.items()
    ]


def named(name: str, window: Window | None, *, through: bool) -> str:
    """The arm of a shape of people, by what else happens."""
    return name + (" via gateway" if through else "") + (" + bulk" if window else "")


def probe() -> Plan:
    """What a step costs: decode against the number of streams, prefill against its length."""
    decode = [
        Block(f"decode {n}", 0, Closed(Sizes((16, 16), (100, 100)), n, 1)) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)
    ]
    prefill = [
        Block(f"prefill {n}", 0, Closed(Sizes((n, n), (4, 4)), 1, 5)) for n in (16, 64, 256, 512, 1024, 2048, 4096)
    ]
    short = [b for b in gpu(13.5)["stock"] if b.arm in {"A", "B", "C"}]
    return {"stock": [*decode, *prefill, *short], "velocity": []}


def tiny() -> Plan:
    """The full plan's shape in miniature, for proving the script on one CPU core."""
    chat, bulk = Sizes((10, 30), (10, 20)), Sizes((10, 20), (16, 32))
    half = OpenLoad(chat, rate=3.0, on=1.5, period=4.0)
    window = Window(bulk, 12, lead=2.0)
    arms = [
        Block("A", 8, half, prioritised=True),
        Block("B", 8, None, window, prioritised=True),
        Block("V", 8, half, window, prioritised=True, dial=DEFAULT),
        *(
            Block(named(name, bulky, through=through), 0, shape, bulky, prioritised=True, through=through)
            for name, shape in (("4 streams", Closed(chat, 4, 2)), ("two tools", Tools(6)))
            for bulky in (None, window)
            for through in (False, True)
        ),
    ]
    stock = [Block("A", 8, half), Block("B", 8, None, window), Block("C", 8, half, window)]
    return {"stock": stock, "velocity": arms}


def cpu() -> Plan:
    """A small real model on a CPU (`--model DIRECTORY`): long steps, so lonely requests half of the time."""
    chat, bulk = Sizes((40, 120), (24, 48)), Window(Sizes((40, 120), (24, 72)), 32, lead=12.0)
    half = OpenLoad(chat, rate=0.42, on=1.0, period=1.0)
    stock = [
        Block("B", 45, None, bulk),
        Block("A", 45, half),
        Block("C", 45, half, bulk),
        *(Block(f"S{n}", 45, half, Window(bulk.sizes, n, lead=12.0)) for n in (1, 2, 4)),
    ]
    velocity = [Block("B", 45, None, bulk, prioritised=True)]
    for seed in (1, 2):
        velocity += [
            Block("A", 45, half, prioritised=True, seed=seed),
            Block("V", 45, half, bulk, prioritised=True, dial=DEFAULT, seed=seed),
            Block("V strict", 45, half, bulk, prioritised=True, dial=STRICT, seed=seed),
        ]
    always = OpenLoad(chat, rate=1.5, on=1.0, period=1.0)
    velocity += [
        Block("A100", 30, always, prioritised=True),
        Block("V100", 30, always, bulk, prioritised=True, dial=DEFAULT),
    ]
    return {"stock": stock, "velocity": velocity}


PLANS = {"gpu": gpu, "cpu": cpu, "probe": probe, "tiny": tiny}
