"""From the records of a run to the tables that people read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Record = dict[str, Any]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie, by nearest rank; NaN of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]


def summary(records: Iterable[Record]) -> dict[str, float]:
    """The figures of one arm over all its blocks: times in seconds, rates in tokens per second."""
    rows = list(records)
    streams = [s for r in rows for s in r["streams"]]
    good = [s for s in streams if not s["error"]]
    ttft = [s["ttft"] for s in good]
    gaps = [g for s in good for g in s["gaps"]]
    per_stream = [len(s["gaps"]) / sum(s["gaps"]) for s in good if sum(s["gaps"]) > 0]
    seconds = sum(r["block"]["seconds"] for r in rows)
    tokens = sum(n for r in rows for at, n in r["bulk"] if 0 <= at <= r["block"]["seconds"])
    out = {
        "requests": float(len(streams)),
        "failed": float(len(streams) - len(good)),
        "latency": sum(s["last"] - s["due"] for s in good) / len(good) if good else float("nan"),
        "per_stream": percentile(per_stream, 0.5),
        "streams_rate": _rate(good),
        "busy": _busy(rows),
        "bulk": tokens / seconds if seconds and rows[0]["block"]["window"] else float("nan"),
    }
    for name, values in (("ttft", ttft), ("itl", gaps)):
        for share in (50, 95, 99):
            out[f"{name}{share}"] = percentile(values, share / 100)
    return out


def _rate(streams: list[dict[str, Any]]) -> float:
    """Tokens per second of all streams together, from the first due time to the last token."""
    if not streams:
        return float("nan")
    span = max(s["last"] for s in streams) - min(s["due"] for s in streams)
    return float(sum(s["tokens"] for s in streams) / span)


def _busy(rows: list[Record]) -> float:
    """The share of the time in which at least one interactive request was in flight."""
    busy = seconds = 0.0
    for row in rows:
        length = row["block"]["seconds"]
        seconds += length
        busy += covered((s["due"], min(s["last"], length)) for s in row["streams"] if not s["error"])
    return busy / seconds if seconds else float("nan")


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the spans (begin, end) lasts; all begin at 0 or later."""
    total = end = 0.0
    for begin, stop in sorted(spans):
        total += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return total


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
    figures = {arm: summary(rows) for arm, rows in by_arm(records).items()}
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
        mine = summary(rows)
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
