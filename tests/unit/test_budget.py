"""What a fleet may open on a server is known before it starts, and what does not fit is refused with what to change."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.settings import DatabaseSettings
from app.scaling.budget import Fleet, misfits, most_of_a_process
from app.scaling.dialect import Limits

FLEET = Fleet(instances=8, surge=2, worker_children=8, relays=1)


def test_a_pool_starts_from_the_cores_and_spindles_of_the_server() -> None:
    assert DatabaseSettings(cores=4, spindles=1).connections == 9
    assert DatabaseSettings(cores=4, spindles=1, pool_size=3).connections == 3


@pytest.mark.sabotage(path="app/scaling/budget.py", take_out="needed <= limits.connections:", put="needed > 0:")
def test_what_does_not_fit_is_refused_with_what_to_change() -> None:
    settings = DatabaseSettings(cores=2, spindles=1)
    (sentence,) = misfits("shard 0, primary", Limits(97, ()), FLEET, settings)
    assert sentence == (
        "shard 0, primary: 20 processes with up to 11 connections each need 220, it allows 97; set "
        "DATABASE_POOL_SIZE=1, or raise max_connections by 123, or put PgBouncer before it and set "
        "DATABASE_POOLER=transaction."
    )
    assert misfits("it", Limits(220, ()), FLEET, settings) == []


@given(st.integers(1, 40), st.integers(1, 2000), st.integers(1, 30))
def test_whoever_follows_the_advice_fits(instances: int, allowed: int, pool_size: int) -> None:
    settings, fleet = DatabaseSettings(pool_size=pool_size), Fleet(instances, 1, 4, 1)
    for sentence in misfits("it", Limits(allowed, ()), fleet, settings):
        if "DATABASE_POOL_SIZE=" in sentence:
            smaller = int(sentence.partition("DATABASE_POOL_SIZE=")[2].partition(",")[0])
            assert misfits("it", Limits(allowed, ()), fleet, DatabaseSettings(pool_size=smaller)) == []
        if "or run" in sentence:
            fewer = int(sentence.partition("or run ")[2].partition(" ")[0])
            assert misfits("it", Limits(allowed, ()), Fleet(fewer, 1, 4, 1), settings) == []
        raised = allowed + int(sentence.partition("max_connections by ")[2].partition(",")[0])
        assert misfits("it", Limits(raised, ()), fleet, settings) == []


def test_a_server_without_time_limits_is_refused() -> None:
    limits = Limits(1000, (("statement_timeout", "X sets it"), ("lock_timeout", "Y sets it")))
    (sentence,) = misfits("it", limits, FLEET, DatabaseSettings())
    assert "statement_timeout is off" in sentence
    # A lock's comes with each connection, which a pooler would give to somebody else next.
    assert len(misfits("it", limits, FLEET, DatabaseSettings(pooler="transaction"))) == 2


def test_behind_a_pooler_the_servers_connections_are_the_poolers_to_bound() -> None:
    settings = DatabaseSettings(pooler="transaction")
    assert most_of_a_process(settings) * FLEET.processes > 10
    assert misfits("it", Limits(10, ()), FLEET, settings) == []
