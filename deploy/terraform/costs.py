"""What an installation of deploy/terraform costs a month at six sizes, as the table of docs/deployment/aws.md.

`python -m deploy.terraform.costs` writes the table into the page. How many machines a size needs follows from what was
measured and from the assumptions below; what they cost follows from the newest price file beside this one. It is an
estimate to compare sizes by, not an offer.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.core.settings import DatabaseSettings
from app.scaling.budget import Fleet, most_of_a_process

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "deployment" / "aws.md"
BEGIN, END = "<!-- costs: python -m deploy.terraform.costs -->\n", "<!-- end of costs -->\n"

SIZES = (20, 100, 500, 1_000, 3_000, 10_000)  # requests a second at the peak

# Measured, see docs/deployment/autoscaling.md and loadtests/bench/results/saga.json.
CPU_SECONDS = 0.003  # of one request, all of it: the mean of three reads by a signed-in caller
ORDERS_OF_A_WORKER = 14.1  # orders a second that one worker carries to the end

# Assumed. Change them to your own and run it again.
TARGET = 0.6  # share of CPU that the Auto Scaling group aims at
MEAN = 1 / 3  # of the peak, over a month
ORDERS = 0.01  # share of requests that place an order
UNCACHED = 0.3  # share of requests that ask a replica
WRITES = 0.1  # share of requests that write, with three statements each
STATEMENTS_OF_A_CORE = 1_000  # a second, by key, at a load that leaves room for a lost server
REQUESTS_OF_A_REDIS = 5_000  # a second: about five small commands each, a third of what one thread answers
ANSWER = 2_000  # bytes of an answer on its way to the client
LOG_LINE = 400  # bytes of log for each request

# Terraform's own numbers.
CORES = 2  # of a machine of the groups
FEWEST = 2  # machines of a group
REPLICAS, ZONES, REDIS_NODES = 2, 3, 4
DATABASE_GIGABYTES, MACHINE_GIGABYTES = 100, 20
ALARMS = 10

GIGA = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Size:
    """What one peak needs.

    Attributes:
        requests: a second, at the peak.
        machine: type of the machines.
        api: machines that serve.
        workers: machines that work.
        database: class of the primary, which is doubled, and of each replica.
        redis: type of each of the Redis nodes.
        connections: that all processes may open on one database server.
    """

    requests: int
    machine: str
    api: int
    workers: int
    database: str
    redis: str
    connections: int


def newest_prices() -> tuple[str, dict[str, Any]]:
    """Return the name and the content of the newest price file."""
    file = max(HERE.glob("prices-*.json"))
    found: dict[str, Any] = json.loads(file.read_text())
    return file.name, found


def size(requests: int) -> Size:
    """Return the installation for a peak of so many requests a second."""
    api = max(FEWEST, math.ceil(requests * CPU_SECONDS / (CORES * TARGET)))
    workers = max(FEWEST, math.ceil(requests * ORDERS / (ORDERS_OF_A_WORKER * TARGET)))
    small = requests * CPU_SECONDS < CORES * TARGET / 4
    statements = max(requests * WRITES * 3, requests * UNCACHED / REPLICAS)
    database, redis = _database(statements, small=small), _redis(requests, small=small)
    machine = "t4g.small" if small else "c7g.large"
    # One process for each core, of a worker two children; a relay on each worker machine.
    fleet = Fleet(api * CORES, math.ceil(api / 4) * CORES, workers * CORES * 2, workers, chores=1)
    settings = DatabaseSettings.model_validate({"cores": 2, "spindles": 1, "pool_size": None, "pooler": "none"})
    connections = fleet.processes * most_of_a_process(settings)
    return Size(requests, machine, api, workers, database, redis, connections)


def _database(statements: float, *, small: bool) -> str:
    if small:
        return "db.t4g.medium"
    for cores, name in ((2, "large"), (4, "xlarge"), (8, "2xlarge")):
        if statements <= cores * STATEMENTS_OF_A_CORE:
            return f"db.m7g.{name}"
    return "db.m7g.4xlarge"


def _redis(requests: int, *, small: bool) -> str:
    if small:
        return "cache.t4g.small"
    return "cache.m7g.large" if requests <= REQUESTS_OF_A_REDIS else "cache.m7g.xlarge"


def costs(made: Size, prices: dict[str, Any]) -> dict[str, float]:
    """Return what a size costs in USD a month, by kind."""
    hours, hour = prices["hours_in_a_month"], prices["an_hour"]
    gigabyte, stored = prices["a_gigabyte"], prices["a_gigabyte_month"]
    served = made.requests * MEAN * hours * 3600
    out, logged = served * ANSWER / GIGA, served * LOG_LINE / GIGA
    # The largest dimension counts; with answers this small and connections kept open it is the bytes, a GB an hour.
    units = max(1.0, out / hours)
    machine = hour[made.machine] * hours + MACHINE_GIGABYTES * stored["machine gp3"]
    database = hour[made.database] * hours + DATABASE_GIGABYTES * stored["database gp3"]
    return {
        "machines": (made.api + made.workers) * machine,
        # The primary has a standby in another zone.
        "databases": (2 + REPLICAS) * database,
        "Redis": REDIS_NODES * hour[made.redis] * hours,
        "network": hours * (ZONES * hour["nat gateway"] + hour["balancer"] + units * hour["balancer capacity unit"])
        # Logs leave through the gateways.
        + out * gigabyte["to the internet"]
        + logged * gigabyte["through a nat gateway"],
        "logs, rest": logged * gigabyte["logs"]
        + prices["a_month"]["key"]
        + prices["a_month"]["secret"]
        + ALARMS * prices["a_month"]["alarm"],
    }


def table() -> str:
    """Return the table, with what it was made from, as Markdown."""
    name, prices = newest_prices()
    made = {each: costs(each, prices) for each in map(size, SIZES)}
    kinds = next(iter(made.values()))
    head = "peak requests/s | API, worker machines | primary (doubled), replicas | Redis nodes | connections"
    lines = [f"| {head} | {' | '.join(kinds)} | USD a month |", f"|---:{'|---' * 3}{'|---:' * (len(kinds) + 2)}|"]
    for each, by_kind in made.items():
        dollars = " | ".join(f"{cost:,.0f}" for cost in by_kind.values())
        lines.append(
            f"| {each.requests:,} | {each.api} + {each.workers} {each.machine} | {2 + REPLICAS} x {each.database} "
            f"| {REDIS_NODES} x {each.redis} | {each.connections:,} | {dollars} "
            f"| **{sum(by_kind.values()):,.0f}** |"
        )
    return "\n".join([*lines, "", f"From `deploy/terraform/{name}` of {prices['written']}. {prices['source']}", ""])


def written(page: str) -> str:
    """Return the page with the table of today's prices and assumptions in its place."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    """Write the table into the page, and print it."""
    PAGE.write_text(written(PAGE.read_text()))
    sys.stdout.write(table())


if __name__ == "__main__":
    main()
