"""`python -m bench.gpu.equality --model DIR`: the co-serving scheduler changes when tokens are computed, never which.

Sends the same greedy requests to a stock server, one at a time, and to a velocity server all at once: bulk under a
churn of interactive arrivals, with so few seats and KV blocks that requests are parked and preempted. Every answer must
be the same text. In float32, because in bf16 the composition of a batch alone can move an argmax, in stock vLLM too.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp

from bench.gpu.blocks import BULK, INTERACTIVE
from bench.gpu.server import Server
from engine.ports import free_port

FLAGS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8"]
FLAGS += ["--max-num-batched-tokens", "256"]


def requests(count: int, interactive: bool) -> list[dict[str, object]]:
    """Greedy chat requests; the same ones every time."""
    rng = random.Random(11 + interactive)
    return [
        {
            "model": "bench",
            "messages": [{"role": "user", "content": " ".join(f"w{rng.randint(4, 3900)}" for _ in range(24))}],
            "max_tokens": rng.randint(12, 24) if interactive else rng.randint(40, 90),
            "temperature": 0.0,
            "ignore_eos": True,
        }
        for _ in range(count)
    ]


async def _ask(session: aiohttp.ClientSession, url: str, body: dict[str, object]) -> str:
    async with session.post(f"{url}/v1/chat/completions", json=body) as reply:
        answer = await reply.json()
        return str(answer["choices"][0]["message"]["content"]) if reply.status == 200 else f"failed: {answer}"


async def one_by_one(url: str, bodies: list[dict[str, object]]) -> list[str]:
    """The reference: every request alone."""
    async with aiohttp.ClientSession() as session:
        return [await _ask(session, url, body) for body in bodies]


async def together(
    url: str, bulk: list[dict[str, object]], people: list[dict[str, object]]
) -> tuple[list[str], list[tuple[int, str]]]:
    """All bulk at once, and two people who ask one thing after the other until bulk is done, again from the start.

    Returns bulk's answers, and people's with the positions of what they asked.
    """
    rng = random.Random(3)
    asked = itertools.count()
    timeout = aiohttp.ClientTimeout(total=900)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        batch = asyncio.gather(*(_ask(session, url, body | {"priority": BULK}) for body in bulk))

        async def person() -> list[tuple[int, str]]:
            answers: list[tuple[int, str]] = []
            while not batch.done():
                await asyncio.sleep(rng.uniform(0, 0.1))
                which = next(asked) % len(people)
                answers.append((which, await _ask(session, url, people[which] | {"priority": INTERACTIVE})))
            return answers

        chats = await asyncio.gather(person(), person())
        return list(await batch), [answer for answers in chats for answer in answers]


def compare(model: Path, out: Path, *, count: int, flags: list[str], dummy: bool = False) -> dict[str, Any]:
    """Asks both servers; returns the pairs of answers (stock, velocity), and the scheduler's report at the end."""
    bulk, people = requests(count, False), requests(count, True)
    servers = [
        Server(kind, model, out, port=free_port(), extra=FLAGS + flags, dummy=dummy) for kind in ("stock", "velocity")
    ]
    stock, velocity = servers
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda server: server.start(400.0), servers))
        alone = asyncio.run(one_by_one(stock.url, [*bulk, *people]))
        batch, chats = asyncio.run(together(velocity.url, bulk, people))
        time.sleep(1.5)
        report = json.loads((out / "control" / "status.json").read_text(encoding="utf-8"))
    finally:
        for server in servers:
            server.stop()
    pairs = list(zip(alone[: len(bulk)], batch, strict=True))
    return {"pairs": [*pairs, *((alone[len(bulk) + which], text) for which, text in chats)], "report": report}


def main() -> int:
    """Returns 0 when every answer was the same."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.equality", description=__doc__)
    parser.add_argument("--model", required=True, help="a model directory with weights")
    parser.add_argument("--out", default="build/bench-equality")
    parser.add_argument("--flag", action="append", default=[], help="one more word for vLLM's command line")
    parser.add_argument("--count", type=int, default=24, help="bulk requests, and interactive ones")
    args = parser.parse_args()
    found = compare(Path(args.model), Path(args.out), count=args.count, flags=args.flag)
    report, different = found["report"], [pair for pair in found["pairs"] if pair[0] != pair[1]]
    print(f"{len(found['pairs']) - len(different)} of {len(found['pairs'])} answers the same")
    print(f"preemptions {report['preemptions']}, steps {report['steps']}, batch {report['batch_sequence_steps']}")
    for stock, velocity in different:
        print(f"--- stock\n{stock}\n--- velocity\n{velocity}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
