"""How long steps take, told from the calls of the engine loop."""

from __future__ import annotations

import pytest

from engine.scheduler.clock import Step, StepClock


class TestClock:
    STEP = Step(decodes=3, prefill=0, interactive=False)

    def test_an_asynchronous_step_begins_when_the_one_before_it_ends(self) -> None:
        now = [0.0]
        clock = StepClock(synchronous=False, now=lambda: now[0])
        clock.handed_over(1, self.STEP)
        now[0] = 0.001
        clock.handed_over(2, self.STEP)
        now[0] = 0.010
        first = clock.finished(1)
        now[0] = 0.018
        second = clock.finished(2)
        assert first is not None
        assert second is not None
        assert first.seconds == pytest.approx(0.010)
        assert second.seconds == pytest.approx(0.008)

    def test_waiting_for_work_is_not_a_step(self) -> None:
        now = [0.0]
        clock = StepClock(synchronous=False, now=lambda: now[0])
        clock.handed_over(1, self.STEP)
        now[0] = 0.010
        clock.finished(1)
        now[0] = 60.0
        clock.handed_over(2, self.STEP)
        now[0] = 60.010
        timed = clock.finished(2)
        assert timed is not None
        assert timed.seconds == pytest.approx(0.010)

    def test_a_synchronous_step_ends_when_the_loop_is_back(self) -> None:
        now = [0.0]
        clock = StepClock(synchronous=True, now=lambda: now[0])
        clock.handed_over(1, self.STEP)
        now[0] = 0.030
        timed = clock.called()
        assert timed is not None
        assert timed.seconds == pytest.approx(0.030)
        assert clock.called() is None
        assert clock.finished(1) is None
