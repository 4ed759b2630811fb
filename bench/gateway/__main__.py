"""`make bench-gateway`: what velocity's api process costs beside nginx, vllm-router, a plain proxy and none at all.

    python -m bench.gateway                          # everything: about 15 minutes
    python -m bench.gateway --quick                  # one round of short blocks: under 3 minutes
    python -m bench.gateway --arms direct,nginx,velocity --modes paced-50x132,short-32 --rounds 5
    python -m bench.gateway --paced 1000x20          # so many streams at so many tokens/s each, and no other load
    python -m bench.gateway --tokens 100000000       # through velocity: is any lost, doubled or out of order?

A synthetic engine in vLLM's wire format writes the time into every token; a load generator checks each and reads it.
The proxy has the first core to itself; engine, load generator and Redis share the others. Arms take turns. vllm-router
is left out unless it is installed: .venv/bin/pip install 'vllm-router>=0.1.17' (the extra `bench-gateway`).
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from api.bench.canary import Canary
from api.bench.run import machine
from bench.gateway.arms import ARMS, Arm, Site, running
from bench.gateway.blocks import MODES, BlockRunner, Mode, paced
from bench.gateway.figures import Record, faults, per_request, per_token
from bench.gateway.native import Load, compiled, running_engine
from bench.gateway.pictures import plot
from bench.gateway.processes import Cores, pinned
from bench.gateway.tables import markdown
from engine.errors import VelocityError

_LONG = 15.0
"""Seconds of a stream of --paced."""
_SATURATED = next(mode for mode in MODES if mode.name == "saturated")


def main() -> int:
    """Returns 0 when every block ran, and in an integrity run if nothing was wrong."""
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _integrity(options) if options.tokens else _bench(options)
    except KeyboardInterrupt:
        _say("stopped")
    except VelocityError as error:
        _say(f"The benchmark broke off: {error} Logs: {options.out}")
    return 1


@contextmanager
def _ready(options: argparse.Namespace) -> Iterator[tuple[BlockRunner, list[Arm], Cores]]:
    """Everything is up and warm; this process itself stays away from the proxy's core."""
    options.out.mkdir(parents=True, exist_ok=True)
    cores = Cores.of_this_machine()
    if not cores.apart:
        _say("There is one core: proxy, engine and load share it, and times say little.")
    programs = compiled(options.out)
    with pinned(cores.others), Canary() as canary, running_engine(programs, cores.others) as engine:
        site = Site(engine, cores, options.out)
        with running(options.arms, site, _say) as arms:
            runner = BlockRunner(Load(programs, cores.others, options.out), engine, canary)
            for arm in arms:
                runner.warm(arm)
            _say(f"{', '.join(arm.name for arm in arms)} are up")
            yield runner, arms, cores


def _bench(options: argparse.Namespace) -> int:
    """Measure, and report what there is, also after a fault or a signal."""
    records: list[Record] = []
    notes: list[str] = []
    about = machine() | {"command": " ".join(sys.argv[1:]) or "(no options)"}
    with _ready(options) as (runner, arms, cores):
        about["proxy on core"] = f"{min(cores.proxy)}, all else on {', '.join(map(str, sorted(cores.others)))}"
        try:
            _rounds(options, runner, arms, records, notes)
        finally:
            _report(records, options, about, notes)
    return 0


def _rounds(
    options: argparse.Namespace, runner: BlockRunner, arms: list[Arm], records: list[Record], notes: list[str]
) -> None:
    began, done = time.monotonic(), 0
    total = options.rounds * len(options.modes) * len(arms)
    with (options.out / "records.jsonl").open("w", encoding="utf-8") as lines:
        for number in range(1, options.rounds + 1):
            for mode in options.modes:
                for arm in arms if number % 2 else arms[::-1]:
                    done += 1
                    if note := _too_much(mode, arm, records):
                        if note not in notes:
                            notes.append(note)
                        continue
                    record = runner.run(mode, arm, options.seconds) | {"round": number}
                    records.append(record)
                    lines.write(json.dumps(record) + "\n")
                    lines.flush()
                    left = (time.monotonic() - began) / done * (total - done)
                    _say(f"[{done}/{total}] round {number}, {_told(record)}; {left / 60:.1f} min left")


def _too_much(mode: Mode, arm: Arm, records: list[Record]) -> str:
    """Why an arm can't bear a pace. A token costs less where more come at a time, but hardly less than half."""
    lower = [row for row in records if row["arm"] == arm.name and 0 < row["pace"] < mode.pace and row["tokens"]]
    cores = max((row["steady_cpu"] / row["steady_tokens"] / 1e9 * mode.pace for row in lower), default=0.0)
    return f"{arm.name} is left out of {mode.name}, for which it would need {cores:.1f} cores." if cores > 2 else ""


def _told(record: Record) -> str:
    wrong = ", ".join(f"{count} {name}" for name, count in faults([record]).items() if count)
    streams = bool(record["tokens"])
    each, count = ("token", record["tokens"]) if streams else ("request", record["requests"])
    cost = (per_token if streams else per_request)([record]) / 1e3
    return f"{record['mode']}, {record['arm']}: {count:,} {each}s, {cost:.2f} µs per {each}" + (
        f", FAULTS: {wrong}" if wrong else ""
    )


def _integrity(options: argparse.Namespace) -> int:
    """So many tokens through velocity, as fast as it can."""
    options.arms = ["velocity"]
    with _ready(options) as (runner, [arm], _):
        record = runner.run(_SATURATED, arm, options.seconds, options.tokens) | {"round": 1}
    wrong = {name: count for name, count in faults([record]).items() if count}
    (options.out / "integrity.json").write_text(json.dumps(record), encoding="utf-8")
    print(
        f"{record['tokens']:,} tokens of {record['answers']:,} streams in {record['seconds']:,.0f} s "
        f"({record['tokens'] / record['seconds']:,.0f}/s): "
        + (", ".join(f"{count} {name}" for name, count in wrong.items()) or "none lost, doubled or out of order")
        + (f"; the first error: {record['first_error']}" if record["first_error"] else ""),
        flush=True,
    )
    return bool(wrong)


def _report(records: list[Record], options: argparse.Namespace, about: dict[str, object], notes: list[str]) -> None:
    if not records:
        return
    text = markdown(records, options.modes, about, notes)
    (options.out / "table.md").write_text(text, encoding="utf-8")
    plot(records, options.modes, options.out / "plot.png")
    print(text, flush=True)
    _say(f"records, logs, tables and the picture: {options.out}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gateway", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, modes = parser.add_argument, {mode.name: mode for mode in MODES}
    add("--quick", action="store_true", help="one round, short blocks")
    add("--rounds", type=int, help="(default: 3; quick: 1)")
    add("--seconds", type=float, help="in which streams of a block begin (default: 8; quick: 4.5)")
    add("--arms", default=",".join(ARMS), help=f"comma-separated, of: {', '.join(ARMS)}")
    add("--modes", default=",".join(modes), help=f"comma-separated, of: {', '.join(modes)}")
    add("--paced", action="append", type=_paced, help="STREAMSxRATE instead of --modes; several times for several")
    add("--tokens", type=int, default=0, help="an integrity run: so many tokens through velocity")
    add("--out", type=Path, default=Path("build/bench-gateway"))
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.seconds = options.seconds or (4.5 if options.quick else 8.0)
    options.arms, names = options.arms.split(","), options.modes.split(",")
    if unknown := [name for name in (*options.arms, *names) if name not in {*ARMS, *modes}]:
        parser.error(f"there is no {', '.join(unknown)}")
    options.modes = options.paced or [modes[name] for name in names]
    return options


def _paced(text: str) -> Mode:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 1000x20")
    return paced(int(found[1]), int(found[2]), _LONG)


if __name__ == "__main__":
    sys.exit(main())
