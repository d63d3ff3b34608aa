"""How long a customer waits: from an order's acceptance to its confirmation, at half of what one worker can do.

    python -m loadtests.bench.saga [--orders 300] [--seconds 30]

First the worker's capacity: so many orders lie ready, and the time from its first to its last confirmation counts,
invoices and mails included as they come. Then orders arrive evenly at half of that rate. Everything runs on one machine
with a payment provider that answers at once; nothing is pinned. It writes `results/saga.json`.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
from datetime import datetime
from pathlib import Path
from time import perf_counter
from uuid import UUID, uuid4

import uvloop
from rich.console import Console
from sqlalchemy import func, select

from app.core.settings import load_settings
from app.domain.catalog.rules import NewProduct
from app.domain.orders.rules import NewItem, NewOrder, Step
from app.domain.orders.service import PLACE
from app.domain.orders.tables import orders
from app.domain.profiles.rules import NewProfile
from app.scaling.idempotency import Claim
from app.scaling.outbox import outbox
from app.wiring import Resources, open_resources
from deploy.local.cluster import Cluster
from deploy.local.programs import Sizes
from loadtests.bench.__main__ import RESULTS, machine

KINDS = ("primary", "redis", "payments", "smtp", "relay", "worker")
PATIENCE = 600  # seconds for a backlog to be done
console = Console()


def main() -> None:
    """Start the servers, measure, print, write, stop the servers."""
    parser = argparse.ArgumentParser(description="From accepted to confirmed, at half of a worker's capacity.")
    parser.add_argument("--orders", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=30.0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        cluster = Cluster(Path(folder) / "cluster", sizes=Sizes(replicas=0, kinds=KINDS))
        cluster.up()
        try:
            os.environ.update(cluster.environment)
            result = uvloop.run(measure(cluster, chosen.orders, chosen.seconds))
        finally:
            cluster.down(wipe=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "saga.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print_json(data=result)


async def measure(cluster: Cluster, count: int, seconds: float) -> dict[str, object]:
    """Find the capacity, load half of it, and return both with the waits."""
    async with open_resources(load_settings()) as resources:
        customer = await resources.profiles.sign_up(NewProfile(f"{uuid4().hex}@example.com", uuid4().hex, "Ada"))
        product = await resources.catalog.create(NewProduct(uuid4().hex, "Thing", "", "b", 1250, "EUR", {}, 1_000_000))

        async def place() -> UUID:
            new = NewOrder((NewItem(product.id, 1),), "tok_ok")
            placed = await resources.orders.place(customer.id, new, Claim.of(customer.id, PLACE, uuid4().hex, {}))
            return UUID(str(placed.reply["id"]))

        await asyncio.to_thread(cluster.stop, "worker-1")
        for _ in range(count):
            await place()
        await asyncio.to_thread(cluster.start, "worker-1")
        started = perf_counter()
        await settled(resources)
        capacity = count / (perf_counter() - started)
        console.print(f"capacity: {capacity:.1f} orders in a second")
        begun, arrived = perf_counter(), set[UUID]()
        while (now := perf_counter() - begun) < seconds:
            if len(arrived) < now * capacity / 2:
                arrived.add(await place())
            else:
                await asyncio.sleep(0.005)
        await settled(resources)
        waits = await waited(resources, arrived)
    percentiles = statistics.quantiles(waits, n=100)
    return {
        "orders_per_second_of_one_worker": round(capacity, 1),
        "orders_per_second_offered": round(len(arrived) / seconds, 1),
        "accepted_to_confirmed_ms": {name: round(percentiles[at] * 1000) for name, at in (("p50", 49), ("p95", 94))},
        "machine": machine(),
    }


async def settled(resources: Resources) -> None:
    """Wait until no message is left."""
    async with asyncio.timeout(PATIENCE):
        while True:
            async with resources.database.writer() as writer:
                left = await writer.first(select(func.count().label("n")).where(outbox.c.done_at.is_(None)))
            if left is not None and left.n == 0:
                return
            await asyncio.sleep(0.05)


async def waited(resources: Resources, placed: set[UUID]) -> list[float]:
    """Return for each order the seconds from its acceptance to its confirmation, as its history tells them."""
    async with resources.database.writer() as writer:
        rows = await writer.all(select(orders.c.id, orders.c.history).where(orders.c.step == Step.CONFIRMED))
    found = []
    for row in rows:
        if row.id in placed:
            (_, accepted), (_, confirmed) = row.history
            found.append((datetime.fromisoformat(confirmed) - datetime.fromisoformat(accepted)).total_seconds())
    if len(found) != len(placed):
        raise RuntimeError(f"{len(placed) - len(found)} orders are not confirmed; nothing was measured")
    return found


if __name__ == "__main__":
    main()
