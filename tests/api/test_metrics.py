"""The metrics, as a Prometheus would read them: over HTTP, with the reference parsers."""

from __future__ import annotations

import asyncio
import math
import random
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress

import httpx
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from api import metrics_server
from api.errors import ApiError
from api.metrics import Gaps, Metrics, Outcome, Refusal
from api.metrics_server import serve_metrics
from engine.errors import StartError
from engine.protection import Protection

parse_strictly: Callable[[str], Iterator[Metric]] = openmetrics.text_string_to_metric_families  # has no types

CHAT = "/v1/chat/completions"
LABELS = {
    "velocity_http_requests": {"route", "method", "status"},
    "velocity_request_duration_seconds": {"endpoint", "stream"},
    "velocity_ttft_seconds": {"endpoint", "bulk"},
    "velocity_itl_seconds": {"bulk"},
    "velocity_tokens": {"direction", "traffic"},
    "velocity_refusals": {"reason"},
    "velocity_requests_in_flight": set(),
    "velocity_requests_waiting": set(),
    "velocity_engine_up": set(),
    "velocity_engine_protection": {"protection"},
    "velocity_redis_seconds": {"operation"},
    "velocity_redis_failures": {"operation"},
    "velocity_local_decisions": {"outcome"},
    "velocity_stream_outcomes": {"outcome"},
}


async def nobody(_: bytes | None) -> None:
    raise AssertionError("nobody is asked on a loopback address")


async def only_sesame(authorization: bytes | None) -> None:
    if authorization != b"Bearer sesame":
        raise ApiError(401, "This API key is not valid.", code="invalid_api_key")


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
async def url(metrics: Metrics) -> AsyncIterator[str]:
    async with serve_metrics(metrics, "127.0.0.1", 0, nobody) as port:
        yield f"http://127.0.0.1:{port}/metrics"


def use(metrics: Metrics) -> None:
    """A bit of everything."""
    for route, method, status in ("/jobs/{id}", "GET", 404), *[(CHAT, "POST", 200)] * 2, (CHAT, "BREW", 0):
        metrics.request(route, method, status)
    for stream in (True, False):
        metrics.duration(CHAT, 0.3, stream=stream)
    for seconds in (0.004, 0.06, 200, 301):
        metrics.ttft(CHAT, seconds, bulk=True)
    metrics.tokens(100, 7)
    metrics.tokens(1, 2)
    metrics.refused(Refusal.GLOBAL_TOKENS)
    metrics.redis("admit", 0.0003)
    metrics.redis_failed("admit")
    for admitted in (True, False, False):
        metrics.local(admitted)
    metrics.outcome("ok")
    gaps = Gaps()
    for now in (5.0, 5.002, 5.0305):
        gaps.token(now)
    for bulk in (False, True):
        metrics.add_gaps(gaps, bulk=bulk)


async def scrape(url: str) -> dict[str, Metric]:
    async with httpx.AsyncClient() as client:
        answer = await client.get(url)
    assert answer.status_code == 200
    return {family.name: family for family in text_string_to_metric_families(answer.text)}


def value(families: dict[str, Metric], name: str, **labels: str) -> float:
    samples = (sample for family in families.values() for sample in family.samples)
    [found] = [sample.value for sample in samples if (sample.name, sample.labels) == (name, labels)]
    return float(found)


async def test_names_labels_and_values(metrics: Metrics, url: str) -> None:
    use(metrics)
    metrics.observe_gauges(lambda: 3, lambda: 2)
    metrics.observe_engine(lambda: True, lambda: Protection.PRIORITY)
    families = await scrape(url)

    for name, labels in LABELS.items():
        for sample in families[name].samples:
            assert set(sample.labels) - {"le"} == labels, sample
            assert sample.name.startswith("velocity_")
    assert value(families, "velocity_http_requests_total", route=CHAT, method="POST", status="200") == 2
    assert value(families, "velocity_http_requests_total", route=CHAT, method="other", status="none") == 1
    assert value(families, "velocity_tokens_total", direction="input", traffic="interactive") == 101
    assert value(families, "velocity_tokens_total", direction="output", traffic="interactive") == 9
    assert value(families, "velocity_refusals_total", reason="global_tokens") == 1
    assert value(families, "velocity_redis_failures_total", operation="admit") == 1
    assert value(families, "velocity_local_decisions_total", outcome="admitted") == 1
    assert value(families, "velocity_local_decisions_total", outcome="refused") == 2
    assert value(families, "velocity_requests_in_flight") == 3
    assert value(families, "velocity_requests_waiting") == 2
    assert value(families, "velocity_engine_up") == 1
    said = {each: value(families, "velocity_engine_protection", protection=each) for each in Protection}
    assert said == {Protection.SCHEDULER: 0, Protection.PRIORITY: 1, Protection.NONE: 0}
    assert value(families, "process_open_fds") > 0
    assert set(families["velocity_build_info"].samples[0].labels) == {"version", "python"}
    assert "python_info" in families


async def test_every_reason_and_outcome_is_there_from_the_start(url: str) -> None:
    """So that `rate()` sees the first one happen."""
    families = await scrape(url)
    assert [value(families, "velocity_refusals_total", reason=reason) for reason in Refusal] == [0] * len(Refusal)
    assert {value(families, "velocity_stream_outcomes_total", outcome=outcome) for outcome in Outcome} == {0}


def histograms(families: dict[str, Metric]) -> Iterator[tuple[str, list[tuple[float, float]], float, float]]:
    """Each series of each of velocity's histograms: name, buckets by bound, count, sum."""
    for family in families.values():
        if family.type != "histogram" or not family.name.startswith("velocity_"):
            continue
        series: dict[tuple[tuple[str, str], ...], dict[str, float]] = {}
        for sample in family.samples:
            labels = tuple(sorted((name, text) for name, text in sample.labels.items() if name != "le"))
            name = sample.name.removeprefix(family.name) + sample.labels.get("le", "")
            series.setdefault(labels, {})[name] = sample.value
        for values in series.values():
            buckets = [(float(name[7:]), count) for name, count in values.items() if name.startswith("_bucket")]
            yield family.name, buckets, values["_count"], values["_sum"]


async def test_buckets_are_cumulative_and_consistent(metrics: Metrics, url: str) -> None:
    use(metrics)
    seen = set()
    for name, buckets, count, total in histograms(await scrape(url)):
        seen.add(name)
        assert buckets == sorted(buckets)
        assert [held for _, held in buckets] == sorted(held for _, held in buckets)
        assert buckets[-1] == (math.inf, count)
        assert count > 0
        assert total > 0
    assert seen == {name for name in LABELS if name.endswith("_seconds")}


async def test_ttft_fits_a_gpu_and_a_cpu(metrics: Metrics, url: str) -> None:
    use(metrics)
    [(_, buckets, count, total)] = [found for found in histograms(await scrape(url)) if "ttft" in found[0]]
    held = dict(buckets)
    assert (held[0.005], held[0.05], held[0.075], held[300.0], count) == (1, 1, 2, 3, 4)
    assert total == pytest.approx(501.064)


async def test_gaps_merge_exactly(metrics: Metrics, url: str) -> None:
    """Against counting each gap on its own; whole multiples of 2⁻¹² s, so that no sum is rounded."""
    chance = random.Random(7)  # noqa: S311 - the same every time
    everything: list[float] = []
    for _ in range(50):
        gaps, now = Gaps(), chance.randrange(1000) / 4
        for number in range(chance.randrange(60)):
            gap = chance.choice((1, 5, 40, 200, 4096, 3 * 4096, 40 * 4096)) * chance.randrange(1, 4) / 4096
            if number:
                everything.append(gap)
                now += gap
            gaps.token(now)
            assert gaps.tokens == number + 1
        assert sum(gaps.counts) == max(gaps.tokens - 1, 0)
        metrics.add_gaps(gaps, bulk=True)

    without, (_, buckets, count, total) = [found for found in histograms(await scrape(url)) if "itl" in found[0]]
    assert without[2:] == (0, 0)
    assert (count, total) == (len(everything), sum(everything))
    assert buckets == [(bound, sum(gap <= bound for gap in everything)) for bound, _ in buckets]
    assert buckets[0][0] == 0.001
    assert 2.0 in dict(buckets)


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        *((outcome.value, outcome) for outcome in Outcome),
        ("engine_400", Outcome.REFUSED),
        ("engine_503", Outcome.ENGINE_ERROR),
        ("EngineTimeout", Outcome.TIMEOUT),
        ("EngineLost", Outcome.ENGINE_ERROR),
        ("EngineUnreachable", Outcome.ENGINE_ERROR),
        ("EngineProtocolError", Outcome.ENGINE_ERROR),
        ("a prompt, by mistake", Outcome.OTHER),
        ("", Outcome.OTHER),
    ],
)
def test_outcomes_are_bounded(text: str, outcome: Outcome) -> None:
    assert Outcome.of(text) is outcome


async def test_the_formats(metrics: Metrics, url: str) -> None:
    """OpenMetrics' own parser is strict: names, units, order and cumulation."""
    use(metrics)
    async with httpx.AsyncClient() as client:
        plain = await client.get(url, headers={"accept": "*/*"})
        answer = await client.get(url, headers={"accept": "application/openmetrics-text; version=1.0.0, */*;q=0.1"})
        odd = await client.get(url, headers={"accept": "application/openmetrics-text; version=x.y"})
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name for family in parse_strictly(answer.text)}
    assert families >= LABELS.keys()
    assert (odd.status_code, odd.headers["content-type"]) == (200, plain.headers["content-type"])


async def test_nothing_else_is_there(url: str) -> None:
    async with httpx.AsyncClient() as client:
        for method, path in (("GET", "/"), ("GET", "/metrics/x"), ("POST", "/metrics"), ("GET", "/health")):
            answer = await client.request(method, url.removesuffix("/metrics") + path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


async def test_beyond_loopback_a_key_is_needed(metrics: Metrics) -> None:
    async with serve_metrics(metrics, "0.0.0.0", 0, only_sesame) as port, httpx.AsyncClient() as client:
        base = f"http://127.0.0.1:{port}"
        for path in ("/metrics", "/nothing"):
            answer = await client.get(base + path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        answer = await client.get(base + "/metrics", headers={"authorization": "Bearer sesame"})
        assert answer.status_code == 200
        assert "velocity_engine_up" in answer.text


async def test_a_fault_of_ours_is_a_500_without_detail(metrics: Metrics, url: str) -> None:
    metrics.observe_engine(lambda: bool(1 / 0), lambda: None)
    async with httpx.AsyncClient() as client:
        answer = await client.get(url)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "division" not in answer.text


async def ended(reader: asyncio.StreamReader) -> None:
    async with asyncio.timeout(30):
        with suppress(ConnectionError):
            assert await reader.read() == b""


async def test_a_stuck_scraper_is_cut_off(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "_CONNECTION_SECONDS", 0.1)
    async with serve_metrics(metrics, "127.0.0.1", 0, nobody) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /metrics HTTP/1.1\r\nhost: x\r\nx-never-")
        await ended(reader)
        writer.close()


async def test_too_many_scrapers_are_cut_off(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "_CONNECTIONS", 2)
    async with serve_metrics(metrics, "127.0.0.1", 0, nobody) as port:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await ended(reader)
        for each in (writer, *(other for _, other in held)):
            each.close()
        async with asyncio.timeout(30):
            while True:
                try:
                    assert "velocity_engine_up" in await scrape(f"http://127.0.0.1:{port}/metrics")
                    break
                except httpx.TransportError:  # the server has not seen yet that the others left
                    await asyncio.sleep(0.01)


async def test_a_taken_port_is_said_at_once(metrics: Metrics) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(StartError, match="metrics"):
        async with serve_metrics(metrics, "127.0.0.1", taken.getsockname()[1], nobody):
            pass


async def test_the_end_waits_for_nobody(metrics: Metrics) -> None:
    async with serve_metrics(metrics, "127.0.0.1", 0, nobody) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /met")
        await writer.drain()
        await asyncio.sleep(0.05)
    await ended(reader)
    writer.close()
