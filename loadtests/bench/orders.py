"""What accepting an order costs: `POST /orders` on one instance against a bare program that writes the same rows.

    python -m loadtests.bench.orders [--rounds 5] [--seconds 4]

Both have one core, in turns; the servers and the load share the other one. It writes `results/orders.json`. Beside the
orders in a second stands the CPU that each takes of its side's own process: what else a machine does makes a second
shorter for everybody, but not the work of an order longer.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from time import perf_counter
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import uvloop
from rich.console import Console

from loadtests.bench.__main__ import LOAD, PASSWORD, RESULTS, SERVER, Side, machine, pin, serve, spent
from loadtests.bench.load import Connection
from loadtests.bench.servers import servers

CONNECTIONS = 32
console = Console()


def main() -> None:
    """Start the servers, measure, print, write, stop the servers."""
    parser = argparse.ArgumentParser(description="What accepting an order costs.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    chosen = parser.parse_args()
    if (os.cpu_count() or 1) <= LOAD:
        sys.exit("The bench needs two cores: one for the side, one for the servers and the load.")
    rounds: list[dict[str, dict[str, float]]] = []
    with ExitStack() as running:
        cluster, folder = running.enter_context(servers(replicas=0))
        for name in ("primary", "redis"):
            pin(cluster.process(name).pid or 0, LOAD)
        command = [sys.executable, "-m", "app.cli", "api", "--host", "127.0.0.1", "--port"]
        own = cluster.environment | {"LOG_LEVEL": "info"}
        ours = serve(running, folder, "service", "this service", command=command, environment=own)
        with httpx.Client(base_url=ours.urls[0]) as client:
            signed_in = client.post("/api/v1/sessions", json={"email": "ada@example.com", "password": PASSWORD})
            token = signed_in.raise_for_status().json()["token"]
            product = client.get("/api/v1/products?limit=1").raise_for_status().json()["items"][0]["id"]
        pin(0, LOAD)
        for number in range(chosen.rounds + 1):
            round_ = {
                "bare": bare(cluster.environment, chosen.seconds),
                "service": service(ours, token, product, chosen.seconds),
            }
            if number:  # the first round compiles and connects
                console.print({side: {what: round(one) for what, one in of.items()} for side, of in round_.items()})
                rounds.append(round_)
    ratios = {
        "orders_per_second": [each["service"]["rate"] / each["bare"]["rate"] for each in rounds],
        "cpu": [each["bare"]["cpu"] / each["service"]["cpu"] for each in rounds],
    }
    result = {
        "ratios": {
            "POST /orders / bare asyncpg": {
                "measured": round(statistics.median(ratios["orders_per_second"]), 2),
                "at least": 0.5,
            },
            "CPU of bare asyncpg / POST /orders": {"measured": round(statistics.median(ratios["cpu"]), 2)},
        },
        "orders_per_second": {side: [round(each[side]["rate"]) for each in rounds] for side in rounds[0]},
        "cpu_us_per_order": {side: [round(each[side]["cpu"]) for each in rounds] for side in rounds[0]},
        "machine": machine(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "orders.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print_json(data=result)


def bare(environment: dict[str, str], seconds: float) -> dict[str, float]:
    """Return what the bare program measures of itself, on the core of the side."""
    done = subprocess.run(  # noqa: S603  # our own program
        [sys.executable, "-m", "loadtests.bench.rows", str(seconds), str(CONNECTIONS)],
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | environment,
        preexec_fn=partial(pin, 0, SERVER),
    )
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def service(side: Side, token: str, product: str, seconds: float) -> dict[str, float]:
    """Return the orders that the service accepts in a second, and microseconds of its CPU an order."""
    before = spent(side)
    accepted, rate = uvloop.run(order(side.urls[0], token, product, seconds))
    return {"rate": rate, "cpu": (spent(side) - before) / accepted * 1e6}


async def order(url: str, token: str, product: str, seconds: float) -> tuple[int, float]:
    """Place orders for some seconds, each with a key of its own; return how many, and how many in a second."""
    parts, latencies = urlsplit(url), list[float]()
    loop = asyncio.get_running_loop()
    requests = _requests(parts.netloc, token, product)
    made = [Connection(requests, latencies, loop.create_future()) for _ in range(CONNECTIONS)]
    for connection in made:
        await loop.create_connection(partial(_given, connection), parts.hostname or "", parts.port or 80)
    started = perf_counter()
    for connection in made:
        connection.begin(started + seconds)
    await asyncio.gather(*(connection.done for connection in made))
    return len(latencies), len(latencies) / (perf_counter() - started)


def _given(connection: Connection) -> Connection:
    return connection


def _requests(host: str, token: str, product: str) -> Iterator[bytes]:
    items = [{"product_id": product, "quantity": 1}]
    body = json.dumps({"items": items, "payment_method": "tok_ok"}).encode()
    run = uuid4().hex
    for number in itertools.count():
        yield (
            f"POST /api/v1/orders HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n"
            f"Idempotency-Key: {run}-{number}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode() + body


if __name__ == "__main__":
    main()
