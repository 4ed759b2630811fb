"""From the records of a run to the tables that people read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from api.bench.figures import Record, percentile, summary


def figures_of(records: Iterable[Record]) -> dict[str, float]:
    """The figures of one arm over all its blocks, and what one person sees at a given number of streams."""
    rows = list(records)
    good = [s for row in rows for s in row["streams"] if not s["error"]]
    per_stream = [len(s["gaps"]) / sum(s["gaps"]) for s in good if sum(s["gaps"]) > 0]
    return summary(rows) | {
        "latency": sum(s["last"] - s["due"] for s in good) / len(good) if good else float("nan"),
        "per_stream": percentile(per_stream, 0.5),
        "streams_rate": _rate(good),
    }


def _rate(streams: list[dict[str, Any]]) -> float:
    """Tokens per second of all streams together, from the first due time to the last token."""
    if not streams:
        return float("nan")
    span = max(s["last"] for s in streams) - min(s["due"] for s in streams)
    return float(sum(s["tokens"] for s in streams) / span)


def by_arm(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Groups records by server and arm, in the order of their first appearance."""
    arms: dict[str, list[Record]] = {}
    for record in records:
        arms.setdefault(f"{record['server']}/{record['arm']}", []).append(record)
    return arms


def table(records: Iterable[Record], baselines: dict[str, tuple[str, str]]) -> str:
    """A Markdown table: absolute figures, and ratios to the arm's interactive and bulk baselines.

    `baselines` maps an arm to (interactive alone, bulk alone), each named as `by_arm` names them.
    """
    figures = {arm: figures_of(rows) for arm, rows in by_arm(records).items()}
    lines = [
        "| arm | n (failed) | busy | TTFT ms p50/p95/p99 | × A | ITL ms p50/p95/p99 | × A | bulk tok/s | × B |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, mine in figures.items():
        alone, bulk_alone = (figures.get(name) for name in baselines.get(arm, ("", "")))
        lines.append(
            f"| {arm} | {mine['requests']:.0f} ({mine['failed']:.0f}) | {_show(mine['busy'], 1, 2)} "
            f"| {_three(mine, 'ttft')} | {_ratios(mine, alone, 'ttft')} "
            f"| {_three(mine, 'itl')} | {_ratios(mine, alone, 'itl')} "
            f"| {_show(mine['bulk'], 1, 0)} | {_show(_over(mine, bulk_alone, 'bulk'), 1, 2) if bulk_alone else '–'} |"
        )
    return "\n".join(lines)


def stream_table(records: Iterable[Record]) -> str:
    """A Markdown table of the closed-loop arms: what one person sees at a given number of streams."""
    lines = [
        "| arm | requests (failed) | TTFT ms p50/p95/p99 | mean latency ms | tok/s per stream | tok/s together |",
        "|---|---|---|---|---|---|",
    ]
    for arm, rows in by_arm(records).items():
        mine = figures_of(rows)
        lines.append(
            f"| {arm} | {mine['requests']:.0f} ({mine['failed']:.0f}) | {_three(mine, 'ttft')} "
            f"| {_show(mine['latency'], 1000, 0)} | {_show(mine['per_stream'], 1, 1)} "
            f"| {_show(mine['streams_rate'], 1, 0)} |"
        )
    return "\n".join(lines)


def _three(mine: dict[str, float], name: str) -> str:
    return " / ".join(_show(mine[f"{name}{share}"], 1000, 1) for share in (50, 95, 99))


def _ratios(mine: dict[str, float], alone: dict[str, float] | None, name: str) -> str:
    if alone is None:
        return "–"
    return " / ".join(_show(_over(mine, alone, f"{name}{share}"), 1, 2) for share in (50, 95, 99))


def _over(mine: dict[str, float], base: dict[str, float], name: str) -> float:
    return mine[name] / base[name] if base[name] else float("nan")


def _show(value: float, scale: float, digits: int) -> str:
    return "–" if value != value else f"{value * scale:.{digits}f}"  # noqa: PLR0124 - NaN is the one that differs
