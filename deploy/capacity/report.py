"""A plan for people and for programs: what a load needs, what that costs a month, and how both were reckoned."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import typer

from deploy.capacity import ImpossibleError, figures
from deploy.capacity.figures import Figures
from deploy.capacity.model import Demand, Installation, plan
from deploy.terraform import costs

PLANNED, REFUSED = 0, 2
PAGE = Path(__file__).parents[2] / "docs" / "operations" / "capacity.md"
SHOWN = Demand(1_000)  # on the page


def tell(
    requests: float,
    hit_rate: float,
    read_share: float,
    order_share: float,
    *,
    allowed: int,
    pooler: bool,
    as_json: bool,
) -> int:
    """Print the plan for a load.

    Returns:
        0, or 2 if the load cannot be or what it takes does not fit.
    """
    try:
        demand, measured = Demand(requests, hit_rate, read_share, order_share), figures.read()
        made = plan(demand, measured, allowed=allowed, pooler=pooler)
    except ImpossibleError as error:
        typer.echo(str(error), err=True)
        return REFUSED
    typer.echo(json.dumps(_values(demand, made, measured), indent=2) if as_json else _words(demand, made, measured))
    return PLANNED


def written(page: str) -> str:
    """Return the page with the plan of today's figures in its place."""
    measured = figures.read()
    said = _words(SHOWN, plan(SHOWN, measured), measured)
    return re.sub(r"(?s)(\$ scaleout plan --rps 1000\n).*?(?=\n\$)", lambda found: found[1] + said, page)


def _words(demand: Demand, made: Installation, measured: Figures) -> str:
    name, prices = costs.newest_prices()
    by_kind = costs.costs(made, prices)
    nodes = costs.REDIS_NODES * made.redis_shards
    needs = {
        "API": f"{made.instances} instances on {made.api} machines {made.machine}",
        "workers": f"{made.worker_processes} workers and {made.workers} relays on {made.workers} machines",
        "databases": f"{made.shards} x (primary with standby, {made.replicas} replicas), {made.database}",
        "pools": f"DATABASE_POOL_SIZE={made.pool_size}",
        "connections": f"{made.connections:,} of {made.allowed:,} on each database server",
        "Redis": f"{made.kept / 1e9:.2f} GB kept, {made.cached / 1e9:.2f} GB cached; {nodes} nodes {made.redis}",
        "a month": f"{sum(by_kind.values()):,.0f} USD: "
        + ", ".join(f"{kind} {cost:,.0f}" for kind, cost in by_kind.items()),
    }
    return "\n".join(
        [
            (
                f"For {demand.requests:,g} requests a second at the peak, {demand.read_share:.0%} of them reads, "
                f"{demand.hit_rate:.0%} of those from the cache:"
            ),
            "",
            *(f"  {what:12} {how}" for what, how in needs.items()),
            "",
            "How that was reckoned:",
            *(f"  {number}. {step}" for number, step in enumerate(made.steps, 1)),
            "",
            "Measured:",
            *(f"  {one.what}: {one.value:,g} {one.unit} ({one.file}, {one.date})" for one in measured.all),
            f"Prices: deploy/terraform/{name} of {prices['written']}, an estimate from list prices.",
            "Assumed: what stands at the top of deploy/capacity/model.py and deploy/terraform/costs.py.",
        ]
    )


def _values(demand: Demand, made: Installation, measured: Figures) -> dict[str, Any]:
    name, prices = costs.newest_prices()
    by_kind = costs.costs(made, prices)
    plain = dataclasses.asdict(made)
    steps = plain.pop("steps")
    return {
        "demand": dataclasses.asdict(demand),
        "plan": plain
        | {"instances": made.instances, "worker_processes": made.worker_processes, "relays": made.workers},
        "usd_a_month": {kind: round(cost, 2) for kind, cost in by_kind.items()}
        | {"all": round(sum(by_kind.values()), 2)},
        "steps": steps,
        "measured": [dataclasses.asdict(one) for one in measured.all],
        "prices": {"file": f"deploy/terraform/{name}", "date": prices["written"]},
    }
