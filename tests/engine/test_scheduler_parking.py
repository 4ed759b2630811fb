"""Who is parked, and for how long."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.scheduler.parking import TURN, Parking


class TestParking:
    NAMES = ("a", "b", "c", "d")

    def test_the_oldest_run(self) -> None:
        assert Parking().choose(self.NAMES, 2, now=0.0, max_parked=10.0) == {"a", "b"}

    def test_nobody_is_parked_when_there_is_room(self) -> None:
        parking = Parking()
        assert parking.choose(self.NAMES, 9, now=0.0, max_parked=10.0) == set(self.NAMES)
        assert parking.longest(5.0) == 0.0

    def test_who_waited_too_long_gets_a_whole_turn(self) -> None:
        parking = Parking()
        parking.choose(self.NAMES, 1, now=0.0, max_parked=10.0)
        turns = [parking.choose(self.NAMES, 1, now=10.0 + step / 100, max_parked=10.0) for step in range(TURN)]
        assert turns == [{"b"}] * TURN
        assert parking.choose(self.NAMES, 1, now=11.0, max_parked=10.0) == {"c"}

    @given(st.integers(2, 12), st.integers(1, 3))
    def test_everybody_runs_within_the_bound_and_a_round_of_turns(self, many: int, seats: int) -> None:
        parking = Parking()
        names = [str(n) for n in range(many)]
        ran: set[str] = set()
        for step in range(TURN * (many + 2)):
            ran |= parking.choose(names, seats, now=float(step), max_parked=5.0)
        assert ran == set(names)

    @given(st.lists(st.integers(0, 6), max_size=60))
    def test_never_more_than_there_are_seats(self, seats: list[int]) -> None:
        parking = Parking()
        for now, free in enumerate(seats):
            chosen = parking.choose(self.NAMES, free, now=float(now), max_parked=3.0)
            assert len(chosen) == min(free, 4)
