"""What a piece of work must see: the newest of the positions that it is told of, and an unknown one for a time only."""

import pytest

from app.core import context
from app.core.context import NEWEST, Work, unknown_position


def test_the_newest_position_counts() -> None:
    work = Work("test")
    for position in (5, 9, 7):
        work.reached(0, position)
    assert (work.position(0), work.position(1)) == (9, 0)


@pytest.mark.sabotage(
    path="app/core/context.py",
    take_out="return position >= NEWEST and position - NEWEST <= time() * 1000",
    put="return False",
)
def test_an_unknown_position_binds_until_it_runs_out_also_whoever_passes_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work("test")
    work.reached(0, 5)
    unknown = unknown_position(30)
    work.reached(0, unknown)
    work.reached(0, 7)
    assert work.position(0) == unknown >= NEWEST
    now = context.time() + 31
    monkeypatch.setattr(context, "time", lambda: now)
    assert work.position(0) == 0
    # From then on what is known counts again, and the unknown one is not taken over from anybody.
    work.reached(0, 8)
    work.reached(0, unknown)
    assert (work.position(0), work.positions) == (8, {0: 8})
