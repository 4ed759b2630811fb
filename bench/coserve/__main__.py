"""`make bench-coserve`: two real engines on this machine, one with velocity's scheduler and one with vLLM's own.

    python -m bench.coserve                  # everything: about 45 minutes on two cores
    python -m bench.coserve --quick          # people half of the time: about 12 minutes
    python -m bench.coserve --arms A,B,V --duty 10,100 --rounds 3

Each engine has a velocity of its own, and only one gets load at a time. `bench/coserve/plan.py` names the arms. Blocks
take turns, each round in the reverse order of the one before; people come at the same moments in all arms of a round,
and no prompt is ever repeated. Records, tables and the picture are written to --out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from api.bench.blocks import BlockRunner, Shape, Target
from api.bench.calibrate import BULK, DUTIES
from api.bench.canary import Canary
from api.bench.figures import Record
from api.bench.plot import plot
from api.bench.run import Run, machine
from api.bench.tables import markdown
from bench.coserve.installations import installed
from bench.coserve.plan import ARMS, QUICK, arms, chosen
from engine.errors import VelocityError


def main() -> int:
    """Returns 0 when every block ran."""
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _bench(options)
    except KeyboardInterrupt:
        _say("stopped")
        return 1
    except (VelocityError, httpx.TransportError) as error:
        _say(f"The benchmark broke off: {str(error) or type(error).__name__} Logs: {options.out}")
        return 1
    return 0


def _bench(options: argparse.Namespace) -> None:
    """Start, measure, report what there is, also after a fault or a signal, and end everything."""
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    names = (options.arms or ",".join(QUICK if options.quick else ARMS)).split(",")
    plan = chosen(arms(options.window, options.naive or 2 * options.window, options.caps), names, options.duty)
    kinds = sorted({arm.target for found in plan.values() for arm in found}, reverse=True)
    about = machine() | {
        "window": options.window,
        "seed": options.seed,
        "command": " ".join(sys.argv[1:]) or "(no options)",
    }
    records: list[Record] = []
    with (
        (options.out / "records.jsonl").open("w", encoding="utf-8") as lines,
        installed(kinds, options.out, window=options.window, kv_gib=options.kv_gib, say=_say) as targets,
    ):

        def keep(record: Record) -> None:
            records.append(record)
            lines.write(json.dumps(record) + "\n")
            lines.flush()

        about["load when the engines were up"] = machine()["load"]
        try:
            asyncio.run(_measure(options, plan, targets, keep))
        finally:
            _report(records, about, options.out)
    _say(f"{(time.monotonic() - began) / 60:.1f} minutes in all; records, logs, tables and the picture: {options.out}")


async def _measure(
    options: argparse.Namespace, plan: dict[str, Any], targets: dict[str, Target], keep: Callable[[Record], None]
) -> None:
    with Canary() as canary:
        runner = BlockRunner(Shape(options.seconds, options.lead, BULK), canary, time.time_ns() // 10**9 % 10**6)
        duties = [DUTIES[name] for name in options.duty]
        run = Run(runner, targets, plan, duties, options.seconds, options.rounds, options.seed, _say, keep)
        await run.run()


def _report(records: list[Record], about: dict[str, Any], out: Path) -> None:
    if not any(record["streams"] for record in records):
        return
    text = markdown(records, about)
    (out / "table.md").write_text(text, encoding="utf-8")
    plot(records, out / "plot.png")
    print(text, flush=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.coserve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="people half of the time only, short blocks, one fixed window")
    add("--rounds", type=int, default=2)
    add("--seconds", type=float, help="of a block (default: 45; quick: 30)")
    add("--lead", type=float, default=20.0, help="seconds of bulk before a block counts")
    add("--arms", default="", help=f"comma-separated, of: {', '.join(ARMS)}; S is all fixed windows")
    add("--duty", type=_names, help=f"comma-separated, of: {', '.join(DUTIES)} (default: all; quick: 50)")
    add("--caps", type=_numbers, help="fixed windows (default: 1,2,4,8; quick: 2)")
    add(
        "--window",
        type=int,
        default=64,
        help="bulk requests in flight in B, V and O: as many as the engine has seats",
    )
    add(
        "--naive",
        type=int,
        help="bulk requests in flight in C (default: twice --window)",
    )
    add("--kv-gib", type=int, default=1, help="KV cache of each engine")
    add("--seed", type=int, default=1, help="changes when people come")
    add("--out", type=Path, default=Path("build/bench-coserve"))
    options = parser.parse_args()
    options.seconds = options.seconds or (30.0 if options.quick else 45.0)
    options.duty = options.duty or (["50"] if options.quick else list(DUTIES))
    options.caps = options.caps or ([2] if options.quick else [1, 2, 4, 8])
    return options


def _names(text: str) -> list[str]:
    found = text.split(",")
    if unknown := set(found) - set(DUTIES):
        raise argparse.ArgumentTypeError(f"there is no {', '.join(sorted(unknown))}")
    return found


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
