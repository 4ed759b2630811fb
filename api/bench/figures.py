"""From records to figures: percentiles, presence, rates, and ratios with their intervals."""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

Record = dict[str, Any]
"""One block: `seconds`, `streams` (see load.Stream.compact), `bulk` as [at, output tokens, input tokens], `window`."""
Rows = Sequence[Record]

_RESAMPLES = 300
_SLICE = 5.0
"""Seconds of bulk that are drawn together: its completions come in waves."""


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie, by nearest rank; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered) - 1e-9) - 1))]


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the spans (begin, end) lasts; all begin at 0 or later."""
    total = end = 0.0
    for begin, stop in sorted(spans):
        total += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return total


def first_tokens(rows: Rows) -> list[float]:
    """Seconds to the first token; a request that got none is infinitely late."""
    return [math.inf if s["ttft"] is None else s["ttft"] for row in rows for s in row["streams"]]


def gaps(rows: Rows) -> list[float]:
    """Every gap between two tokens, in seconds."""
    return list(chain.from_iterable(s["gaps"] for row in rows for s in row["streams"]))


def busy(rows: Rows) -> float:
    """The share of the time in which at least one interactive request was in flight."""
    there = sum(
        covered((s["due"], min(s["last"], row["seconds"])) for s in row["streams"] if s["tokens"]) for row in rows
    )
    seconds = sum(row["seconds"] for row in rows)
    return float(there / seconds) if seconds else math.nan


def bulk_tokens(row: Record) -> int:
    """Output tokens of the bulk requests that were completed within the block."""
    return sum(output for at, output, _ in row["bulk"] if 0 < at <= row["seconds"])


def bulk_rate(rows: Rows) -> float:
    """The same per second; NaN where no bulk ran."""
    seconds = sum(row["seconds"] for row in rows)
    return sum(map(bulk_tokens, rows)) / seconds if seconds and any(row["window"] for row in rows) else math.nan


def wasted(rows: Rows) -> float:
    """The share of bulk work that was thrown away and done again; NaN where nobody counts it.

    Inside the engine in tokens computed, input and output; outside in seconds of requests.
    """
    counted = [row["wasted"] for row in rows if row["wasted"] is not None]
    done = sum(one["done"] for one in counted)
    lost = sum(one["lost"] for one in counted)
    return lost / (done + lost) if done + lost else math.nan


def summary(rows: Rows) -> dict[str, float]:
    """The figures of one arm over all its blocks: times in seconds, rates in tokens per second."""
    streams = [s for row in rows for s in row["streams"]]
    found = {
        "requests": float(len(streams)),
        "failed": float(sum(bool(s["error"]) for s in streams)),
        "busy": busy(rows),
        "bulk": bulk_rate(rows),
        "bulk_failed": float(sum(row["bulk_failed"] for row in rows)),
        "wasted": wasted(rows),
        "stalled": sum(lost for row in rows for _, lost in row["stalls"]),
    }
    for name, values in (("ttft", sorted(first_tokens(rows))), ("itl", sorted(gaps(rows)))):
        for share in (50, 95, 99):
            found[f"{name}{share}"] = percentile(values, share / 100)
    return found


@dataclass(frozen=True)
class Ratio:
    """A ratio and the interval in which 95 % of its resamples lie."""

    value: float
    low: float
    high: float


def ratios(mine: Rows, base: Rows, seed: int = 1) -> dict[str, Ratio]:
    """Every figure of the summary of one arm over that of another, over the rounds that both have.

    The intervals are a bootstrap: within each round the requests of both blocks are drawn with replacement, the same
    positions in both where they had the same arrivals, and so are stretches of 5 s of bulk. They say what chance in the
    requests does; what another hour of the machine would do they do not say.
    """
    rounds = {row["round"] for row in mine} & {row["round"] for row in base}
    mine, base = ([row for row in rows if row["round"] in rounds] for rows in (mine, base))
    values = _over(summary(mine), summary(base))
    rng = random.Random(seed)  # noqa: S311 - resampling, no secrets
    found: dict[str, list[float]] = {name: [] for name in values}
    for _ in range(_RESAMPLES):
        draws: dict[tuple[int, int], list[int]] = {}
        one, other = ([_resampled(row, rng, draws) for row in rows] for rows in (mine, base))
        for name, value in _over(summary(one), summary(other)).items():
            if not math.isnan(value):
                found[name].append(value)
    return {
        name: Ratio(value, percentile(found[name], 0.025), percentile(found[name], 0.975))
        for name, value in values.items()
    }


def _resampled(row: Record, rng: random.Random, draws: dict[tuple[int, int], list[int]]) -> Record:
    """A block like this one. `draws` remembers the positions drawn for a round, so that its blocks share them."""
    streams = row["streams"]
    positions = draws.setdefault((row["round"], len(streams)), rng.choices(range(len(streams)), k=len(streams)))
    return {**row, "streams": [streams[position] for position in positions], "bulk": _resampled_bulk(row, rng)}


def _resampled_bulk(row: Record, rng: random.Random) -> list[tuple[float, int, int]]:
    """The block's bulk as one figure, of slices drawn with replacement."""
    count = max(1, round(row["seconds"] / _SLICE))
    edges = [(number + 1) * row["seconds"] / count for number in range(count)]
    slices = [0] * count
    for at, output, _ in row["bulk"]:
        if 0 < at <= row["seconds"]:
            slices[min(count - 1, bisect_left(edges, at))] += output
    return [(row["seconds"], sum(rng.choices(slices, k=count)), 0)]


def _over(mine: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    return {
        name: value / base[name] if base[name] and math.isfinite(base[name]) else math.nan
        for name, value in mine.items()
    }
