"""Counters and histograms that cost a dictionary's look-up: prometheus_client's own take a lock for every value.

They belong to one thread, the event loop's, and are turned into prometheus_client's families when they are scraped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

Labels = tuple[str, ...]


class Count(Collector):
    """A counter; `name` without `_total`."""

    def __init__(self, name: str, help_text: str, labels: Sequence[str] = ()) -> None:
        self._name, self._help, self._labels = name, help_text, labels
        self._values: dict[Labels, float] = {}

    def add(self, *labels: str, by: float = 1) -> None:
        """Count. With `by=0` the series begins, so that `rate()` sees its first event."""
        self._values[labels] = self._values.get(labels, 0) + by

    def collect(self) -> Iterator[CounterMetricFamily]:
        """For prometheus_client."""
        family = CounterMetricFamily(self._name, self._help, labels=self._labels)
        for labels, value in self._values.items():
            family.add_metric(labels, value)
        yield family


class Spread(Collector):
    """A histogram with these upper bounds, ascending."""

    def __init__(self, name: str, help_text: str, bounds: Sequence[float], labels: Sequence[str] = ()) -> None:
        self._name, self._help, self._labels, self._bounds = name, help_text, labels, bounds
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}

    def observe(self, value: float, *labels: str) -> None:
        """Take one value in."""
        self._of(labels)[bisect_left(self._bounds, value)] += 1
        self._sums[labels] += value

    def add(self, counts: Sequence[int], total: float, *labels: str) -> None:
        """Take many in: how many by bucket (the last has no bound), and their sum."""
        mine = self._of(labels)
        for bucket, count in enumerate(counts):
            if count:
                mine[bucket] += count
        self._sums[labels] += total

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """For prometheus_client."""
        family = HistogramMetricFamily(self._name, self._help, labels=self._labels)
        bounds = [*map(str, self._bounds), "+Inf"]
        for labels, counts in self._counts.items():
            family.add_metric(labels, list(zip(bounds, accumulate(counts), strict=True)), self._sums[labels])
        yield family

    def _of(self, labels: Labels) -> list[int]:
        found = self._counts.get(labels)
        if found is None:
            found = self._counts[labels] = [0] * (len(self._bounds) + 1)
            self._sums[labels] = 0.0
        return found
