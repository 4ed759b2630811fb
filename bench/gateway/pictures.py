"""A run as a picture. Needs matplotlib (extra `bench`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.gateway.blocks import Mode
from bench.gateway.figures import Rows, per_request, per_token
from bench.gateway.tables import arms_in, of

_COLOURS = {
    "direct": "black",
    "nginx": "tab:green",
    "vllm-router": "tab:orange",
    "plain": "tab:red",
    "velocity": "tab:blue",
}


def plot(records: Rows, modes: list[Mode], path: Path) -> None:
    """Processor time per token and per request by arm, and transit as a distribution for each paced load. A PNG."""
    there = [mode for mode in modes if any(row["mode"] == mode.name for row in records)]
    streams = [mode for mode in there if mode.load == "stream"]
    shorts = [mode for mode in there if mode.load.startswith("short")]
    paced = [mode for mode in streams if mode.pace]
    count = bool(streams) + bool(shorts) + len(paced)
    if not count:
        return
    figure = Figure(figsize=(6.5 * count, 4.2), layout="constrained")
    places = iter(figure.subplots(1, count, squeeze=False)[0])
    if streams:
        _bars(next(places), records, streams, per_token, "processor time per token")
    if shorts:
        _bars(next(places), records, shorts, per_request, "processor time per request")
    for mode in paced:
        _transit(next(places), records, mode)
    figure.savefig(path, format="png", dpi=110)


def _bars(axes: Axes, records: Rows, modes: list[Mode], figure: Callable[[Rows], float], title: str) -> None:
    arms = [arm for arm in arms_in(records) if arm != "direct"]
    width = 0.8 / max(1, len(arms))
    for number, arm in enumerate(arms):
        found = [(place, of(records, mode.name, arm)) for place, mode in enumerate(modes)]
        bars = [(place + number * width - 0.4, figure(rows) / 1e3) for place, rows in found if rows]
        if bars:
            places, heights = zip(*bars, strict=True)
            drawn = axes.bar(places, heights, width, label=arm, color=_COLOURS[arm], align="edge")
            axes.bar_label(drawn, fmt="%.3g", fontsize="x-small")
    axes.set_xticks(range(len(modes)), [mode.name for mode in modes])
    axes.set(title=title, ylabel="µs")
    axes.legend(fontsize="small")


def _transit(axes: Axes, records: Rows, mode: Mode) -> None:
    for arm in arms_in(records):
        counts: Counter[int] = Counter()
        for row in of(records, mode.name, arm):
            counts.update(dict(row["transit"]))
        if not counts:
            continue
        total, seen, points = sum(counts.values()), 0, []
        for ns in sorted(counts):
            seen += counts[ns]
            points.append((ns / 1e3, 1 - (seen - counts[ns]) / total))
        axes.step(*zip(*points, strict=True), where="post", label=arm, color=_COLOURS[arm], linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set(title=f"{mode.name}: time on the way", xlabel="µs", ylabel="share of tokens that took longer")
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend(fontsize="small")
