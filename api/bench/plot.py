"""A run as a picture. Needs matplotlib (extra `bench`): loaded by name, and only for this."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from api.bench.figures import Record, Rows, first_tokens, gaps
from api.bench.verdicts import Blocks

_SLICE = 2.0
_SHORTEST = 1e-3
"""Seconds. What took less time arrived together."""
_COLOURS = {"A": "black", "A'": "grey", "B": "tab:purple", "C": "tab:red", "V": "tab:blue", "V strict": "tab:cyan"}
_OTHERS = ("tab:orange", "tab:olive", "tab:brown", "tab:pink", "tab:green")


def plot(records: Rows, path: Path) -> None:
    """TTFT and ITL of every arm as distributions, a row per duty; then bulk over time, people shaded. Writes a PNG."""
    blocks = Blocks(records)
    over_time = [
        row for row in records if row["window"] and row["round"] == 1 and row["duty"] in {"", blocks.duties[0]}
    ]
    rows = len(blocks.duties) + -(-len(over_time) // 2)
    figure = Figure(figsize=(13, 3.6 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False)
    for number, duty in enumerate(blocks.duties):
        arms = {arm: blocks.of(arm, duty) for arm in blocks.arms}
        people = {arm: found for arm, found in arms.items() if any(row["streams"] for row in found)}
        _distributions(grid[number][0], {arm: first_tokens(found) for arm, found in people.items()})
        grid[number][0].set(title=f"duty {duty}: time to first token", xlabel="s", ylabel="share of requests")
        _distributions(grid[number][1], {arm: gaps(found) for arm, found in people.items()})
        grid[number][1].set(title=f"duty {duty}: time between tokens", xlabel="s", ylabel="share of gaps")
    places = [axes for line in grid[len(blocks.duties) :] for axes in line]
    most = max((rate for row in over_time for rate in _rates(row)), default=1.0)
    for axes, row in zip(places, over_time, strict=False):
        _throughput(axes, row, most)
    for axes in places[len(over_time) :]:
        axes.set_axis_off()
    figure.savefig(path, format="png", dpi=110)


def _colour(arm: str) -> str:
    return _COLOURS.get(arm) or _OTHERS[sum(map(ord, arm)) % len(_OTHERS)]


def _distributions(axes: Axes, values: dict[str, list[float]]) -> None:
    for arm, found in values.items():
        finite = sorted(value for value in found if math.isfinite(value) and value > 0)
        shares = [(number + 1) / len(found) for number in range(len(finite))]
        axes.step(finite, shares, where="post", label=arm, color=_colour(arm), linewidth=1.2)
    axes.set_xscale("log")
    axes.set_xlim(left=_SHORTEST)
    axes.set_ylim(0, 1.02)
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend(fontsize="small")


def _rates(row: Record) -> list[float]:
    """Bulk tokens per second in slices of the block."""
    count = max(1, int(row["seconds"] // _SLICE))
    sums = [0.0] * count
    for at, output, _ in row["bulk"]:
        if 0 < at <= count * _SLICE:
            sums[min(count - 1, int(at // _SLICE))] += output
    return [tokens / _SLICE for tokens in sums]


def _throughput(axes: Axes, row: Record, most: float) -> None:
    for seen in row["streams"]:
        if seen["tokens"]:
            axes.axvspan(seen["due"], min(seen["last"], row["seconds"]), color="tab:orange", alpha=0.25, linewidth=0)
    rates = _rates(row)
    axes.stairs(rates, [number * _SLICE for number in range(len(rates) + 1)], color=_colour(row["arm"]))
    axes.set(
        title=f"{row['arm']}: bulk over time (shaded: people there)", xlabel="s", ylabel="tokens/s",
        xlim=(0, row["seconds"]), ylim=(0, most * 1.05),
    )  # fmt: skip
