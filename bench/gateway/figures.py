"""From blocks to figures: quantiles, what is added to no proxy at all, ratios with their intervals."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from api.bench.figures import Ratio, percentile

Record = dict[str, Any]
"""One block. Times in ns; distributions as [[ns, count], …] in order."""
Rows = Sequence[Record]

KINDS = ("transit", "first", "first_transit")
_AFTER = 0.1
"""Seconds after the machine stood still in which what had piled up is still coming."""
_RESAMPLES = 1000


def kept(report: Record, record: Record) -> Record:
    """A block's record from the load's report, without the samples of spells in which the machine stood still."""
    width = report["slice_ns"] / 1e9
    counts: dict[str, Counter[int]] = {kind: Counter() for kind in KINDS}
    left_out = 0
    for piece in report["slices"]:
        begin = piece["slice"] * width
        still = any(begin < at + lost + _AFTER and at < begin + width for at, lost in record["stalls"])
        for kind in KINDS:
            if still:
                left_out += sum(count for _, count in piece[kind])
            else:
                counts[kind].update(dict(piece[kind]))
    whole = {name: value for name, value in report.items() if name not in {"slices", *KINDS}}
    return whole | record | {"left_out": left_out} | {kind: sorted(found.items()) for kind, found in counts.items()}


def quantile(buckets: Sequence[Sequence[int]], share: float) -> float:
    """ns below which a share (0 to 1) of the samples lie; NaN of nothing."""
    rank, seen = math.ceil(share * sum(count for _, count in buckets) - 1e-9), 0
    for ns, count in buckets:
        seen += count
        if seen >= rank:
            return float(ns)
    return math.nan


def per_token(rows: Rows) -> float:
    """ns of the proxy's processor time, while all streams were there."""
    return _over(sum(row["steady_cpu"] for row in rows), sum(row["steady_tokens"] for row in rows))


def steady(samples: Sequence[tuple[int, int]], report: Record, begin: float, end: float) -> Record | None:
    """Processor time, tokens and seconds between two of the samples (when, processor time; both in ns).

    The first from `begin` on, the last until `end`, in seconds of the block. None if there are no two.
    """
    inside = [(at, cpu) for at, cpu in samples if begin * 1e9 <= at - report["began"] <= end * 1e9]
    if len(inside) < 2:
        return None
    (first, before), (last, after) = inside[0], inside[-1]
    width, tokens = report["slice_ns"], 0.0
    for piece in report["slices"]:
        start = report["began"] + piece["slice"] * width
        tokens += piece["tokens"] * max(0, min(last, start + width) - max(first, start)) / width
    return {"steady_cpu": after - before, "steady_tokens": tokens, "steady_seconds": (last - first) / 1e9}


def per_request(rows: Rows) -> float:
    """The same for one request."""
    return _over(sum(row["cpu"] for row in rows), sum(row["requests"] for row in rows))


def redis_per_request(rows: Rows) -> float:
    """ns of Redis's processor time."""
    return _over(sum(row["redis_cpu"] for row in rows), sum(row["requests"] for row in rows))


def token_rate(rows: Rows) -> float:
    """Tokens per second while all streams were there."""
    return _over(sum(row["steady_tokens"] for row in rows), sum(row["steady_seconds"] for row in rows))


def answer_rate(rows: Rows) -> float:
    """Answers per second."""
    return _over(sum(row["answers"] for row in rows), sum(row["seconds"] for row in rows))


def busy(rows: Rows) -> float:
    """The part of a core that the proxy took while all streams were there."""
    return _over(sum(row["steady_cpu"] for row in rows), sum(row["steady_seconds"] for row in rows) * 1e9)


def typical(rows: Rows, kind: str, share: float) -> float:
    """A quantile in ns: the median over the rounds."""
    found = [value for row in rows if not math.isnan(value := quantile(row[kind], share))]
    return median(found) if found else math.nan


def added(rows: Rows, direct: Rows, kind: str, share: float) -> float:
    """What a quantile has more than without a proxy in the same round, in ns: the median over the rounds."""
    base = {row["round"]: quantile(row[kind], share) for row in direct}
    found = [quantile(row[kind], share) - base[row["round"]] for row in rows if row["round"] in base]
    found = [value for value in found if not math.isnan(value)]
    return median(found) if found else math.nan


def ratio(mine: Rows, base: Rows, figure: Callable[[Rows], float]) -> Ratio:
    """One figure over the other arm's, over the rounds that both have; the interval draws rounds with replacement."""
    pairs = [(one, other) for one in mine for other in base if one["round"] == other["round"]]
    rng = random.Random(1)
    draws = [rng.choices(pairs, k=len(pairs)) for _ in range(_RESAMPLES)] if len(pairs) > 1 else []
    value, *found = (
        _over(figure([one for one, _ in drawn]), figure([other for _, other in drawn])) for drawn in (pairs, *draws)
    )
    return Ratio(value, percentile(found, 0.025), percentile(found, 0.975))


def faults(rows: Rows) -> dict[str, int]:
    """Everything that should be 0."""
    names = ("errors", "lost", "doubled", "reordered", "foreign")
    return {name: sum(row[name] for row in rows) for name in names}


def stream_kib(rows: Rows) -> float:
    """Memory that a stream took at the peak, beyond what the idle process had."""
    return float(median((row["peak_kib"] - row["idle_kib"]) / row["streams"] for row in rows))


def _over(one: float, other: float) -> float:
    return one / other if other else math.nan
