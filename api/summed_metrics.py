"""The metrics of several api processes as those of one: what each has counted is added up, at every scrape.

Counters and histograms are sums, and what a process that died had counted, as far as it was asked, stays in them: a
counter that goes back is a restart to Prometheus. Gauges are sums where each process speaks of its own requests; the
others are of what all processes see, and are taken once. `process_*` has a label `worker` instead: memory or file
descriptors are held against a limit of each process, and who wants the sum can sum.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import add
from pathlib import Path

import httpcore
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from engine import log

_OWN = frozenset({"velocity_requests_in_flight", "velocity_requests_waiting"})
"""Gauges of which each process has its part."""
_COMMON = frozenset({"velocity_bulk_given_back", "velocity_bulk_wasted_seconds"})
"""Counters of all workers together, which every process reads from Redis."""
_ASK_SECONDS = 2.0

Series = tuple[str, tuple[tuple[str, str], ...]]
Values = dict[Series, float]
Address = Callable[[], Path | None]
"""The unix socket of the process that is there now, another than its predecessor's; None while there is none."""

_parsed: Callable[[str], Iterator[Metric]] = text_string_to_metric_families  # has no types

logger = log.get(__name__)


class _Place:
    """One of the processes, and those that were there before it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._process: object = None
        self._answered = False
        self._last: dict[str, Values] = {}
        self._former: dict[str, Values] = {}
        """By family, what those had counted that are gone."""

    def silent(self) -> None:
        """It has not answered: what it counted stands, what it held is not known."""
        self._answered = False

    def said(self, process: object, families: Iterable[Metric]) -> None:
        """What the process says that is there now. Another than last time has counted from zero."""
        if process != self._process:
            for family, values in self._last.items():
                former = self._former.setdefault(family, {})
                for series, value in values.items():
                    former[series] = former.get(series, 0) + value
        self._process, self._answered = process, True
        self._last = {family.name: dict(self._values(family)) for family in families}

    def shown(self, family: Metric) -> Values:
        """What goes into the sum. Never less than before where `family` counts."""
        last = self._last.get(family.name, {})
        if not _counts(family):
            return last if self._answered else {}
        if family.name in _COMMON:
            return last
        former = self._former.get(family.name, {})
        return {series: former.get(series, 0) + last.get(series, 0) for series in (former | last)}

    def _values(self, family: Metric) -> Iterator[tuple[Series, float]]:
        more = {"worker": self.name} if family.name.startswith("process_") else {}
        for sample in family.samples:
            yield (sample.name, tuple(sorted((sample.labels | more).items()))), sample.value


class SummedMetrics(Collector):
    """The metrics of the processes at `addresses`, by name, and of this process. `ask`, then collect."""

    def __init__(self, own: Collector, addresses: dict[str, Address]) -> None:
        self._own = own
        self._parent = _Place("parent")
        self._addresses = [(_Place(name), address) for name, address in addresses.items()]
        self._families: dict[str, Metric] = {}
        self._turn = asyncio.Lock()

    async def ask(self) -> None:
        """Ask all that live. One scraper at a time: an older answer must not replace a newer one."""
        async with self._turn:
            self._take(self._parent, self, list(self._own.collect()))
            paths = [address() for _, address in self._addresses]
            answers = await asyncio.gather(*(_asked(path) for path in paths))
            for (place, _), path, answer in zip(self._addresses, paths, answers, strict=True):
                self._take(place, path, answer)

    def collect(self) -> Iterator[Metric]:
        """For prometheus_client."""
        places = [self._parent, *(place for place, _ in self._addresses)]
        for family in self._families.values():
            join = add if family.name in _OWN or (_counts(family) and family.name not in _COMMON) else max
            values: Values = {}
            for place in places:  # always in this order: of floats, another could make the sum a hair smaller
                for series, value in place.shown(family).items():
                    values[series] = join(values[series], value) if series in values else value
            summed = Metric(family.name, family.documentation, family.type, family.unit)
            for (name, labels), value in values.items():
                summed.add_sample(name, dict(labels), value)
            yield summed

    def _take(self, place: _Place, process: object, answer: Sequence[Metric] | None) -> None:
        if answer is None:
            place.silent()
            return
        place.said(process, answer)
        for family in answer:
            self._families.setdefault(family.name, family)


def _counts(family: Metric) -> bool:
    return family.type in {"counter", "histogram"}


async def _asked(path: Path | None) -> Sequence[Metric] | None:
    """What the process at that socket says; None if it does not."""
    if path is None:
        return None
    try:
        async with asyncio.timeout(_ASK_SECONDS), httpcore.AsyncConnectionPool(uds=str(path)) as pool:
            answer = await pool.request("GET", "http://worker/metrics", headers={"accept": CONTENT_TYPE_LATEST})
    except (TimeoutError, httpcore.NetworkError, httpcore.ProtocolError) as error:
        logger.warning("metrics_unanswered", path=path.name, reason=type(error).__name__)
        return None
    if answer.status != 200:
        logger.warning("metrics_unanswered", path=path.name, status=answer.status)
        return None
    return list(_parsed(answer.content.decode()))
