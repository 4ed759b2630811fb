"""The metrics of several processes as one: real ones, asked over their unix sockets."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.registry import Collector

from api.metrics import Gaps, Metrics, rendered
from api.metrics_server import serve_metrics_on
from api.summed_metrics import SummedMetrics
from engine.protection import Protection

parse_strictly: Callable[[str], Iterator[Metric]] = openmetrics.text_string_to_metric_families  # has no types
CHAT = "/v1/chat/completions"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


class OfRedis(Collector):
    """What a process has read from Redis, where it is the same for all."""

    def __init__(self, value: float) -> None:
        self.value = value

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("velocity_bulk_requests_in_flight", "Of all workers.", self.value)
        yield CounterMetricFamily("velocity_bulk_given_back", "Of all workers.", self.value)


@dataclass
class Process:
    """One of the processes: its metrics, and what it knows."""

    metrics: Metrics
    of_redis: OfRedis
    stack: AsyncExitStack


@dataclass
class Processes:
    """Places 1 to 3, in which processes come and go."""

    directory: Path
    own: Metrics = field(default_factory=Metrics)
    there: dict[str, Process] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    started: int = 0

    def __post_init__(self) -> None:
        self.sums = SummedMetrics(self.own, {name: partial(self.paths.get, name) for name in "123"})

    async def start(self, name: str, of_redis: float = 0) -> Metrics:
        self.started += 1
        process = Process(Metrics(), OfRedis(of_redis), AsyncExitStack())
        process.metrics.register(process.of_redis)
        path = self.directory / f"{name}-{self.started}"
        await process.stack.enter_async_context(serve_metrics_on(path, process.metrics))
        self.there[name], self.paths[name] = process, path
        return process.metrics

    async def end(self, name: str) -> None:
        await self.there.pop(name).stack.aclose()

    async def values(self) -> dict[tuple[str, ...], float]:
        """Every sample by its name and the values of its labels, in alphabetic order."""
        await self.sums.ask()
        text = rendered(self.sums, OPENMETRICS)[0].decode()
        found = [
            ((sample.name, *sorted(sample.labels.values())), sample.value)
            for family in parse_strictly(text)
            for sample in family.samples
        ]
        assert len(found) == len(dict(found))
        return dict(found)


@pytest.fixture
async def processes() -> AsyncIterator[Processes]:
    with tempfile.TemporaryDirectory() as directory:  # pytest's own are too long for a socket's name
        made = Processes(Path(directory))
        yield made
        for name in list(made.there):
            await made.end(name)


async def test_counters_and_histograms_are_added_up(processes: Processes) -> None:
    gaps = Gaps()
    for now in (1.0, 1.002, 1.5):
        gaps.token(now)
    for turn, name in enumerate("123", 1):
        metrics = await processes.start(name)
        metrics.request(CHAT, "POST", 200)
        metrics.request(f"/only/{name}", "GET", 200)
        metrics.ttft(CHAT, 0.004 * turn, bulk=False)
        metrics.add_gaps(gaps, bulk=True)
        metrics.tokens(10 * turn, 1)
    values = await processes.values()
    assert values["velocity_http_requests_total", *sorted((CHAT, "POST", "200"))] == 3
    assert values["velocity_http_requests_total", *sorted(("/only/2", "GET", "200"))] == 1
    assert values["velocity_tokens_total", "input", "interactive"] == 60
    assert values["velocity_ttft_seconds_count", *sorted((CHAT, "no"))] == 3
    assert values["velocity_ttft_seconds_bucket", *sorted((CHAT, "no", "0.005"))] == 1
    assert values["velocity_ttft_seconds_bucket", *sorted((CHAT, "no", "0.01"))] == 2
    assert values["velocity_ttft_seconds_sum", *sorted((CHAT, "no"))] == pytest.approx(0.024)
    assert values["velocity_itl_seconds_count", "yes"] == 6


async def test_gauges_are_added_up_where_each_has_its_part_and_taken_once_where_not(processes: Processes) -> None:
    for turn, name in enumerate("12", 1):
        metrics = await processes.start(name, of_redis=5)
        metrics.observe_gauges(partial(int, turn), partial(int, 10 * turn))
        metrics.observe_engine(lambda: True, lambda: Protection.PRIORITY)
    values = await processes.values()
    assert (values[("velocity_requests_in_flight",)], values[("velocity_requests_waiting",)]) == (3, 30)
    assert values[("velocity_engine_up",)] == 1
    assert [values["velocity_engine_protection", each] for each in Protection] == [0, 1, 0]
    assert (values[("velocity_bulk_requests_in_flight",)], values[("velocity_bulk_given_back_total",)]) == (5, 5)
    assert sum(name[0] == "python_info" for name in values) == 1
    assert sum(name[0] == "velocity_build_info" for name in values) == 1


async def test_what_a_process_is_has_its_name(processes: Processes) -> None:
    await processes.start("2")
    values = await processes.values()
    for name in ("process_resident_memory_bytes", "process_open_fds", "process_cpu_seconds_total"):
        assert {key[1:] for key in values if key[0] == name} == {("2",), ("parent",)}


async def test_who_died_counts_and_holds_nothing(processes: Processes) -> None:
    for name in "12":
        metrics = await processes.start(name, of_redis=7)
        metrics.tokens(10, 1)
        metrics.observe_gauges(lambda: 4, lambda: 0)
    before = await processes.values()
    await processes.end("1")
    without = await processes.values()
    successor = await processes.start("1", of_redis=7)
    successor.tokens(100, 1)
    after = await processes.values()
    await processes.end("1")
    await processes.start("1", of_redis=7)
    again = await processes.values()
    inputs = ("velocity_tokens_total", "input", "interactive")
    assert [values[inputs] for values in (before, without, after, again)] == [20, 20, 120, 120]
    held = ("velocity_requests_in_flight",)
    assert [values[held] for values in (before, without, after, again)] == [8, 4, 4, 4]
    assert [values[("velocity_bulk_given_back_total",)] for values in (before, without, after, again)] == [7] * 4
    assert ("process_open_fds", "1") in before
    assert ("process_open_fds", "1") not in without


async def test_no_sum_of_floats_is_smaller_by_a_hair(processes: Processes) -> None:
    """Who dies moves from one addend into another: in another order, the sum could be rounded down."""
    series = ("velocity_ttft_seconds_sum", *sorted((CHAT, "no")))
    shown = [0.0]
    for turn in range(6):
        for name in "123":
            if name in processes.there and (turn + int(name)) % 3 == 0:
                await processes.end(name)
            if name not in processes.there:
                await processes.start(name)
            processes.there[name].metrics.ttft(CHAT, 0.1 * int(name) + 1e-9 * turn, bulk=False)
            shown.append((await processes.values())[series])
    assert shown == sorted(shown)
    assert shown[-1] == pytest.approx(6 * 0.6)


async def test_without_any_process_there_are_the_parents_own(processes: Processes) -> None:
    processes.own.redis("key", 0.001)
    processes.paths["3"] = processes.directory / "nobody"
    values = await processes.values()
    assert values["velocity_redis_seconds_count", "key"] == 1
    assert values[("velocity_engine_up",)] == 0
