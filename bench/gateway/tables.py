"""A run as Markdown."""

from __future__ import annotations

import math
from typing import Any

from api.bench.figures import Ratio
from bench.gateway import figures
from bench.gateway.blocks import Mode
from bench.gateway.figures import Record, Rows

BASE = "nginx"
"""The arm that the others are compared to."""
_METHOD = """\
Processor time is that of the proxy's processes alone (Redis's apart), counted by the kernel in ns: per token while all
streams of a pace were there, what their requests took included, else over the whole block. × nginx is the ratio to
nginx of the same rounds, in brackets the interval of 95 % of 1,000 resamples of the rounds. Transit is the time from
the moment when the engine wrote a token until the load generator had read it. TTFT counts from the request's write to
its first token; the engine takes 20 ms of it where streams have a pace. "+" is what a quantile has more than without a
proxy in the same round. Memory is the proxy's at its peak, what several processes share counted once; per stream: what
it had more than just before the block. Arms take turns, each round in the reverse order of the one before."""


def of(records: Rows, mode: str, arm: str) -> list[Record]:
    """The blocks of one load on one arm."""
    return [row for row in records if row["mode"] == mode and row["arm"] == arm]


def arms_in(records: Rows) -> list[str]:
    """The arms, in the order of the first round."""
    return list(dict.fromkeys(row["arm"] for row in records))


def markdown(records: Rows, modes: list[Mode], about: dict[str, Any], notes: list[str]) -> str:
    """All tables, what was left out, and what ran."""
    parts = [_about(records, about)]
    for mode in modes:
        rows = {arm: found for arm in arms_in(records) if (found := of(records, mode.name, arm))}
        if rows and mode.load != "abort":
            parts += [f"## {mode.name}: {mode.title}", (_streams if mode.load == "stream" else _shorts)(rows)]
    aborts = [mode for mode in modes if mode.load == "abort" and any(row["mode"] == mode.name for row in records)]
    if aborts:
        parts += ["## aborts: from the client's leaving to the engine's notice", _aborts(records, aborts)]
    parts += [*notes, _METHOD]
    return "\n\n".join(parts) + "\n"


def _about(records: Rows, about: dict[str, Any]) -> str:
    told = "; ".join(f"{name} {value}" for name, value in about.items() if name != "versions")
    spells = [lost for row in records for _, lost in row["stalls"]]
    rounds = max(row["round"] for row in records)
    left_out, all_of_it = sum(row["left_out"] for row in records), sum(row["tokens"] for row in records)
    return (
        f"{told}. {rounds} rounds, {len(records)} blocks, {all_of_it:,} tokens. The machine "
        f"stood still {len(spells)} times, {sum(spells):.1f} s in all: {left_out:,} samples of times are left out."
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _streams(rows: dict[str, list[Record]]) -> str:
    head = [
        "arm", "CPU µs/token", "× nginx", "tokens/s", "core", "transit µs p50 / p99", "+ p50 / p99",
        "TTFT ms p50 / p99", "+ p50 / p99", "Redis µs/request", "MiB", "KiB/stream", "faults",
    ]  # fmt: skip
    return _table(head, [_stream_row(arm, found, rows) for arm, found in rows.items()])


def _stream_row(arm: str, found: Rows, rows: dict[str, list[Record]]) -> list[str]:
    return [
        arm, *_cost(arm, figures.per_token, rows), f"{figures.token_rate(found):,.0f}",
        "–" if arm == "direct" else f"{figures.busy(found):.2f}",
        *_times(found, rows.get("direct", []), "transit", 1e3), *_times(found, rows.get("direct", []), "first", 1e6),
        *_keeping(found), _faults(found),
    ]  # fmt: skip


def _shorts(rows: dict[str, list[Record]]) -> str:
    head = [
        "arm", "CPU µs/request", "× nginx", "requests/s", "latency ms p50 / p99", "+ p50 / p99", "Redis µs/request",
        "MiB", "faults",
    ]  # fmt: skip
    lines = []
    for arm, found in rows.items():
        redis, memory, _ = _keeping(found)
        cost = _cost(arm, figures.per_request, rows)
        times = _times(found, rows.get("direct", []), "first", 1e6)
        lines.append([arm, *cost, f"{figures.answer_rate(found):,.0f}", *times, redis, memory, _faults(found)])
    return _table(head, lines)


def _aborts(records: Rows, modes: list[Mode]) -> str:
    head = ["arm", *(f"{mode.name}: noticed; ms p50 / max" for mode in modes)]
    lines = []
    for arm in arms_in(records):
        line = [arm]
        for mode in modes:
            found = of(records, mode.name, arm)
            left = sum(len(row["closes"]) for row in found)
            times = sorted(ns / 1e6 for row in found for ns in row["notices"])
            middle = f"; {times[len(times) // 2]:.2f} / {times[-1]:.2f}" if times else ""
            line.append(f"{len(times)} of {left}{middle}" if left else "–")
        lines.append(line)
    return _table(head, lines)


def _cost(arm: str, figure: Any, rows: dict[str, list[Record]]) -> list[str]:
    """µs, and the ratio to nginx."""
    if arm == "direct":
        return ["–", "–"]
    value = f"{figure(rows[arm]) / 1e3:.2f}"
    base = rows.get(BASE)
    if not base or not {row["round"] for row in base} & {row["round"] for row in rows[arm]}:
        return [value, "–"]
    return [value, _shown(figures.ratio(rows[arm], base, figure))]


def _shown(one: Ratio) -> str:
    interval = "" if math.isnan(one.low) or _alone(one) else f" [{one.low:.2f}, {one.high:.2f}]"
    return f"{one.value:.2f}{interval}"


def _alone(one: Ratio) -> bool:
    """Whether there is nothing to draw: one round, or nginx itself."""
    return one.low == one.high == one.value


def _times(found: Rows, direct: Rows, kind: str, unit: float) -> list[str]:
    """p50 and p99, and what they have more than without a proxy; `unit` in ns."""
    digits = 0 if unit == 1e3 else 2
    shown = " / ".join(f"{figures.typical(found, kind, share) / unit:,.{digits}f}" for share in (0.5, 0.99))
    if not direct or found is direct:
        return [shown, "–"]
    return [
        shown,
        " / ".join(f"{figures.added(found, direct, kind, share) / unit:+,.{digits}f}" for share in (0.5, 0.99)),
    ]


def _keeping(found: Rows) -> list[str]:
    """Redis, memory, memory per stream."""
    if not any(row["peak_kib"] for row in found):
        return ["–", "–", "–"]
    redis = figures.redis_per_request(found) / 1e3
    peak = max(row["peak_kib"] for row in found) / 1024
    return [f"{redis:.0f}" if redis else "–", f"{peak:.0f}", f"{figures.stream_kib(found):.0f}"]


def _faults(found: Rows) -> str:
    wrong = {name: count for name, count in figures.faults(found).items() if count}
    first = next((row["first_error"] for row in found if row["first_error"]), "")
    told = ", ".join(f"{count} {name}" for name, count in wrong.items()) or "none"
    return f"{told} ({first[:80]!r})" if first else told
