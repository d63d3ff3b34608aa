"""The relay against its bounds: messages in a second on one core, and what a message of a long backlog costs.

    python -m loadtests.bench.backlog [--rounds 5]

A relay is run on a core of its own, with primary and Redis on another one, and nobody takes the tasks. Five rounds, in
turns: a backlog of 10,000 messages once, and one of 100 a hundred times. It writes `results/backlog.json`.
"""

import argparse
import json
import os
import statistics
import sys
from datetime import UTC, datetime
from time import perf_counter

import uvloop
from rich.console import Console
from sqlalchemy import insert, text

from app.core.ids import new_id
from app.core.settings import load_settings
from app.scaling.outbox import outbox
from app.wiring import Resources, open_resources
from loadtests.bench.__main__ import LOAD, RESULTS, SERVER, machine, pin
from loadtests.bench.servers import servers
from workers.broker import Publisher, create_celery
from workers.relay import Relay

LONG, SHORT = 10_000, 100
TIMES = LONG // SHORT
console = Console()


def main() -> None:
    """Start the servers, measure, print, write, stop the servers."""
    parser = argparse.ArgumentParser(description="The relay against its bounds.")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    if (os.cpu_count() or 1) <= LOAD:
        sys.exit("The bench needs two cores: one for the relay, one for the servers.")
    with servers(replicas=0) as (cluster, _):
        for name in ("primary", "redis"):
            pin(cluster.process(name).pid or 0, LOAD)
        os.environ.update(cluster.environment)
        result = uvloop.run(measure(chosen.rounds))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "backlog.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print_json(data=result)


async def measure(rounds: int) -> dict[str, object]:
    """Relay both backlogs in turns, and return rates, costs and their ratio."""
    settings = load_settings()
    pin(0, SERVER)
    long: list[float] = []
    short: list[float] = []
    async with open_resources(settings) as resources:
        publisher = Publisher(create_celery(settings))
        relay = Relay(resources, publisher)
        await drained(resources, relay, LONG)  # what is compiled and connected at first use
        for number in range(rounds):
            long.append(await drained(resources, relay, LONG))
            short.append(sum([await drained(resources, relay, SHORT) for _ in range(TIMES)]))
            console.print(f"round {number + 1}: {LONG / long[-1]:.0f}/s, {LONG / short[-1]:.0f}/s")
        publisher.close()
    return {
        "messages_per_second": round(statistics.median(LONG / each for each in long)),
        "messages_per_second_of_100": round(statistics.median(LONG / each for each in short)),
        "cost of one of 10,000 / one of 100": round(
            statistics.median(one / other for one, other in zip(long, short, strict=True)), 2
        ),
        "rounds": {"10000": [round(LONG / each) for each in long], "100": [round(LONG / each) for each in short]},
        "machine": machine(),
    }


async def drained(resources: Resources, relay: Relay, count: int) -> float:
    """Write a backlog, and return the seconds in which the relay carries it away."""
    async with resources.database.writer() as writer:
        await writer.run(text("TRUNCATE outbox"))
        now, owner = datetime.now(UTC), new_id()
        await writer.run(
            insert(outbox),
            [
                {
                    "profile_id": owner,
                    "id": new_id(owner),
                    "event": "order.placed",
                    "subject_id": new_id(owner),
                    "payload": {"status": "processing"},
                    "request_id": "bench",
                    "created_at": now,
                    "due_at": now,
                    "tries": 0,
                }
                for _ in range(count)
            ],
        )
    async with resources.redis.calling("bench") as client:
        await client.delete("orders")  # the queue that nobody empties
    started = perf_counter()
    while await relay.relay(0):
        pass
    return perf_counter() - started


if __name__ == "__main__":
    main()
