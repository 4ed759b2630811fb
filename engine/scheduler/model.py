"""What a step costs, learned online: seconds(decoding sequences, prefill tokens) = decode curve + prefill curve.

They are curves, not lines, because steps are not linear in their size. A mixture of experts reads more experts with
every sequence until all are read (steep, then flat); captured graphs round sizes up; a first prefill token leaves the
pure-decode path. A curve is a handful of points, each a moving average of what was seen near it, and straight between.
What prefill adds is less where many sequences decode already (their experts are read anyway), so it has three curves.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from math import inf

LEARNING_RATE = 0.1
"""Share of a new observation in a point's moving average: it follows a change within some twenty steps."""
STALE_RATE = 0.5
"""That share for a point that was not looked at for a long time: what it says is old, and it is seldom asked again."""
FORGET = 0.99
"""By how much the weight of what a point knows shrinks with every observation elsewhere on the curve."""
FIRST_SIGHTS = 10
"""Observations after which a point is trusted enough to clip what it sees."""
FIXED_SHARE = 0.25
"""Share of the smallest prefill seen that even a single token is believed to cost."""
PRIOR_CHUNK = 64
"""Prompt tokens that are believed to cost as much as a decode step, as long as no prefill was seen."""
CLIP = 3.0
"""A step longer than this many times the expectation counts as this many (a pause of the process is not a cost)."""
PRIOR_SLOPE = 0.05
"""Share by which one more sequence is believed to lengthen a step as long as only one number of them was seen."""


@dataclass
class _Point:
    seconds: float = 0.0
    seen: float = 0.0
    at: int = 0


@dataclass
class Curve:
    """A non-decreasing curve through fixed places (in units: sequences or tokens), learned point by point.

    Where two points contradict each other (a smaller size that costs more), the one seen last is right, and the other
    is moved to it: otherwise an old figure, too high or too low, could stand for ever in a place where nothing runs.
    """

    places: tuple[int, ...]
    proportional: bool = False
    """Outside of what was seen, cost follows size: a leap must not look cheaper than it is, nor a small thing dear."""
    _points: list[_Point] = field(init=False)
    _observations: int = 0
    _line: list[tuple[int, float]] = field(default_factory=list)
    """The points seen: size and seconds, both ascending."""

    def __post_init__(self) -> None:
        self._points = [_Point() for _ in self.places]

    @property
    def known(self) -> bool:
        """Whether anything was observed."""
        return bool(self._line)

    def observe(self, size: int, seconds: float) -> None:
        """Takes in that `size` units cost `seconds`. Both neighbouring points learn, the nearer one more."""
        self._observations += 1
        left, share = self._locate(size)
        expected = self.at(size) if self.known else seconds
        for index, weight in ((left, 1.0 - share), (left + 1, share)):
            if weight <= 0.0:
                continue
            point = self._points[index]
            age, point.at = self._observations - point.at - 1, self._observations
            if not point.seen:
                # a point seen for the first time, and only from afar, lies on the line through what is known
                base = self.at(self.places[index]) if self.known else seconds
                point.seconds, point.seen = max(0.0, base + (seconds - expected)), weight
                continue
            value = min(seconds, CLIP * expected) if point.seen >= FIRST_SIGHTS else seconds
            rate = weight * max(LEARNING_RATE, 1.0 / (1.0 + point.seen), min(STALE_RATE, 1.0 - FORGET**age))
            point.seconds = max(0.0, point.seconds + rate * (value - expected))
            point.seen += weight
        for index in (left + 1, left) if share < 0.5 else (left, left + 1):
            if self._points[index].seen:
                self._straighten(index)
        self._line = [(place, p.seconds) for place, p in zip(self.places, self._points, strict=True) if p.seen]

    def at(self, size: int) -> float:
        """The expected seconds of `size` units; 0 while nothing is known."""
        line = self._line
        right = bisect_left(line, (size, -inf))
        if right == len(line):
            return self._beyond(size)
        place, seconds = line[right]
        if right == 0:
            return seconds * (FIXED_SHARE + (1.0 - FIXED_SHARE) * size / place) if self.proportional else seconds
        before, less = line[right - 1]
        return less + (seconds - less) * (size - before) / (place - before)

    def _straighten(self, latest: int) -> None:
        """Moves what contradicts the point seen last."""
        pivot = self._points[latest].seconds
        for index, point in enumerate(self._points):
            point.seconds = min(point.seconds, pivot) if index < latest else max(point.seconds, pivot)

    def _locate(self, size: int) -> tuple[int, float]:
        """The point left of `size`, and how far `size` is on the way to the next (0 to 1)."""
        left = min(max(bisect_right(self.places, size) - 1, 0), len(self.places) - 2)
        low, high = self.places[left], self.places[left + 1]
        return left, min(max((size - low) / (high - low), 0.0), 1.0)

    def _beyond(self, size: int) -> float:
        """Past the largest point seen: on with the mean slope so far, or with a prior if there is no slope yet."""
        if not self._line:
            return 0.0
        (first, low), (last, high) = self._line[0], self._line[-1]
        slope = (high - low) / (last - first) if last > first else high * PRIOR_SLOPE
        if self.proportional:
            slope = max(slope if last > first else 0.0, high / last)
        return high + slope * (size - last)


SIZES = (1, *sorted([2**n for n in range(1, 13)] + [3 * 2**n for n in range(12)]))
"""Where the curves have points: 1, 2, 3, 4, 6, 8, 12 … close enough that between two of them a line will do."""
CROWDS = (4, 32)
"""Decoding sequences up to which a step counts as lonely, and as half full."""


class StepModel:
    """The duration of a step in seconds, from decoding sequences and prefill tokens, learned from steps that ran."""

    def __init__(self) -> None:
        self.decode = Curve(SIZES)
        self.prefill = tuple(Curve(tuple(4 * n for n in SIZES), proportional=True) for _ in range(len(CROWDS) + 1))

    @property
    def known(self) -> bool:
        """Whether a decode step was ever seen; until then nothing can be said."""
        return self.decode.known

    def observe(self, decodes: int, prefill: int, seconds: float) -> None:
        """Takes in one step. Pure decode steps teach the decode curve, the others what prefill adds to it."""
        if prefill <= 0:
            if decodes > 0:
                self.decode.observe(decodes, seconds)
        elif self.known:
            added = max(0.0, seconds - self.decode.at(max(1, decodes)))
            self.prefill[bisect_left(CROWDS, decodes)].observe(prefill, added)

    def seconds(self, decodes: int, prefill: int) -> float:
        """The expected duration. A step that only prefills costs as much as one that also decodes one sequence."""
        if decodes <= 0 and prefill <= 0:
            return 0.0
        return self.decode.at(max(1, decodes)) + (self._added(decodes, prefill) if prefill > 0 else 0.0)

    def _added(self, decodes: int, prefill: int) -> float:
        """What prefill adds, from the curve for so many sequences, or from the nearest that has seen anything."""
        mine = bisect_left(CROWDS, decodes)
        for index in sorted(range(len(self.prefill)), key=lambda i: abs(i - mine)):
            if self.prefill[index].known:
                return self.prefill[index].at(prefill)
        return self.decode.at(1) * prefill / PRIOR_CHUNK
