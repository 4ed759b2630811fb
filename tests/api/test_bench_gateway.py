"""The synthetic engine and the load generator of `make bench-gateway`: nothing is lost, and what is, is noticed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from bench.gateway.arms import Site, velocity
from bench.gateway.figures import kept, quantile, ratio, steady
from bench.gateway.native import Ask, Engine, Load, Programs, Report, compiled, running_engine
from bench.gateway.processes import Cores

TOKENS = 100_000
A_MILLION = 1_000_000
"""Through velocity's api process."""
CORES = Cores.of_this_machine()
STREAM = Ask(200)

Edit = Callable[[list[bytes]], list[bytes]]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return compiled(tmp_path_factory.mktemp("bench-gateway"))


@pytest.fixture
def engine(programs: Programs) -> Iterator[Engine]:
    with running_engine(programs, CORES.others | CORES.proxy) as running:
        yield running


@pytest.fixture
def load(programs: Programs, tmp_path: Path) -> Load:
    return Load(programs, CORES.others | CORES.proxy, tmp_path)


def faults(report: Report) -> dict[str, int]:
    names = ("errors", "lost", "doubled", "reordered", "foreign")
    return {name: report[name] for name in names if report[name]}


def test_a_run_straight_at_the_engine_loses_nothing(engine: Engine, load: Load) -> None:
    fast = load.run("stream", engine.port, STREAM.request("k"), connections=10, rounds=5, expect=200)
    assert faults(fast) == {}
    assert (fast["requests"], fast["answers"], fast["tokens"], fast["connects"]) == (50, 50, 10_000, 10)
    assert fast["transit"]["count"] == sum(count for _, count in fast["transit"]["buckets"]) == 10_000
    assert fast["transit"]["p50"] <= fast["transit"]["p99"] <= fast["transit"]["max"]
    paced = load.run(
        "stream", engine.port, Ask(20, rate=100, prefill_ms=30).request("k"), connections=5, rounds=1, expect=20
    )
    assert faults(paced) == {}
    assert paced["seconds"] > 0.2
    assert paced["first"]["count"] == 5
    assert paced["first"]["p50"] > 29e6
    assert engine.stats()["tokens"] == 10_100


def test_answers_that_are_no_stream(engine: Engine, load: Load) -> None:
    request = Ask(4, stream=False).request("k")
    kept_alive = load.run("short", engine.port, request, connections=4, rounds=50)
    new = load.run("short-new", engine.port, request, connections=4, rounds=50)
    assert faults(kept_alive) == faults(new) == {}
    assert (kept_alive["answers"], kept_alive["connects"]) == (200, 4)
    assert (new["answers"], new["connects"]) == (200, 200)
    refused = load.run("short", engine.port, request.replace(b"/v1/chat", b"/v2/chat"), rounds=2)
    assert refused["errors"] == 2
    assert refused["first_error"] == '404 {"detail":"Not Found"}'


@contextmanager
def evil_proxy(engine: Engine, edit: Edit) -> Iterator[int]:
    """Serves one connection: sends on the request, and the answer's events as `edit` left them; its port."""

    def serve() -> None:
        client, _ = listener.accept()
        with client, socket.create_connection(("127.0.0.1", engine.port)) as upstream:
            upstream.sendall(client.recv(65536))
            answer = b""
            while not answer.endswith(b"\r\n0\r\n\r\n"):
                answer += upstream.recv(65536)
            head, _, body = answer.partition(b"\r\n\r\n")
            client.sendall(head + b"\r\n\r\n")
            for piece in edit(body.removesuffix(b"0\r\n\r\n").split(b"\n\n\r\n")[:-1]):
                for byte in (piece[:40], piece[40:], b"\n\n\r\n"):  # and torn into pieces
                    client.sendall(byte)
            client.sendall(b"0\r\n\r\n")
            client.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda events: events, {}),
        (lambda events: [*events[:5], b"8\r\n: ping", *events[5:]], {}),
        (lambda events: [*events[:5], *events[7:]], {"lost": 2}),
        (lambda events: [*events[:-4], *events[-3:]], {"lost": 1}),
        (lambda events: [*events[:5], *events[3:]], {"doubled": 2}),
        (lambda events: [*events[:5], events[6], events[5], *events[7:]], {"reordered": 1}),
        (lambda events: events[:-1], {"errors": 1}),
        (lambda events: [each.replace(b'content":"0', b'content":"1') for each in events], {"foreign": 20, "lost": 20}),
    ],
    ids=["honest", "ping", "drops", "drops the last", "doubles", "swaps", "ends early", "mixes up"],
)
def test_what_a_proxy_does_to_events_is_caught(
    engine: Engine, load: Load, edit: Edit, expected: dict[str, int]
) -> None:
    with evil_proxy(engine, edit) as port:
        report = load.run("stream", port, Ask(20).request("k"), rounds=1, expect=20)
    assert faults(report) == expected


def test_the_engine_notices_clients_that_leave(engine: Engine, load: Load) -> None:
    streams = load.run("abort", engine.port, Ask(1000, rate=500).request("k"), rounds=5, after_tokens=5)
    request = Ask(1, stream=False, delay_ms=5000).request("k")
    wholes = load.run("abort", engine.port, request, rounds=5, after_ms=20, first=100)
    noticed = dict(engine.stats()["aborts"])
    closed = streams["closes"] + wholes["closes"]
    assert [number for number, _ in closed] == [*range(1, 6), *range(100, 105)]
    assert all(at < noticed[number] for number, at in closed)
    assert faults(streams) == faults(wholes) == {}


def test_nothing_is_lost_in_velocity(engine: Engine, load: Load, clean_redis: str, tmp_path: Path) -> None:
    site = Site(engine, CORES, tmp_path)
    with ExitStack() as stack:
        arm = stack.enter_context(velocity(site, tmp_path / "data", clean_redis))
        report = load.run("stream", arm.port, Ask(2000).request(arm.key), connections=20, tokens=A_MILLION, expect=2000)
    assert faults(report) == {}, report["first_error"]
    assert report["tokens"] >= A_MILLION


def test_samples_of_spells_are_left_out() -> None:
    pieces = [
        {"slice": number, "tokens": 1, "transit": [[10 * (number + 1), 1]], "first": [], "first_transit": []}
        for number in range(10)
    ]
    record = kept({"slice_ns": 100_000_000, "slices": pieces}, {"stalls": [(0.25, 0.1)]})
    assert record["left_out"] == 3  # from 0.25 s until what had piled up has come, at 0.45 s
    assert record["transit"] == [(10 * (number + 1), 1) for number in (0, 1, 5, 6, 7, 8, 9)]
    assert quantile(record["transit"], 0.5) == 70


def test_what_is_steady_is_between_two_samples() -> None:
    pieces = [{"slice": number, "tokens": 10} for number in range(10)]
    samples = [(number * 250_000_000 + 5, 100 * number) for number in range(4)]
    report = {"began": 5, "slice_ns": 100_000_000, "slices": pieces}
    found = steady(samples, report, 0.2, 0.6)
    assert found == {"steady_cpu": 100, "steady_tokens": 25.0, "steady_seconds": 0.25}
    assert steady(samples, report, 0.3, 0.6) is None


def test_ratios_are_of_the_same_rounds() -> None:
    mine = [{"round": number, "cpu": 2 * number} for number in (1, 2, 3)]
    base = [{"round": number, "cpu": number} for number in (1, 2)]
    found = ratio(mine, base, lambda rows: float(sum(row["cpu"] for row in rows)))
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)
