"""What long prompts cost: each step that a body goes through, and how long other people's streams wait meanwhile.

    python -m bench.long_prompts [--megabytes 1] [--posts 10] [--at-a-time 1 4] [--out DIR]

The streams come from the synthetic engine of bench/gateway, with the time in every token, through one `velocity api`
on a core of its own. A token that is written while the event loop is busy waits, so the longest transit shows for how
long it was.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from api import shape
from api.keys import ANYONE
from api.request_caps import check_caps, check_depth, check_reach, input_tokens
from api.settings import ApiSettings
from bench.gateway.arms import Arm, Site, running
from bench.gateway.native import MODEL, Ask, Load, compiled, running_engine
from bench.gateway.processes import Cores, pinned
from engine.client import Endpoint, Model

_REPEATS = 20
_STREAMS, _RATE = 4, 250
"""Streams that are watched, and tokens per second of each: one looks every millisecond at the event loop."""
_IDLE_SECONDS = 3.0
_CODE = 'export function Card({ title }: Props) {\n\treturn <p className="price">{`${title}: 5 €`}</p>;\n}\n'


def conversation(size: int) -> bytes:
    """An agent's request of about so many bytes: tools, calls with JSON in JSON, and files full of escapes."""
    schema = {"type": "object", "properties": {f"p{n}": {"type": "string", "description": "x" * 60} for n in range(12)}}
    tools = [
        {"type": "function", "function": {"name": f"tool_{n}", "description": "Does it. " * 20, "parameters": schema}}
        for n in range(20)
    ]
    messages: list[dict[str, Any]] = [{"role": "system", "content": "You change pages as you are told. " * 200}]
    body = {"model": MODEL, "tools": tools, "max_tokens": 1, "messages": messages}
    turn = 0
    left = size - len(orjson.dumps(body))
    while left > 0:
        turn += 1
        file = f"{turn}.tsx\n" + _CODE * (20 + turn % 7 * 10)
        call = {"name": f"tool_{turn % 20}", "arguments": json.dumps({"path": f"{turn}.tsx", "text": _CODE * 5})}
        calls = [{"id": f"call_{turn}", "type": "function", "function": call}]
        new: list[dict[str, Any]] = [
            {"role": "user", "content": [{"type": "text", "text": f"Change {turn}.tsx."}]},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": f"call_{turn}", "content": file},
        ]
        messages += new
        left -= len(orjson.dumps(new))
    return orjson.dumps(body)


def steps(body: bytes) -> dict[str, float]:
    """Milliseconds of each step on the event loop, the median of several."""
    settings, model = ApiSettings(), Model(MODEL, "/m", None)
    content = orjson.loads(body)
    reads = [body[start : start + 256_000] for start in range(0, len(body), 256_000)]

    def gathered() -> bytes:  # as uvicorn and then `read_body` do it, when the socket is read faster than the body
        parts = bytearray()
        for read in reads:
            parts += bytes(memoryview(read))
        return b"".join([bytes(parts)])

    def whole() -> None:
        shape.interactive(Endpoint.CHAT, shape.parse(body), model, ANYONE, settings, len(body))

    timed: dict[str, Callable[[], object]] = {
        "body gathered": gathered,
        "orjson.loads": lambda: orjson.loads(body),
        "check_depth": lambda: check_depth(content),
        "check_caps": lambda: check_caps(content, settings),
        "check_reach": lambda: check_reach(content),
        "input_tokens": lambda: input_tokens(content, len(body)),
        "orjson.dumps": lambda: orjson.dumps(content),
        "parse to EngineRequest": whole,
    }
    return {name: _milliseconds(step) for name, step in timed.items()}


def _milliseconds(step: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        step()
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


def posted(arm: Arm, body: bytes, posts: int, at_a_time: int) -> list[float]:
    """Milliseconds of each of these posts, so many at a time. Raises SystemExit for an answer that is not 200."""
    times: list[float] = []

    def person() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", arm.port, timeout=60)
        for _ in range(posts):
            began = time.perf_counter()
            headers = {"authorization": f"Bearer {arm.key}", "content-type": "application/json"}
            connection.request("POST", "/v1/chat/completions", body, headers)
            answer = connection.getresponse()
            said = answer.read()
            if answer.status != 200:
                raise SystemExit(f"{answer.status}: {said[:500]!r}")
            times.append((time.perf_counter() - began) * 1000)
        connection.close()

    people = [threading.Thread(target=person) for _ in range(at_a_time)]
    for thread in people:
        thread.start()
    for thread in people:
        thread.join()
    return times


def watched(load: Load, arm: Arm, meanwhile: Callable[[], object]) -> dict[str, float]:
    """Transit of the watched streams' tokens in milliseconds while that is done: of seconds, the worst."""
    done = threading.Event()
    found: dict[str, float] = {}

    def watch() -> None:
        while not done.is_set():
            ask = Ask(_RATE, rate=_RATE).request(arm.key)
            said = load.run("stream", arm.port, ask, connections=_STREAMS, rounds=1, expect=_RATE)["transit"]
            for name in ("p50", "p99", "max"):
                found[name] = max(found.get(name, 0.0), said[name] / 1e6)

    watching = threading.Thread(target=watch)
    watching.start()
    time.sleep(0.3)
    meanwhile()
    done.set()
    watching.join()
    return found


def _report(load: Load, arm: Arm, way: Arm, body: bytes, posts: int, at_a_time: int) -> None:
    times: list[float] = []
    seen = watched(load, arm, lambda: times.extend(posted(way, body, posts, at_a_time)))
    print(
        f"  {posts} posts to {way.name}, {at_a_time} at a time: {_text(seen)}; "
        f"a post takes {statistics.median(times):.1f}, at most {max(times):.1f}"
    )


def _text(seen: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.2f}" for name, value in seen.items())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=1.0)
    parser.add_argument("--posts", type=int, default=10)
    parser.add_argument("--at-a-time", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "velocity-long-prompts")
    options = parser.parse_args()
    body = conversation(round(options.megabytes * 1e6))
    cores = Cores.of_this_machine()
    print(f"{len(body):,} bytes. On the event loop, in ms:")
    for name, milliseconds in steps(body).items():
        print(f"  {name:<24}{milliseconds:8.2f}")
    programs = compiled(options.out)
    with (
        pinned(cores.others),
        running_engine(programs, cores.others) as engine,
        running(["velocity"], Site(engine, cores, options.out), print) as [arm],
    ):
        load = Load(programs, cores.others, options.out)
        print(f"Transit of {_STREAMS} streams' tokens, in ms{'' if cores.apart else ' (on one core with all else)'}:")
        idle = watched(load, arm, lambda: time.sleep(_IDLE_SECONDS))
        print(f"  no posts: {_text(idle)}")
        for way in (Arm("direct", engine.port), arm):  # the first shows what the posts do to the other cores
            for count in options.at_a_time:
                _report(load, arm, way, body, options.posts, count)


if __name__ == "__main__":
    main()
