"""The bars that co-serving is to meet, and whether a run met them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from api.bench.figures import Ratio, Rows, ratios, summary

ALWAYS = "100"
_TTFT, _STRICT_TTFT, _ITL, _HARVEST, _NAIVE, _CAPS, _WASTED = 2.0, 1.5, 1.25, 0.60, 20.0, 1.3, 0.02


@dataclass(frozen=True)
class Verdict:
    """One bar. `met` is None where the run has nothing to say."""

    bar: str
    measured: str
    met: bool | None
    sure: bool = True
    """Whether the whole interval is on the same side of the bar."""

    @property
    def word(self) -> str:
        """For the table."""
        if self.met is None:
            return "not measured"
        return ("met" if self.met else "missed") + ("" if self.sure else ", within chance")


class Blocks:
    """Records by arm and duty. Arms without people belong to every duty."""

    def __init__(self, records: Rows) -> None:
        self._records = records

    def of(self, arm: str, duty: str) -> Rows:
        """Blocks of one arm; empty if it did not run."""
        return [row for row in self._records if row["arm"] == arm and row["duty"] in {duty, ""}]

    @property
    def arms(self) -> list[str]:
        """Names in the order of their first block."""
        return list(dict.fromkeys(row["arm"] for row in self._records))

    @property
    def duties(self) -> list[str]:
        """Kinds of presence, in the order of their first block."""
        return list(dict.fromkeys(row["duty"] for row in self._records if row["duty"]))


def verdicts(records: Rows) -> list[Verdict]:
    """Every bar, judged at half presence (the last bar: at full), or at the first duty that was run without it."""
    blocks = Blocks(records)
    if not blocks.duties:
        return []
    duty = "50" if "50" in blocks.duties else blocks.duties[0]
    alone, bulk, naive = (blocks.of(arm, duty) for arm in ("A", "B", "C"))
    mine, strict = blocks.of("V", duty), blocks.of("V strict", duty)
    return [
        _at_most(f"TTFT p95, V / A ≤ {_TTFT:g}", mine, alone, "ttft95", _TTFT),
        _at_least(f"bulk tokens, V / B ≥ {_HARVEST:g}", mine, bulk, "bulk", _HARVEST),
        _at_most(f"TTFT p95, V strict / A ≤ {_STRICT_TTFT:g}", strict, alone, "ttft95", _STRICT_TTFT),
        _at_most(f"ITL p95, V / A ≤ {_ITL:g}", mine, alone, "itl95", _ITL),
        _at_least(f"TTFT p95, C / V ≥ {_NAIVE:g}", naive, mine, "ttft95", _NAIVE),
        _against_caps(blocks, duty),
        *(_thrown_away(blocks, arm, duty) for arm in ("V", "O") if arm == "V" or arm in blocks.arms),
        _never_starved(blocks),
    ]


def _at_most(bar: str, mine: Rows, base: Rows, figure: str, limit: float) -> Verdict:
    if not mine or not base:
        return Verdict(bar, "–", None)
    found = ratios(mine, base)[figure]
    met = None if math.isnan(found.value) else found.value <= limit
    return Verdict(bar, shown(found), met, not found.low <= limit < found.high)


def _at_least(bar: str, mine: Rows, base: Rows, figure: str, limit: float) -> Verdict:
    if not mine or not base:
        return Verdict(bar, "–", None)
    found = ratios(mine, base)[figure]
    met = None if math.isnan(found.value) else found.value >= limit
    return Verdict(bar, shown(found), met, not found.low < limit <= found.high)


def _against_caps(blocks: Blocks, duty: str) -> Verdict:
    """Against the fixed window with the most bulk among those whose TTFT p95 is no worse than V's."""
    bar = f"bulk tokens, V / the best fixed window with V's TTFT p95 ≥ {_CAPS:g}"
    mine = blocks.of("V", duty)
    caps = [arm for arm in blocks.arms if arm[0] == "S" and arm[1:].isdigit() and blocks.of(arm, duty)]
    if not mine or not caps:
        return Verdict(bar, "–", None)
    late = summary(mine)["ttft95"]
    gentle = {arm: summary(blocks.of(arm, duty)) for arm in caps}
    gentle = {arm: figures for arm, figures in gentle.items() if figures["ttft95"] <= late}
    if not gentle:
        return Verdict(bar, "no fixed window is so gentle", True)
    best = max(gentle, key=lambda arm: gentle[arm]["bulk"])
    found = _at_least(bar, mine, blocks.of(best, duty), "bulk", _CAPS)
    return Verdict(bar, f"{found.measured} over {best}", found.met, found.sure)


def _thrown_away(blocks: Blocks, arm: str, duty: str) -> Verdict:
    share = summary(blocks.of(arm, duty))["wasted"] if blocks.of(arm, duty) else math.nan
    known = not math.isnan(share)
    bar = f"bulk work thrown away, {arm} ≤ {_WASTED:.0%}"
    return Verdict(bar, f"{share:.2%}" if known else "–", share <= _WASTED if known else None)


def _never_starved(blocks: Blocks) -> Verdict:
    bar = "bulk goes on while somebody is always there (V)"
    mine = blocks.of("V", ALWAYS)
    if not mine or ALWAYS not in blocks.duties:
        return Verdict(bar, "–", None)
    rate = summary(mine)["bulk"]
    return Verdict(bar, f"{rate:.0f} tokens/s", rate > 0)


def shown(ratio: Ratio) -> str:
    """A ratio with its interval."""
    if math.isnan(ratio.value):
        return "–"
    return f"{ratio.value:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"
