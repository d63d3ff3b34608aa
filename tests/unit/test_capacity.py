"""`scaleout plan`: more load never takes fewer machines, its sums are those of the check, nonsense is refused."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from app.cli import cli
from app.core.settings import DatabaseSettings
from app.scaling.budget import misfits, most_of_a_process
from app.scaling.dialect import Limits
from deploy.capacity import ImpossibleError, figures
from deploy.capacity.model import CORES, FEWEST, MOST, TARGET, Demand, plan
from deploy.terraform import costs

MEASURED = figures.read()
PLENTY = 10_000_000  # connections
SHARES = st.floats(0, 1)


def told(*options: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, ["plan", *options])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.sabotage("deploy/capacity/model.py", "cores = spent * BESIDES", "cores = spent * BESIDES % 4")
@example(1_000.0, 1.5, 0.0, 0.0, 0.0)
@given(st.floats(0.1, 2_000), st.floats(1, 5), SHARES, SHARES, st.floats(0, 0.2))
def test_more_load_never_takes_fewer_of_anything_that_carries_it(
    requests: float, more: float, hit_rate: float, read_share: float, order_share: float
) -> None:
    less, greater = (
        plan(Demand(rate, hit_rate, read_share, order_share), MEASURED, allowed=PLENTY, pooler=True)
        for rate in (requests, requests * more)
    )
    assert less.instances <= greater.instances
    assert less.worker_processes <= greater.worker_processes
    assert less.shards <= greater.shards
    # Not the connections: more instances share larger servers, so each of them needs a smaller pool.
    assert less.fleet.processes <= greater.fleet.processes
    assert less.kept <= greater.kept
    assert less.cached <= greater.cached
    _, prices = costs.newest_prices()
    assert sum(costs.costs(less, prices).values()) <= sum(costs.costs(greater, prices).values())


@given(st.floats(0.1, 50_000), SHARES, SHARES)
def test_a_better_hit_rate_never_takes_more_machines(requests: float, worse: float, better: float) -> None:
    worse, better = sorted((worse, better))
    made = [plan(Demand(requests, rate), MEASURED, allowed=PLENTY, pooler=True) for rate in (worse, better)]
    assert made[0].instances >= made[1].instances


@pytest.mark.sabotage("deploy/capacity/model.py", "1 + math.ceil(cores / (CORES * MOST))", "0")
def test_the_load_still_fits_when_a_machine_is_gone() -> None:
    # In steps of a percent: between few and many machines it is the loss of one that decides, and only there.
    for requests in (100 * 1.01**step for step in range(600)):
        made = plan(Demand(requests), MEASURED, allowed=PLENTY, pooler=True)
        # The cores it takes, from the sentence that says so.
        cores = float(made.steps[1].rpartition(": ")[2].partition(" cores")[0].replace(",", ""))
        assert cores <= made.api * CORES * TARGET + 0.01
        assert cores <= (made.api - 1) * CORES * MOST + 0.01
        assert made.api >= FEWEST


@pytest.mark.sabotage(
    "deploy/capacity/model.py", "usual = max(fewest, _pools(None, pooler=pooler).connections)", "usual = 200"
)
@given(st.floats(1, 100_000), st.integers(100, 3_000))
def test_what_is_planned_fits_by_the_sums_of_the_check(requests: float, allowed: int) -> None:
    try:
        made = plan(Demand(requests), MEASURED, allowed=allowed)
    except ImpossibleError as refused:
        assert "put PgBouncer before each (--pooler)" in str(refused)  # noqa: PT017 - both ends are right
        assert plan(Demand(requests), MEASURED, allowed=allowed, pooler=True).pool_size >= 2
        return
    pools = DatabaseSettings(cores=2, spindles=1, pool_size=made.pool_size)
    assert misfits("it", Limits(allowed, ()), made.fleet, pools) == []
    assert made.connections == made.fleet.processes * most_of_a_process(pools) <= allowed
    assert made.pool_size <= DatabaseSettings(cores=2, spindles=1).connections


@pytest.mark.sabotage("deploy/capacity/model.py", "if not 0 <= share <= 1:", "if share == 2:")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rps", "0"), "--rps is 0; it must be a number of requests a second above 0."),
        (("--rps", "-5"), "--rps is -5; it must be a number of requests a second above 0."),
        (("--rps", "nan"), "--rps is nan; it must be a number of requests a second above 0."),
        (("--rps", "inf"), "--rps is inf; it must be a number of requests a second above 0."),
        (("--rps", "10", "--hit-rate", "1.2"), "--hit-rate is 1.2; it is a share, so it must lie between 0 and 1."),
        (("--rps", "10", "--read-share", "90"), "--read-share is 90; it is a share, so it must lie between 0 and 1."),
        (("--rps", "10", "--read-share", "nan"), "--read-share is nan; it is a share, so it must lie between 0 and 1."),
        (("--rps", "10", "--order-share", "-1"), "--order-share is -1; it is a share, so it must lie between 0 and 1."),
        (("--rps", "10", "--connections", "40"), "put PgBouncer before each (--pooler), or raise max_connections by"),
        (("--rps", "10", "--connections", "0"), "--connections is 0; it must be at least 1."),
        (("--rps", "9000000", "--pooler"), "set REDIS_CONNECTIONS="),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_change(options: tuple[str, ...], said: str) -> None:
    code, out, err = told(*options)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1


@pytest.mark.sabotage("deploy/capacity/figures.py", "found = found[step]", "found = found.get(step, 100.0)")
def test_every_figure_comes_from_a_file_that_says_when_it_was_measured(tmp_path: Path) -> None:
    code, out, _ = told("--rps", "1000")
    assert code == 0
    for one in MEASURED.all:
        file = figures.CHECKOUT / one.file
        assert json.loads(file.read_bytes())["machine"]["date"] == one.date
        assert f"({one.file}, {one.date})" in out
    with pytest.raises(ImpossibleError, match=r"bench\.json is missing: .* measure"):
        figures.read(tmp_path)
    (tmp_path / "bench.json").write_text('{"machine": {"date": "2026-11-21"}, "cpu_us_per_request": {}}')
    with pytest.raises(ImpossibleError, match=r"does not say cpu_us_per_request\.l2"):
        figures.read(tmp_path)


def test_programs_get_the_same_plan_as_people() -> None:
    options = ("--rps", "3000", "--hit-rate", "0.5", "--read-share", "0.8")
    _, words, _ = told(*options)
    _, text, _ = told(*options, "--json")
    found = json.loads(text)
    made = found["plan"]
    assert f"{made['instances']} instances on {made['api']} machines {made['machine']}" in words
    assert f"{made['connections']:,} of {made['allowed']:,} on each database server" in words
    assert f"{found['usd_a_month']['all']:,.0f} USD" in words
    for step in found["steps"]:
        assert step in words
    # It is the model of the cost table, not a second one.
    _, prices = costs.newest_prices()
    usual = json.loads(told("--rps", "1000", "--json")[1])
    assert usual["usd_a_month"]["all"] == pytest.approx(sum(costs.costs(costs.size(1000), prices).values()), abs=0.01)
