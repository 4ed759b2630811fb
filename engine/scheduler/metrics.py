"""The scheduler's reports as Prometheus metrics. Counted where the steps are made; written out here, when asked for.

Every series has the data-parallel rank as a label: `sum without (rank)` gives the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.scheduler.report import DURATIONS

_Report = Mapping[str, Any]
_Series = Iterable[tuple[tuple[str, ...], float]]
"""Values of the labels (without the rank), and the value."""
_Family = tuple[str, str, tuple[str, ...], Callable[[_Report], _Series]]
"""Name below velocity_scheduler_, help, labels (without the rank), and how the series are found in a report."""


def rendered(reports: Mapping[int, _Report]) -> tuple[bytes, str]:
    """Everything that the reports (by rank) say, as Prometheus text, and its content type."""
    registry = CollectorRegistry()
    registry.register(_Reports(reports))
    encode, content_type = choose_encoder("")
    return encode(registry), content_type


def _one(*path: str) -> Callable[[_Report], _Series]:
    """A single value; nothing where it is null."""

    def found(report: _Report) -> _Series:
        value: Any = report
        for name in path:
            value = value[name]
        return [] if value is None else [((), float(value))]

    return found


def _each(name: str) -> Callable[[_Report], _Series]:
    """A value for every key."""
    return lambda report: [((key,), float(value)) for key, value in report[name].items()]


def _tokens(report: _Report) -> _Series:
    return [((kind, phase), n) for kind, phases in report["batch_tokens"].items() for phase, n in phases.items()]


def _predictions(report: _Report) -> _Series:
    model = report["model"]
    decode = [((size, "0"), seconds) for size, seconds in model["decode_seconds"].items()]
    return decode + [(("1", size), seconds) for size, seconds in model["prefill_seconds"].items()]


_COUNTERS: tuple[_Family, ...] = (
    ("steps", "Steps scheduled; interactive: an interactive request took part.", ("kind",), _each("steps")),
    ("batch_sequence_steps", "Batch sequences that decoded, added up over steps.", ("kind",),
     _each("batch_sequence_steps")),
    ("batch_tokens", "The harvest: tokens computed for batch requests.", ("kind", "phase"), _tokens),
    ("floor_steps", "Steps in which the floor gave batch more than the ratio alone.", (), _one("floor_steps")),
    ("preemptions", "Batch requests that lost their KV cache to an interactive one.", (), _one("preemptions")),
    ("wasted_tokens", "Tokens computed again after such preemptions.", (), _one("wasted_tokens")),
)  # fmt: skip
_GAUGES: tuple[_Family, ...] = (
    ("interactive_sequences", "Interactive requests running or about to start.", (), _one("interactive")),
    ("batch_sequences_seated", "Batch requests that hold a seat.", (), _one("batch", "seated")),
    ("batch_sequences_parked", "Those left out of the last step, their KV cache kept.", (), _one("batch", "parked")),
    ("batch_sequences_room", "Batch sequences that could decode in a step without people.", (), _one("batch", "room")),
    ("longest_parked_seconds", "How long the longest-parked sequence has been parked.", (),
     _one("longest_parked_seconds")),
    ("last_step_seconds", "How long the last step took.", (), _one("last_step_seconds")),
    ("longest_batch_step_seconds", "How long a step without people may take.", (), _one("longest_batch_step_seconds")),
    ("predicted_step_seconds", "How long a step of that size is believed to take.",
     ("decoding_sequences", "prompt_tokens"), _predictions),
    ("dial", "The dial's fields, as VELOCITY_<FIELD> has them: ratios, shares, seconds or sequences.", ("field",),
     _each("dial")),
    ("report_age_seconds", "Age of the report; an idle engine writes none.", (), _one("age_seconds")),
)  # fmt: skip


class _Reports(Collector):
    def __init__(self, reports: Mapping[int, _Report]) -> None:
        self._reports = reports

    def collect(self) -> Iterator[Metric]:
        for kind, families in ((CounterMetricFamily, _COUNTERS), (GaugeMetricFamily, _GAUGES)):
            for name, text, labels, series in families:
                family = kind(f"velocity_scheduler_{name}", text, labels=(*labels, "rank"))
                for rank, report in self._reports.items():
                    for values, value in series(report):
                        family.add_metric((*values, str(rank)), value)
                yield family
        yield self._durations()

    def _durations(self) -> HistogramMetricFamily:
        family = HistogramMetricFamily(
            "velocity_scheduler_step_seconds", "How long steps took.", labels=("kind", "rank")
        )
        for rank, report in self._reports.items():
            for kind, counts in report["step_durations"].items():
                bounds = [*map(str, DURATIONS), "+Inf"]
                buckets = list(zip(bounds, accumulate(counts), strict=True))
                family.add_metric((kind, str(rank)), buckets, report["step_seconds"][kind])
        return family
