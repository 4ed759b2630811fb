"""What the arms say, as text."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from bench.bulk.arms import Arm


def line(number: int, arm: Arm) -> str:
    """One arm of one round."""
    text = (
        f"  round {number} {arm.name:6} {arm.rate:8.1f} tokens/s in {arm.seconds:6.2f} s   "
        f"in flight {arm.in_flight:6.2f}   steps {arm.steps:5,d}   "
        f"prompt tokens {arm.input_tokens:7,d}, cached {arm.cached:5.1%}"
    )
    if arm.name == "direct":
        return text
    off = ", ".join(f"{share} %: {'unknown' if by is None else f'{by:+.1f} s'}" for share, by in arm.misses.items())
    cpu = "" if arm.cpu is None else f"   worker {arm.cpu:.2f} s of CPU"
    return (
        f"{text}\n{'':17}{arm.whole_rate:8.1f} tokens/s in {arm.whole:6.2f} s from submission to completed "
        f"(submission {arm.submission:.2f} s, end {arm.whole - arm.submission - arm.seconds:.2f} s){cpu}\n"
        f"{'':17}estimated completion off at {off}"
    )


def summary(arms: list[Arm]) -> str:
    """The ratios, jobs to direct: of the medians, and the lowest and highest of a round.

    That of the requests in flight says how well the worker keeps its window full, whatever else the machine does.
    """
    return "\n".join(
        [
            _ratio("jobs / direct, until the last item", arms, lambda arm: arm.rate),
            _ratio("jobs / direct, submission to completed", arms, lambda arm: arm.whole_rate),
            _ratio("jobs / direct, requests in flight", arms, lambda arm: arm.in_flight),
        ]
    )


def _ratio(name: str, arms: list[Arm], figure: Callable[[Arm], float]) -> str:
    jobs, direct = ([figure(arm) for arm in arms if arm.name == which] for which in ("jobs", "direct"))
    if not all(direct):
        return f"  {name:39} not known"  # an engine that does not count
    rounds = [one / other for one, other in zip(jobs, direct, strict=True)]
    return (
        f"  {name:39} {statistics.median(jobs) / statistics.median(direct):.3f} "
        f"(rounds {min(rounds):.3f} to {max(rounds):.3f}; direct {min(direct):.2f} to {max(direct):.2f})"
    )
