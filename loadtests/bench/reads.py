"""What reads cost: without the cache, on the thousandth page of a million rows, and with a second replica.

    python -m loadtests.bench.reads [--rows 1000000] [--rounds 5] [--seconds 2]

Every figure is a ratio of two sides that were measured in turns on the same servers. They and the machine go to
`results/reads.json` and `results/reads.svg`.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
import httpx
from redis.asyncio import Redis
from rich.console import Console
from sqlalchemy import select, text

from app.core import context
from app.core.settings import Settings, load_settings
from app.domain.profiles.tables import profiles
from app.scaling.database import Database
from app.wiring import Resources, open_resources
from deploy.local.cluster import Cluster
from loadtests.bench.__main__ import LOAD, PASSWORD, RESULTS, ask, machine, serve
from loadtests.bench.picture import draw_ratios
from loadtests.bench.servers import servers
from loadtests.bench.share import share_of_a_core
from migrations import runner

SMALL = 1_000
PAGE_SIZE = 20
THOUSANDTH = 1000 * PAGE_SIZE
# The share of a core that each replica gets: so little that the readers are never what is measured.
SHARE = 0.05
READERS = 16
# With its share a replica needs a tenth of a second and more to open one connection.
WARM_SECONDS = 6.0
WARM = 20  # pages of each kind before any counts: until then statements are compiled and rows read from disk
WRITE = text("UPDATE stock SET free = free WHERE product_id = (SELECT id FROM products LIMIT 1)")
# More than any side reads in a round: a profile that is asked for twice would come from the cache.
UNREAD = 100_000
# `id(n)` grows with n, as the service's ids do with time; every order and its line belong to one customer.
PROFILES = """
CREATE FUNCTION id(n bigint) RETURNS uuid IMMUTABLE LANGUAGE sql
RETURN (lpad(to_hex(n), 12, '0') || '80008000000000000000')::uuid;
INSERT INTO profiles (profile_id, email, name, tier, role, attributes, version, created_at, updated_at)
    SELECT id(n), n || '@example.com', 'Name ' || n, 'free', 'member', '{{}}', 1, now(), now()
    FROM generate_series(1, {rows}) n;
"""
ORDERS = """
INSERT INTO orders (profile_id, id, step, amount, currency, payment_method, history, version, created_at, updated_at)
    SELECT id(1), id(n), 'confirmed', 1999, 'EUR', 'tok_ok', '[]', 1, now(), now() FROM generate_series(1, {rows}) n;
INSERT INTO order_items (profile_id, order_id, line, product_id, sku, name, quantity, unit_amount)
    SELECT id(1), id(n), 0, id(n), 'SKU', 'Thing', 1, 1999 FROM generate_series(1, {rows}) n;
"""
console = Console()


def main() -> None:
    """Start the servers, measure, write, stop the servers."""
    parser = argparse.ArgumentParser(description="What reads cost.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    chosen = parser.parse_args()
    if (os.cpu_count() or 1) <= LOAD:
        sys.exit("The bench needs two cores: one for the server, one for the load.")
    with ExitStack() as running:
        cluster, folder = running.enter_context(servers(replicas=2))
        os.environ |= cluster.environment
        ratios, costs = uncached(cluster, folder, running, chosen.rounds, chosen.seconds)
        ratios |= asyncio.run(pages(cluster, chosen.rows, chosen.rounds * 40))
        ratios |= asyncio.run(replicas(cluster, chosen.rounds, chosen.seconds))
    result = {"ratios": ratios, "uncached_cpu_us_per_request": costs, "rows": chosen.rows, "machine": machine()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "reads.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "reads.svg").write_text(draw_ratios("What reads cost", ratios), encoding="utf-8")
    console.print_json(data=ratios)


def uncached(
    cluster: Cluster, folder: Path, running: ExitStack, rounds: int, seconds: float
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Ask for a profile that nobody has asked for, each time another: of this service, and of asyncpg in bare ASGI.

    The service also finds the caller's session, counts the request, loads as the only one, stores the value for the
    next reader, counts and logs; the bare program asks the statement.

    Returns:
        The ratio of their rates, and what a request costs each of them of its core, in microseconds.
    """
    bare = ["uvicorn", "--no-access-log", "--loop", "uvloop", "--http", "httptools", "loadtests.bench.row:app"]
    # The same server for both: the primary, as if there were no replica.
    alone = {"REPLICA_URLS": "", "DATABASE_PRIMARY_READ_CAP": "64"}
    start = partial(serve, running, folder, environment=cluster.environment | alone | {"LOG_LEVEL": "info"})
    limit = start("bare", "asyncpg in ASGI", command=[sys.executable, "-m", *bare, "--port"])
    ours = start(
        "service", "this service", command=[sys.executable, "-m", "app.cli", "api", "--host", "127.0.0.1", "--port"]
    )
    with httpx.Client(base_url=ours.urls[0]) as client:
        signed_in = client.post("/api/v1/sessions", json={"email": "ada@example.com", "password": PASSWORD})
        token = signed_in.raise_for_status().json()["token"]
    paths = folder / "paths"
    paths.write_text("\n".join(f"/api/v1/profiles/{each}" for each in asyncio.run(_unread(cluster))))
    rates: dict[str, list[float]] = {limit.name: [], ours.name: []}
    costs: dict[str, list[float]] = {limit.name: [], ours.name: []}
    for number in range(rounds + 1):
        for side in (limit, ours):
            asyncio.run(_forget(cluster, "profile:*"))
            before = _loads(ours.urls[0])
            measured = ask(side, "/", token, 32, seconds, paths)
            if side is ours and _loads(ours.urls[0]) - before != measured["requests"]:
                sys.exit("Some of the profiles came from the cache: nothing was measured.")
            if number:  # the first round compiles and connects
                rates[side.name].append(measured["rate"])
                costs[side.name].append(measured["cpu"])
        console.print("uncached, requests/s", {name: round(of[-1]) for name, of in rates.items() if of})
    ratio = statistics.median(own / most for own, most in zip(rates[ours.name], rates[limit.name], strict=True))
    return (
        {"uncached GET of a profile / bare asyncpg in ASGI": {"measured": round(ratio, 2), "at least": 0.5}},
        {name: round(statistics.median(of), 1) for name, of in costs.items()},
    )


def _loads(url: str) -> float:
    """Return how many profiles an instance has loaded because they were not cached."""
    name = 'cache_loads_total{kind="profile"} '
    lines = httpx.get(f"{url}/metrics").raise_for_status().text.splitlines()
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


async def _unread(cluster: Cluster) -> list[UUID]:
    """Make profiles that nobody has asked for, and return them in any order."""
    connection = await asyncpg.connect(cluster.process("primary").address)
    await connection.execute(PROFILES.format(rows=UNREAD))
    await connection.execute("VACUUM ANALYZE profiles")
    await connection.close()
    made = [_id(number) for number in range(1, UNREAD + 1)]
    random.shuffle(made)
    return made


async def _some_ids(cluster: Cluster) -> list[UUID]:
    connection = await asyncpg.connect(cluster.process("primary").address)
    rows = await connection.fetch("SELECT profile_id FROM profiles LIMIT 1000")
    await connection.close()
    return [row["profile_id"] for row in rows]


async def _forget(cluster: Cluster, names: str) -> None:
    """Take what is cached under names of this pattern out of Redis; who is signed in stays."""
    async with Redis.from_url(cluster.environment["REDIS_URL"]) as redis:
        found = [name async for name in redis.scan_iter(names, count=10_000)]
        if found:
            await redis.delete(*found)


def _settings(environment: dict[str, str]) -> Settings:
    os.environ |= environment
    return load_settings()


async def pages(cluster: Cluster, rows: int, times: int) -> dict[str, dict[str, Any]]:
    """Ask for the first page and for the thousandth one, of a thousand rows and of `rows`, in turns."""
    customer = _id(1)
    taken: dict[str, list[float]] = {}
    async with _filled(cluster, "bench_small", SMALL) as small, _filled(cluster, "bench_large", rows) as large:

        def profiles_from(instance: Resources, first: int) -> Callable[[], Awaitable[Any]]:
            cursor = instance.profiles._cursors.page(  # noqa: SLF001  # a cursor of the middle, which nobody gave out
                "profiles [null,null]", [_id(first)] * 2, 1, key=str, item=str
            ).next_cursor
            return lambda: instance.cache.page(instance.profiles.listed(None, None, PAGE_SIZE, cursor))

        def orders_from(instance: Resources, first: int) -> Callable[[], Awaitable[Any]]:
            cursor = instance.orders._cursors.page(  # noqa: SLF001  # the same
                f"orders {customer}", [_id(first)] * 2, 1, key=str, item=str
            ).next_cursor
            return lambda: instance.orders.listed(customer, PAGE_SIZE, cursor)

        sides = {
            "profiles small": profiles_from(small, SMALL + 1),
            "profiles large": profiles_from(large, rows + 1),
            "profiles far": profiles_from(large, rows + 1 - THOUSANDTH),
            "orders small": orders_from(small, SMALL + 1),
            "orders large": orders_from(large, rows + 1),
            "orders far": orders_from(large, rows + 1 - THOUSANDTH),
        }
        for number in range(times + WARM):
            for name, ask_for_page in sides.items():
                await _forget(cluster, "list:*")
                with context.working(context.Work(request_id="bench")):
                    started = perf_counter()
                    await ask_for_page()
                    if number >= WARM:
                        taken.setdefault(name, []).append(perf_counter() - started)
    cost = {name: statistics.median(of) for name, of in taken.items()}
    console.print("a page, ms", {name: round(seconds * 1000, 2) for name, seconds in cost.items()})
    compared = {
        f"first page of {rows} {what} / of {SMALL}": cost[f"{what} large"] / cost[f"{what} small"]
        for what in ("profiles", "orders")
    } | {
        f"1,000th page of {rows} {what} / first": cost[f"{what} far"] / cost[f"{what} large"]
        for what in ("profiles", "orders")
    }
    return {name: {"measured": round(ratio, 2), "at most": 1.2} for name, ratio in compared.items()}


def _id(number: int) -> UUID:
    """Return what `id(number)` is in the database."""
    return UUID(f"{number:012x}80008000000000000000")


@asynccontextmanager
async def _filled(cluster: Cluster, name: str, rows: int) -> AsyncIterator[Resources]:
    """Open an instance on a database of its own with so many profiles and orders."""
    console.print(f"Filling a database with {rows} profiles and orders …")
    url = urlsplit(cluster.process("primary").address or "")._replace(path=f"/{name}").geturl()
    connection = await asyncpg.connect(cluster.process("primary").address)
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    environment = cluster.environment | {"DATABASE_URL": url, "REPLICA_URLS": "", "CACHE_LOCAL_ENTRIES": "0"}
    await asyncio.to_thread(runner.upgrade, _settings(environment))
    connection = await asyncpg.connect(url)
    await connection.execute(PROFILES.format(rows=rows))
    await connection.execute(ORDERS.format(rows=rows))
    await connection.execute("VACUUM ANALYZE")
    await connection.close()
    async with open_resources(_settings(environment)) as instance:
        yield instance


async def replicas(cluster: Cluster, rounds: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Read from one replica and from two, each with the same share of a core, while somebody writes all the time."""
    names = ("replica-1", "replica-2")
    urls = cluster.environment["REPLICA_URLS"].split(",")
    ids = await _some_ids(cluster)
    reads: dict[int, list[float]] = {1: [], 2: []}
    writes: dict[int, list[float]] = {1: [], 2: []}
    with ExitStack() as limited:
        for name in names:
            limited.enter_context(share_of_a_core(name, cluster.process(name).pid or 0, SHARE))
        for number in range(rounds + 1):
            for count in (1, 2):
                settings = _settings(cluster.environment | {"REPLICA_URLS": ",".join(urls[:count])}).database
                # A replica that has too little of a core answers late, which is what is measured here.
                patient = {
                    "connect_timeout": 10.0,
                    "watch_timeout": 10.0,
                    "command_timeout": 30.0,
                    "pool_timeout": 30.0,
                    "pool_size": READERS,
                }
                database = Database(settings.model_copy(update=patient))
                await database.start()
                read, written = await _load(database, ids, seconds)
                await database.stop()
                if number:
                    reads[count].append(read)
                    writes[count].append(written)
            if number:
                console.print("replicas: reads/s", {count: round(of[-1]) for count, of in reads.items()})
    more = statistics.median(two / one for one, two in zip(reads[1], reads[2], strict=True))
    same = statistics.median(two / one for one, two in zip(writes[1], writes[2], strict=True))
    return {
        "reads of two replicas / of one": {"measured": round(more, 2), "at least": 1.7},
        "writes with two replicas / with one": {"measured": round(same, 2), "at least": 0.9},
    }


async def _load(database: Database, ids: list[UUID], seconds: float) -> tuple[float, float]:
    """Return reads and writes in a second, once the connections are there."""
    begin = perf_counter() + WARM_SECONDS
    until = begin + seconds
    done = {"read": 0, "write": 0}

    async def read() -> None:
        while perf_counter() < until:
            with context.working(context.Work(request_id="bench")):
                await database.reader().all(select(profiles).where(profiles.c.profile_id == random.choice(ids)))
            done["read"] += perf_counter() > begin

    async def write() -> None:
        while perf_counter() < until:
            with context.working(context.Work(request_id="bench")):
                async with database.writer() as writer:
                    await writer.run(WRITE)
            done["write"] += perf_counter() > begin
            await asyncio.sleep(0.02)

    await asyncio.gather(write(), *(read() for _ in range(READERS)))
    return done["read"] / seconds, done["write"] / seconds


if __name__ == "__main__":
    main()
