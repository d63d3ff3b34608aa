"""What an installation of deploy/terraform costs a month, and the table of six of them in docs/deployment/aws.md.

`python -m deploy.terraform.costs` writes the table into the page. How many machines a size needs says the model behind
`scaleout plan`; what they cost follows from the newest price file beside this one. It is an estimate to compare sizes
by, not an offer.
"""

import json
import sys
from pathlib import Path
from typing import Any

from deploy.capacity import figures
from deploy.capacity.model import Demand, Installation, plan

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "deployment" / "aws.md"
BEGIN, END = "<!-- costs: python -m deploy.terraform.costs -->\n", "<!-- end of costs -->\n"

SIZES = (20, 100, 500, 1_000, 3_000, 10_000)  # requests a second at the peak

# Assumed. Change them to your own and run it again.
MEAN = 1 / 3  # of the peak, over a month
ANSWER = 2_000  # bytes of an answer on its way to the client
LOG_LINE = 400  # bytes of log for each request

# Terraform's own numbers.
ZONES, REDIS_NODES = 3, 4
DATABASE_GIGABYTES, MACHINE_GIGABYTES = 100, 20
ALARMS = 10

GIGA = 1_000_000_000


def newest_prices() -> tuple[str, dict[str, Any]]:
    """Return the name and the content of the newest price file."""
    file = max(HERE.glob("prices-*.json"))
    found: dict[str, Any] = json.loads(file.read_text())
    return file.name, found


def size(requests: int) -> Installation:
    """Return the installation for a peak of so many requests a second of the usual kinds."""
    return plan(Demand(requests), figures.read())


def costs(made: Installation, prices: dict[str, Any]) -> dict[str, float]:
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
        # Each primary has a standby in another zone.
        "databases": made.shards * (2 + made.replicas) * database,
        "Redis": REDIS_NODES * made.redis_shards * hour[made.redis] * hours,
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
            f"| {each.requests:,} | {each.api} + {each.workers} {each.machine} "
            f"| {each.shards * (2 + each.replicas)} x {each.database} "
            f"| {REDIS_NODES * each.redis_shards} x {each.redis} | {each.connections:,} | {dollars} "
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
