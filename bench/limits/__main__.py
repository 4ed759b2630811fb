"""How fast limits are decided, how exactly, and what that adds to a request. Starts a Redis of its own and ends it.

    python -m bench.limits

Takes well under a minute. Everything runs on this machine, so the processes that ask take the cores that Redis needs:
on few cores, decisions per second say more about the clients than about Redis. Compare ratios, not machines.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from api.limits.rates import Rates
from api.redis_server import binary
from bench.limits import calls
from bench.limits.hammer import Load, Spent, excess, pairs, processes, spend

MINUTE = 60e6


@contextmanager
def own_redis() -> Iterator[str]:
    """A Redis on a unix socket, which keeps nothing; its address."""
    directory = Path(tempfile.mkdtemp(prefix="velocity-bench-redis-"))
    socket = directory / "redis.sock"
    command = [str(binary()), "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with redis.Redis(unix_socket_path=str(socket)) as client:
            _wait_for(client)
        yield f"unix://{socket}"
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(directory, ignore_errors=True)


def _wait_for(client: redis.Redis) -> None:
    for _ in range(100):
        try:
            client.ping()
        except redis.ConnectionError:
            time.sleep(0.1)
        else:
            return
    raise SystemExit("Redis did not come up within 10 s.")


def tell(what: str) -> None:
    """How far it is."""
    print(f"{what} …", file=sys.stderr, flush=True)


def speed(url: str, seconds: float) -> str:
    """Decisions per second, by how many processes ask."""
    lines = ["admitted and settled, under every limit (none reached)"]
    for number in (1, 4, 8):
        tell(f"{number} at a time admit and settle")
        load = Load(
            url, calls.NEVER_FULL, calls.NEVER_FULL, keys=("a", "b", "c", "d"), processes=number, seconds=seconds
        )
        with processes(number) as run:
            rate = sum(run(pairs, load))
        lines.append(
            f"  {number} process{'es' if number > 1 else '  '} {rate:26,.0f} pairs/s   ({2 * rate:,.0f} calls/s)"
        )
    return "\n".join(lines)


def exactness(url: str, seconds: float) -> str:
    """What 8 processes have admitted, of what the limit allows; 20 % of all calls come twice."""
    lines = ["8 processes on one limit            admitted      allowed   used  worst excess"]
    with processes(8) as run:
        tell("8 processes on one limit of requests")
        rates = Rates(rpm=6000, burst=20)
        found = run(spend, Load(url, rates, keys=("requests",), seconds=seconds))
        spent, allowed = _allowed(found, rates.rpm, rates.burst)
        over = excess([one.at for one in spent], rates.rpm, rates.burst)
        lines.append(_line("requests: 100/s, burst 20", len(spent), allowed, over))
        tell("8 processes on one limit of tokens")
        rates = Rates(tpm=300_000)
        found = run(spend, Load(url, rates, keys=("tokens",), seconds=seconds, most_cost=400))
        spent, allowed = _allowed(found, rates.tpm, rates.tpm)
        used = sum(one.tokens for one in spent)
        lines.append(_line("tokens: 5,000/s, a minute at once", used, allowed, used - allowed))
    return "\n".join(lines)


def _allowed(found: list[tuple[list[Spent], int, int]], per_minute: int, burst: int) -> tuple[list[Spent], float]:
    """All that was admitted, and what the limit allows between the first and the last question."""
    began, ended = min(each[1] for each in found), max(each[2] for each in found)
    return [one for each in found for one in each[0]], burst + per_minute * (ended - began) / MINUTE


def _line(name: str, admitted: int, allowed: float, over: float) -> str:
    return f"  {name:33} {admitted:8,d} {allowed:12,.1f} {admitted / allowed:6.3f} {max(0.0, over):13.1f}"


def latency(url: str, turns: int) -> str:
    """What the one call adds."""
    tell("one call against a PING, in turns")
    parts = [
        calls.table("a plain client", calls.blocking(url, turns)),
        calls.table("the api's client (asyncio)", calls.as_the_api_does(url, turns)),
    ]
    tell("the same inside Redis")
    inside = calls.inside_redis(url, turns)
    parts.append("\n".join(["inside Redis, mean", *(f"  {name:32} {us:6.1f}µs" for name, us in inside.items())]))
    return "\n\n".join(parts)


def main() -> None:
    """Run all of it and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load (five of them)")
    parser.add_argument("--turns", type=int, default=3000, help="of every kind of call")
    options = parser.parse_args()
    with own_redis() as url:
        with redis.Redis.from_url(url) as client:
            version = client.info("server")["redis_version"]
        tables = [latency(url, options.turns), exactness(url, options.seconds), speed(url, options.seconds)]
    load = os.getloadavg()[0]
    print(f"Redis {version} and all that asks it on {os.cpu_count()} cores (load {load:.1f} at the end)\n")
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
