"""A run as Markdown."""

from __future__ import annotations

import math
from typing import Any

from api.bench.figures import Rows, ratios, summary
from api.bench.verdicts import Blocks, shown, verdicts

_METHOD = """\
Ratios are to A, the same people without bulk, and for bulk tokens to B, bulk alone, in the same rounds; in brackets the
interval of 95 % of 300 resamples: within each round the requests of both blocks are drawn with replacement, the same
positions in both where they had the same arrivals, and so are stretches of 5 s of bulk. It says what chance in the
requests does, not what another hour of the machine would do. TTFT counts from the moment a request was due; a request
that failed before its first token counts as infinitely late. ITL is the gap between two pieces of text. Bulk counts
output tokens of requests completed within the block. Presence is the share of the time with somebody there."""
_HEAD = (
    "| arm | n (failed) | presence | TTFT s p50/p95/p99 | ITL ms p50/p95/p99 | bulk tok/s | bulk failed | wasted | "
    "stood still s |\n|---|---|---|---|---|---|---|---|---|"
)
_RATIO_HEAD = (
    "| arm | TTFT p50 × A | TTFT p95 × A | TTFT p99 × A | ITL p50 × A | ITL p95 × A | ITL p99 × A | bulk × B |\n"
    "|---|---|---|---|---|---|---|---|"
)
_FIGURES = ("ttft50", "ttft95", "ttft99", "itl50", "itl95", "itl99")
_TITLES = {
    "10": "People about a tenth of the time",
    "50": "People about half of the time",
    "bursts": "People in bursts, about half of the time",
    "100": "Somebody always there",
}


def markdown(records: Rows, about: dict[str, Any]) -> str:
    """All tables, the bars, and what ran. `about` is what `run.machine` says, and whatever else is worth telling."""
    blocks = Blocks(records)
    parts = [_about(records, about)]
    for duty in blocks.duties:
        present = [arm for arm in blocks.arms if blocks.of(arm, duty)]
        parts.append(f"## {_TITLES.get(duty, duty)}")
        parts.append("\n".join([_HEAD, *(_row(arm, blocks.of(arm, duty)) for arm in present)]))
        base, bulk = blocks.of("A", duty), blocks.of("B", duty)
        compared = [_ratio_row(arm, blocks.of(arm, duty), base, bulk) for arm in present if arm not in {"A", "B"}]
        if base and compared:
            parts.append("\n".join([_RATIO_HEAD, *compared]))
    lines = [f"| {one.bar} | {one.measured} | {one.word} |" for one in verdicts(records)]
    parts += ["## Bars", "\n".join(["| bar | measured | |", "|---|---|---|", *lines]), _METHOD]
    return "\n\n".join(parts) + "\n"


def _about(records: Rows, about: dict[str, Any]) -> str:
    facts = {name: value for name, value in about.items() if name != "versions"}
    told = "; ".join(f"{name} {value}" for name, value in facts.items())
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    rounds = len({row["round"] for row in records})
    seconds = sum(row["seconds"] for row in records)
    lost = sum(took for row in records for _, took in row["stalls"])
    return (
        f"{told}\n{versions}\n{len(records)} blocks in {rounds} rounds, {seconds:.0f} s counted, of which the machine "
        f"stood still for {lost:.1f} s (spells of more than 50 ms)."
    )


def _row(arm: str, rows: Rows) -> str:
    mine = summary(rows)
    cells = [
        arm,
        f"{mine['requests']:.0f} ({mine['failed']:.0f})",
        _number(mine["busy"] if mine["requests"] else math.nan, 2),
        " / ".join(_number(mine[name], 3) for name in _FIGURES[:3]),
        " / ".join(_number(mine[name] * 1000, 0) for name in _FIGURES[3:]),
        _number(mine["bulk"], 0),
        _number(mine["bulk_failed"] if rows[0]["window"] else math.nan, 0),
        _number(mine["wasted"] * 100, 2, " %"),
        _number(mine["stalled"], 1),
    ]
    return "| " + " | ".join(cells) + " |"


def _ratio_row(arm: str, mine: Rows, alone: Rows, bulk: Rows) -> str:
    people = ratios(mine, alone)
    cells = [arm, *(shown(people[name]) for name in _FIGURES)]
    cells.append(shown(ratios(mine, bulk)["bulk"]) if bulk else "–")
    return "| " + " | ".join(cells) + " |"


def _number(value: float, digits: int, unit: str = "") -> str:
    if math.isnan(value):
        return "–"
    return "never" if math.isinf(value) else f"{value:.{digits}f}{unit}"
