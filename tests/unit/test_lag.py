"""Lag in seconds follows from who saw which position when, not from the clock or the word of the replica."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.scaling.lag import Timeline

HORIZON = 20.0


def timeline(*seen: tuple[float, int]) -> Timeline:
    made = Timeline(HORIZON)
    for moment, position in seen:
        made.note(position, moment)
    return made


def test_a_replica_is_behind_since_the_first_position_that_it_lacks() -> None:
    seen = timeline((1, 100), (2, 200), (3, 300))
    assert [seen.behind(replayed, now=5) for replayed in (0, 100, 150, 200, 300, 400)] == [4, 3, 3, 2, 0, 0]


def test_an_idle_log_makes_nobody_late() -> None:
    assert timeline((1, 100)).behind(100, now=1000) == 0


def test_before_anything_is_known_nobody_is_behind() -> None:
    assert timeline().behind(0, now=1000) == 0
    assert timeline().latest == 0


@pytest.mark.sabotage(
    path="app/scaling/lag.py",
    take_out="bisect_right(self._moments, now - self._horizon) - 1",
    put="bisect_right(self._moments, now - self._horizon)",
)
def test_what_lies_beyond_the_horizon_is_forgotten_and_who_lacks_it_stays_late() -> None:
    seen = timeline((0, 100), (100, 200))
    assert seen.behind(50, now=100) == 100
    assert seen.behind(100, now=100) == 0


def test_a_new_primary_with_a_shorter_log_makes_nobody_late() -> None:
    seen = timeline((1, 100), (2, 200))
    seen.restart(150, now=3)
    assert (seen.latest, seen.behind(150, now=9), seen.behind(149, now=9)) == (150, 0, 6)


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 1000)), min_size=1, max_size=200), st.integers(0, 1000))
def test_lag_is_exact_within_the_horizon_and_never_understated_beyond_it(
    steps: list[tuple[float, int]], replayed: int
) -> None:
    made, now, all_seen = Timeline(HORIZON), 0.0, []
    for seconds, position in steps:
        now += seconds
        made.note(position, now)
        all_seen.append((now, position))
        missing = [moment for moment, seen in all_seen if seen > replayed]
        true_lag = now - missing[0] if missing else 0.0
        told = made.behind(replayed, now)
        assert told == true_lag if true_lag <= HORIZON else told >= HORIZON
