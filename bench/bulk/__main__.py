"""Output tokens per second of a bulk job against the same requests straight at the engine, in turns, in one run.

    python -m bench.bulk                     # starts a velocity of its own, and ends it
    python -m bench.bulk --url http://127.0.0.1:8001 --key vk_… --engine-url http://127.0.0.1:8000 --worker PID

A velocity that runs already must have VELOCITY_BULK_WINDOW at --concurrency, one worker and nothing else to do.
Both arms send requests of the same lengths with prompts that were never sent before. The arms take turns: A B, B A, …
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from bench.bulk.arms import Arm, Bench
from bench.bulk.figures import line, summary
from bench.bulk.items import Sizes
from bench.bulk.stack import Stack, own_velocity

_ARMS = ("direct", "jobs")


def main() -> None:
    """Run all rounds and print what came out."""
    options = _options()
    plain = Sizes(options.items, options.tokens, options.words, options.spread)
    kinds = {"": (plain, options.rounds)}
    if options.prefixes:
        shared = replace(plain, prefixes=options.prefixes, prefix_words=options.prefix_words)
        kinds[f", {options.prefixes} shared prefixes of {options.prefix_words} words in turns"] = (
            shared, options.prefix_rounds,
        )  # fmt: skip
    with _stack(options) as stack:
        bench = Bench(stack, options.model, options.concurrency, options.direct_priority)
        for kind, (sizes, rounds) in kinds.items():
            lengths = f"{sizes.tokens} ± {sizes.spread:.0%} tokens"
            print(f"{sizes.items} items of {lengths}, {options.concurrency} in flight{kind}")
            found = asyncio.run(_rounds(bench, sizes, rounds, options.concurrency))
            print(summary(found), end="\n\n", flush=True)
        if (peak := stack.peak_memory()) is not None:
            print(f"worker: peak resident memory {peak:.0f} MiB")
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {load:.1f} at the end")


async def _rounds(bench: Bench, sizes: Sizes, rounds: int, concurrency: int) -> list[Arm]:
    """A small round to warm up, then the others, each in the reverse order of the one before."""
    found: list[Arm] = []
    for number in range(rounds + 1):
        for name in _ARMS if number % 2 else reversed(_ARMS):
            if not number:
                await bench.run(name, replace(sizes, items=min(sizes.items, concurrency), tokens=min(sizes.tokens, 4)))
                continue
            found.append(await bench.run(name, sizes))
            print(line(number, found[-1]), flush=True)
    return found


@contextmanager
def _stack(options: argparse.Namespace) -> Iterator[Stack]:
    if options.url:
        yield Stack(options.url, options.key, options.engine_url, options.worker)
        return
    print("velocity is starting …", file=sys.stderr, flush=True)
    with own_velocity(options.concurrency) as stack:
        yield stack


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="", help="a velocity that runs; by default one is started")
    parser.add_argument("--key", default="none")
    parser.add_argument("--engine-url", default="http://127.0.0.1:8000", help="with --url: see DATA/up.json")
    parser.add_argument("--worker", type=int, help="with --url: process id of its worker, to measure that too")
    parser.add_argument("--model", default="velocity-30b")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--items", type=int, default=240, help="of each arm")
    parser.add_argument("--tokens", type=int, default=32, help="output tokens of an item, on average")
    parser.add_argument("--spread", type=float, default=0.5, help="share by which items are shorter or longer")
    parser.add_argument("--words", type=int, default=24, help="of each prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefixes", type=int, default=4, help="system prompts of the second part; 0 leaves it out")
    parser.add_argument("--prefix-words", type=int, default=200)
    parser.add_argument("--prefix-rounds", type=int, default=1)
    parser.add_argument(
        "--direct-priority",
        type=int,
        default=10,
        help="of direct requests; jobs have 10, and 0 counts as people reading",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
