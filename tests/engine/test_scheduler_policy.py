"""The co-serving policy, without vLLM: the learned model, the grants, and the dial."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduler.model import Curve, StepModel
from engine.scheduler.policy import SMALLEST_BESIDE, SMALLEST_CHUNK, WAIT_SHARE, Absence, Demand, Policy, largest
from engine.scheduler.settings import ControlFolder, Dial

BUDGET = 8192


def dense(decodes: int, prefill: int) -> float:
    """A CPU, or a dense model: every sequence costs the same."""
    return 0.034 + 0.002 * decodes + 0.0008 * prefill


def experts(decodes: int, prefill: int) -> float:
    """A mixture of experts on a GPU: steep while more experts are read, then flat; prompts leave the captured graph."""
    tokens = decodes + prefill
    return 0.004 + 0.010 * (1 - 0.94**tokens) + 0.00002 * tokens + (0.003 if prefill else 0.0)


def demand(**changes: Any) -> Demand:
    values = {"decodes": 0, "prefill": 0, "waiting": 0, "batch_decodes": 64, "token_budget": BUDGET}
    return Demand(**(values | changes))


def taught(cost: Any, *, steps: int = 3000, noise: float = 0.0) -> StepModel:
    """A model that has seen a mixture of steps."""
    rng = random.Random(5)  # noqa: S311 - a fixed mixture, not a secret
    model = StepModel()
    for _ in range(steps):
        decodes, prefill = round(256 ** rng.random()), rng.choice([0, 0, round(2048 ** rng.random())])
        model.observe(decodes, prefill, cost(decodes, prefill) * (1 + rng.uniform(-noise, noise)))
    return model


class TestModel:
    def test_knows_nothing_at_first(self) -> None:
        model = StepModel()
        assert not model.known
        assert model.seconds(8, 100) == 0.0

    @pytest.mark.parametrize("cost", [dense, experts])
    @pytest.mark.parametrize("decodes", [1, 3, 12, 50, 200])
    def test_predicts_decode_steps_within_a_tenth(self, cost: Any, decodes: int) -> None:
        model = taught(cost, noise=0.1)
        assert model.seconds(decodes, 0) == pytest.approx(cost(decodes, 0), rel=0.1)

    @given(st.lists(st.tuples(st.integers(1, 9000), st.floats(1e-4, 10.0)), min_size=1, max_size=50))
    def test_a_curve_never_falls(self, seen: list[tuple[int, float]]) -> None:
        curve = Curve(tuple(2**n for n in range(14)))
        for size, seconds in seen:
            curve.observe(size, seconds)
        values = [curve.at(size) for size in range(1, 9000, 97)]
        assert all(a <= b + 1e-12 for a, b in pairwise(values))

    def test_one_long_pause_does_not_count_as_a_cost(self) -> None:
        model = StepModel()
        for _ in range(50):
            model.observe(4, 0, 0.010)
        model.observe(4, 0, 30.0)
        assert model.seconds(4, 0) < 0.014

    def test_follows_an_engine_that_became_slower(self) -> None:
        model = StepModel()
        for seconds in [0.010] * 100 + [0.020] * 60:
            model.observe(4, 0, seconds)
        assert model.seconds(4, 0) == pytest.approx(0.020, rel=0.05)


class TestGrantBesidePeople:
    @pytest.mark.parametrize("cost", [dense, experts])
    @pytest.mark.parametrize("ratio", [1.05, 1.2, 1.5])
    @pytest.mark.parametrize("people", [1, 4, 16, 60])
    def test_fills_the_step_up_to_the_ratio_and_not_beyond(self, cost: Any, ratio: float, people: int) -> None:
        policy = Policy(taught(cost), Dial(interactive_ratio=ratio, batch_floor=0))
        grant = policy.grant(demand(decodes=people))
        limit = ratio * cost(people, 0)
        assert cost(people + grant.decodes, 0) <= limit * 1.1
        best = largest(lambda n: cost(people + n, 0), limit * 0.9, 64)
        assert grant.decodes >= best

    def test_a_person_who_only_waits_counts_as_present(self) -> None:
        policy = Policy(taught(dense), Dial(batch_floor=0))
        grant = policy.grant(demand(prefill=200, waiting=1))
        assert grant.decodes < 64
        assert grant.prefill == 0

    def test_no_batch_prompt_goes_before_a_person_who_waits_for_a_seat(self) -> None:
        policy = Policy(taught(dense), Dial(interactive_ratio=50.0))
        assert policy.grant(demand(decodes=2, prefill=10, waiting=1, batch_decodes=0)).prefill == 0
        assert policy.grant(demand(decodes=2, prefill=10, waiting=0, batch_decodes=0)).prefill > SMALLEST_CHUNK

    def test_the_floor_wins_over_the_ratio_and_says_so(self) -> None:
        policy = Policy(taught(dense), Dial(interactive_ratio=1.0, batch_floor=2))
        grant = policy.grant(demand(decodes=1))
        assert (grant.decodes, grant.floor) == (2, True)

    def test_now_and_then_a_step_is_kept_pure_to_see_what_people_cost_alone(self) -> None:
        policy = Policy(taught(dense), Dial(interactive_ratio=1.5, batch_floor=2))
        assert sum(policy.grant(demand(decodes=1)).decodes == 0 for _ in range(640)) == 10

    def test_a_floor_of_nothing_may_stop_batch(self) -> None:
        policy = Policy(taught(dense), Dial(interactive_ratio=1.0, batch_floor=0))
        grants = [policy.grant(demand(decodes=1)).decodes for _ in range(640)]
        assert sum(g > 0 for g in grants) == 10  # one step in 64 looks whether the engine became faster

    def test_the_floor_also_brings_new_prompts_in_now_and_then(self) -> None:
        policy = Policy(taught(dense), Dial(interactive_ratio=1.0, batch_floor=1))
        chunks = [policy.grant(demand(decodes=1, batch_decodes=0)).prefill for _ in range(240)]
        given = [c for c in chunks if c]
        assert len(given) == 19  # every twelfth step, but for the one that is kept pure, too
        assert given.count(SMALLEST_CHUNK) / len(chunks) < 0.05 < given.count(SMALLEST_BESIDE)

    def test_a_little_prompt_in_every_step_once_it_is_known_to_fit(self) -> None:
        def linear(decodes: int, prefill: int) -> float:
            return 0.020 + 0.002 * (decodes - 1) + 0.0007 * prefill

        model = StepModel()
        for decodes, prefill in [(1, 0), (8, 0), (1, 64), (1, 256)]:
            model.observe(decodes, prefill, linear(decodes, prefill))
        policy = Policy(model, Dial(batch_floor=1))
        for _ in range(600):
            grant = policy.grant(demand(decodes=1, batch_decodes=0))
            policy.model.observe(1, grant.prefill, linear(1, grant.prefill))
        grants = [policy.grant(demand(decodes=1, batch_decodes=0)) for _ in range(62)]
        assert sum(g.floor for g in grants) == 0
        assert {g.prefill for g in grants} - {0} == {5}  # 0.7 ms each, of the 4 ms that the ratio leaves

    def test_never_more_tokens_than_the_step_has(self) -> None:
        policy = Policy(taught(dense), Dial(interactive_ratio=100.0))
        for people, prompt, batch in [(10, 500, 600), (500, 0, 100), (0, 512, 64)]:
            grant = policy.grant(demand(decodes=people, prefill=prompt, batch_decodes=batch, token_budget=512))
            assert grant.decodes + grant.prefill <= 512


class TestGrantAlone:
    def test_batch_runs_in_full_when_a_step_of_it_is_short(self) -> None:
        grant = Policy(taught(experts), Dial()).grant(demand())
        assert grant.decodes == 64

    def test_a_step_lasts_no_longer_than_the_next_first_token_can_bear(self) -> None:
        for ratio in (1.05, 1.2, 2.0):
            policy = Policy(taught(dense), Dial(interactive_ratio=ratio))
            grant = policy.grant(demand(batch_decodes=200))
            assert 0 < dense(grant.decodes, grant.prefill) <= policy.longest_alone() * 1.15

    def test_a_wider_dial_lets_longer_steps_run(self) -> None:
        model = taught(dense)
        lengths = [Policy(model, Dial(interactive_ratio=r)).longest_alone() for r in (1.1, 1.2, 1.5)]
        assert lengths == sorted(lengths)
        assert lengths[0] < lengths[2]

    def test_something_always_starts(self) -> None:
        policy = Policy(taught(dense), Dial(interactive_ratio=1.0))
        assert policy.grant(demand(batch_decodes=0)).prefill >= SMALLEST_CHUNK

    def test_before_anything_is_known_it_learns_from_batch(self) -> None:
        policy = Policy(StepModel(), Dial())
        grant = policy.grant(demand(batch_decodes=0))
        assert 0 < grant.prefill <= BUDGET
        assert grant.room > 0


class TestAbsence:
    @staticmethod
    def gone(absence: Absence, at: float, back_after: float) -> bool:
        """Whether somebody who goes at that time is awaited; and they come back."""
        awaited = absence.look(there=False, now=at, step=0.2)
        absence.look(there=True, now=at + back_after, step=0.2)
        return awaited

    def test_who_comes_back_at_once_again_and_again_is_awaited(self) -> None:
        absence = Absence()
        awaited = [self.gone(absence, at, 0.01) for at in range(8)]
        assert awaited == [False] * 4 + [True] * 4

    def test_who_comes_back_later_is_not(self) -> None:
        absence = Absence()
        assert not any(self.gone(absence, at, 0.5) for at in range(50))
        for at in range(50, 100):
            self.gone(absence, at, 0.01)
        assert absence.look(there=False, now=100.0, step=0.2)
        for at in range(101, 120):
            self.gone(absence, at, 0.5)
        assert not absence.look(there=False, now=120.0, step=0.2)

    def test_nobody_is_awaited_for_longer_than_a_step(self) -> None:
        absence = Absence()
        for at in range(50):
            self.gone(absence, at, 0.01)
        assert [absence.look(there=False, now=60 + after, step=0.2) for after in (0, 0.1, 0.19, 0.21, 9)] == [
            True, True, True, False, False,
        ]  # fmt: skip

    def test_meanwhile_steps_are_short(self) -> None:
        policy = Policy(taught(dense), Dial())
        usual, awaited = policy.grant(demand()), policy.grant(demand(awaited=True))
        assert 0 < awaited.decodes < usual.decodes / 2
        assert awaited.room == usual.room


@pytest.mark.parametrize("cost", [dense, experts])
@pytest.mark.parametrize("slower", [1.0, 2.0, 0.5])
def test_from_nothing_it_learns_to_keep_the_promise_and_to_use_what_it_leaves(cost: Any, slower: float) -> None:
    """Four people come and go; after a third of the time the machine may become slower, faster, or stay as it is."""
    rng = random.Random(2)  # noqa: S311 - a fixed story
    policy = Policy(StepModel(), Dial(interactive_ratio=1.2, batch_floor=0))
    ratios: list[float] = []
    grants: list[int] = []
    alone: list[float] = []
    for step in range(6000):
        people = 4 if step // 150 % 2 else 0
        prompt = 256 if people and step % 150 < 4 else 0
        grant = policy.grant(demand(decodes=people, prefill=prompt, batch_decodes=64))
        seconds = cost(people + grant.decodes, prompt + grant.prefill)
        pace = (slower if step > 2000 else 1.0) * rng.uniform(0.95, 1.05)
        policy.model.observe(people + grant.decodes, prompt + grant.prefill, seconds * pace)
        if step > 3000 and people and not prompt:
            ratios.append(seconds / cost(people, 0))
            grants.append(grant.decodes)
        elif step > 3000 and not people:
            alone.append(seconds)
    best = largest(lambda n: cost(4 + n, 0), 1.2 * cost(4, 0), 64)
    assert sorted(ratios)[len(ratios) // 2] <= 1.23
    assert sorted(ratios)[len(ratios) * 99 // 100] <= 1.35
    if slower >= 1.0:  # how long a lonely prompt takes is rarely seen: a faster engine is noticed later here
        assert sorted(alone)[len(alone) * 95 // 100] <= 1.2 * WAIT_SHARE * 0.2 * max(cost(1, 256), cost(64, 0), 0.04)
    assert sum(grants) / len(grants) >= 0.7 * best


@given(st.integers(0, 500), st.floats(0.0, 100.0))
def test_largest_is_the_largest(most: int, limit: float) -> None:
    found = largest(float, limit, most)
    assert found == max([0, *(n for n in range(most + 1) if n <= limit)])


class TestDial:
    def test_reads_the_environment(self) -> None:
        dial = Dial.from_environment({"VELOCITY_INTERACTIVE_RATIO": "1.5", "VELOCITY_BATCH_FLOOR": "0", "OTHER": "x"})
        assert (dial.interactive_ratio, dial.batch_floor) == (1.5, 0)

    @pytest.mark.parametrize(
        ("name", "value"), [("INTERACTIVE_RATIO", "0.9"), ("BATCH_FLOOR", "much"), ("KV_RESERVE", "1")]
    )
    def test_names_the_variable_that_makes_no_sense(self, name: str, value: str) -> None:
        with pytest.raises(ValueError, match=f"VELOCITY_{name}"):
            Dial.from_environment({f"VELOCITY_{name}": value})

    def test_is_turned_while_the_engine_runs(self, tmp_path: Path) -> None:
        folder = ControlFolder(tmp_path)
        before = Dial()
        assert folder.dial(before) is before
        (tmp_path / "dial.json").write_text('{"interactive_ratio": 2, "batch_floor": 3.0, "unknown": 1}')
        turned = folder.dial(before)
        assert turned == Dial(interactive_ratio=2.0, batch_floor=3)
        assert folder.dial(turned) is turned

    def test_reports_whole_files(self, tmp_path: Path) -> None:
        ControlFolder(tmp_path).report({"steps": 3})
        assert json.loads((tmp_path / "status.json").read_text()) == {"steps": 3}
        assert [p.name for p in tmp_path.iterdir()] == ["status.json"]
