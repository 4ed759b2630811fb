"""What the benchmark makes of its records: figures, intervals, verdicts, tables, pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from api.bench.calibrate import CHAT, DUTIES, service_of
from api.bench.figures import Record, bulk_rate, bulk_tokens, busy, covered, percentile, ratios, summary
from api.bench.load import OpenLoad, Prompts, Steady
from api.bench.plot import plot
from api.bench.tables import markdown
from api.bench.verdicts import verdicts


def stream(due: float, ttft: float | None, gaps: list[float] | None = None, error: str = "") -> dict[str, Any]:
    found = gaps if gaps is not None else [0.05] * 4
    last = due + (ttft or 0) + sum(found)
    tokens = len(found) + 1 if ttft is not None else 0
    return {"due": due, "ttft": ttft, "last": last, "tokens": tokens, "gaps": found, "error": error}


def record(arm: str, number: int = 1, duty: str = "50", **fields: Any) -> Record:
    return {
        "arm": arm, "target": "V", "round": number, "duty": duty, "seconds": 20.0, "window": 0, "dial": None,
        "streams": [], "bulk": [], "bulk_failed": 0, "wasted": None, "stalls": [], **fields,
    }  # fmt: skip


def people(late: float, slow: float = 0.05, count: int = 18) -> list[dict[str, Any]]:
    """Requests a second apart, whose first token takes `late` to 1.2 `late` seconds."""
    return [stream(at, late * (1 + at % 5 / 20), [slow] * 10) for at in range(count)]


def bulk(rate: int) -> list[tuple[float, int, int]]:
    return [(at + 0.5, rate, 10) for at in range(20)]


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.95, 0.99, 1.0)] == [50.0, 95.0, 99.0, 100.0]
    assert percentile([3.0], 0.99) == 3.0
    assert math.isnan(percentile([], 0.5))


def test_presence_counts_overlapping_requests_once() -> None:
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.6)]) == 4
    row = record("A", streams=[stream(0, 1.0, [1.0]), stream(1, 0.5, [0.5]), stream(19, 1.0, [5.0])])
    assert busy([row]) == pytest.approx((2 + 1) / 20)  # what comes after the block's end is not the block's


def test_only_what_was_completed_within_the_block_counts() -> None:
    row = record("B", window=8, bulk=[(-1.0, 100, 0), (0.0, 100, 0), (0.1, 10, 0), (20.0, 5, 0), (20.1, 100, 0)])
    assert bulk_tokens(row) == 15
    assert bulk_rate([row]) == 0.75
    assert math.isnan(bulk_rate([record("A")]))


def test_a_request_without_a_token_is_infinitely_late() -> None:
    figures = summary([record("A", streams=[*people(0.1, count=9), stream(9, None, [], "503: no")])])
    assert figures["failed"] == 1
    assert figures["ttft50"] < 1
    assert math.isinf(figures["ttft99"])


def test_a_ratio_lies_in_its_interval_and_is_of_the_rounds_that_both_have() -> None:
    mine = [record("V", number, streams=people(0.2 + number / 100)) for number in (1, 2)]
    base = [record("A", number, streams=people(0.1)) for number in (2, 3)]
    found = ratios(mine, base)["ttft50"]
    assert found.value == pytest.approx(2.2)
    assert found.low <= found.value <= found.high
    assert found.high - found.low < 0.01  # the same positions are drawn in both, so that they cancel out
    assert found == ratios(mine, base)["ttft50"]  # the same records say the same


def test_the_interval_of_a_rate_comes_from_slices_of_the_block() -> None:
    uneven = [(at + 0.5, 100 if at < 10 else 20, 0) for at in range(20)]
    mine, base = [record("V", window=8, bulk=uneven)], [record("B", duty="", window=8, bulk=bulk(100))]
    found = ratios(mine, base)["bulk"]
    assert found.value == pytest.approx(0.6)
    assert 0.2 <= found.low < 0.6 < found.high <= 1.0


def test_work_thrown_away_is_a_share_of_all_work() -> None:
    rows = [record("V", window=8, wasted={"lost": 5.0, "done": 95.0}), record("V", 2, window=8)]
    assert summary(rows)["wasted"] == pytest.approx(0.05)
    assert math.isnan(summary([record("C", window=8)])["wasted"])


def run(late: float = 0.12, harvest: int = 80, naive: float = 4.0) -> list[Record]:
    """A whole run, good by default."""
    spared = {"lost": 1.0, "done": 999.0}
    return [
        record("A", streams=people(0.1)),
        record("B", duty="", window=64, bulk=bulk(100)),
        record("V", window=64, streams=people(late), bulk=bulk(harvest), wasted=spared),
        record("V strict", window=64, streams=people(0.11), bulk=bulk(harvest // 2)),
        record("C", window=64, streams=people(naive), bulk=bulk(95)),
        record("S1", window=1, streams=people(0.11), bulk=bulk(40)),
        record("S8", window=8, streams=people(0.5), bulk=bulk(90)),
        record("V", duty="100", window=64, streams=people(0.2), bulk=bulk(20)),
    ]


def test_a_good_run_meets_every_bar() -> None:
    found = verdicts(run())
    assert [one.word for one in found] == ["met"] * len(found)
    caps = next(one for one in found if "fixed window" in one.bar)
    assert caps.measured.endswith("over S1")  # S8 gets more bulk done, but is not as gentle
    assert caps.measured.startswith("2.00")


def test_a_bad_run_is_told_so() -> None:
    missed = {one.bar for one in verdicts(run(late=0.3, harvest=30, naive=0.9)) if one.met is False}
    assert {bar.partition(" ")[0] for bar in missed} == {"TTFT", "bulk"}
    assert len(missed) == 4  # TTFT of V, harvest, C against V, fixed windows


def test_what_did_not_run_has_no_verdict() -> None:
    found = verdicts(run()[:2])
    assert {one.met for one in found} == {None}
    assert {one.word for one in found} == {"not measured"}
    assert verdicts([record("B", duty="", window=8, bulk=bulk(1))]) == []


def test_a_verdict_that_chance_could_turn_says_so() -> None:
    once_late = [*people(0.1, count=19), *(stream(at, 0.239) for at in (0, 5))]
    first = verdicts([record("A", streams=people(0.1, count=21)), record("V", window=8, streams=once_late)])[0]
    assert first.met
    assert not first.sure
    assert "within chance" in first.word


def test_tables_have_every_arm_and_the_machine() -> None:
    text = markdown(run(), {"cpu": "a fast one", "versions": {"vllm": "1.2.3"}})
    assert "a fast one" in text
    assert "vllm 1.2.3" in text
    for arm in ("A", "B", "C", "V", "V strict", "S1", "S8"):
        assert f"\n| {arm} |" in text
    assert "nan" not in text


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    plot(run(), tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("service", [0.05, 1.5])
@pytest.mark.parametrize("name", ["10", "50", "bursts"])
def test_people_are_there_as_long_as_wanted_at_any_speed(name: str, service: float) -> None:
    duty = DUTIES[name]
    load = duty.load(service, 60, seed=3)
    assert isinstance(load, OpenLoad)
    arrivals = load.arrivals(60, 3)
    assert arrivals == load.arrivals(60, 3)
    assert arrivals != load.arrivals(60, 4)
    each = 2 * service if duty.bursts else service
    there = covered((at, min(at + each, 60)) for at in arrivals) / 60
    assert there == pytest.approx(duty.share, abs=0.1)


def test_always_means_that_one_is_always_there() -> None:
    assert DUTIES["100"].load(1.5, 60, seed=3) == Steady(CHAT, pause=1.5)


def test_the_length_of_an_answer_is_measured_anew_where_enough_came() -> None:
    assert service_of(record("A", streams=people(0.1)), 9.0) == pytest.approx(0.61, abs=0.01)
    assert service_of(record("A", streams=people(0.1, count=2)), 9.0) == 9.0


def test_prompts_never_repeat() -> None:
    mine, others = Prompts(1), Prompts(2)
    words = [prompts.item(CHAT)["messages"][0]["content"].split()[0] for prompts in (mine, mine, others, others)]
    assert len(set(words)) == 4
