"""Redis is killed while orders come in, and is back empty after a while: all are accepted, and all come right.

It is everything that a Redis is here: cache, limits, positions, the event stream and the broker, whose messages are
gone. `BROKER_OUTAGE=60 CRASH_ORDERS=200` is the long form, as `make test-failure` runs it. A Redis that answers and
refuses everything, as a replica does after a failover, ends no worker either.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from apart import answers, apart_from, running_redis
from books import (
    Processes,
    as_long_as_it_goes_on,
    check_books,
    check_orders,
    made,
    mails,
    open_messages,
    place,
    tasks_done,
    unsettled,
)
from conftest import PATIENCE, until
from sagas import Shop

from app.domain.orders.mail import Kind
from deploy.local.cluster import Cluster

pytest_plugins = ("apart",)

OUTAGE = float(os.environ.get("BROKER_OUTAGE", "4"))  # seconds
ORDERS = int(os.environ.get("CRASH_ORDERS", "30"))
# Seconds without a task done: a worker asks a broker that is away every 2, 4, 6 … s, and what was lost comes again
# after 5, 10, 20 … s.
LONG = 3 * PATIENCE
PIECES = 1000
CHILDREN = 2


@asynccontextmanager
async def selling(cluster: Cluster, folder: Path, port: int) -> AsyncIterator[tuple[Shop, Processes]]:
    """Yield a shop whose Redis is at `port`, and its worker and relay, which nobody starts again when they end."""
    await until(answers, port)
    environment = {"REDIS_URL": f"redis://127.0.0.1:{port}/0", "WORKER_CONCURRENCY": str(CHILDREN)}
    async with apart_from(cluster, **environment) as apart:
        commands = {name: [sys.executable, "-m", "app.cli", name] for name in ("worker", "relay")}
        processes = Processes(apart.environment, folder, commands)
        shop = await Shop(apart, cluster).open()
        processes.keep_up()
        try:
            yield shop, processes
        finally:
            await asyncio.to_thread(processes.end)


@pytest.mark.sabotage("workers/relay.py", "except (Unavailable, BrokerDown) as error:", "except Unavailable as error:")
async def test_orders_are_accepted_while_the_broker_is_away_and_come_right_afterwards(
    cluster: Cluster, tmp_path: Path, free_port: int
) -> None:
    with ExitStack() as brokers:
        first = brokers.enter_context(running_redis(free_port, tmp_path))
        async with selling(cluster, tmp_path, free_port) as (shop, processes):
            product, customer = await made(shop, PIECES), await shop.customer()

            async def outage() -> None:
                first.send_signal(signal.SIGKILL)
                await asyncio.to_thread(first.wait)
                await asyncio.sleep(OUTAGE)
                brokers.enter_context(running_redis(free_port, tmp_path))

            placed, away = [], None
            try:
                for number in range(ORDERS):
                    if number == ORDERS // 4:
                        # So that it goes away in the middle of work.
                        await until(tasks_done, shop)
                        away = asyncio.create_task(outage())
                    placed.append(await place(shop, customer, product, "tok_ok"))
                    if away is not None and not away.done():
                        await asyncio.sleep(OUTAGE / ORDERS)
                assert away is not None
                await away

                async def settled() -> bool:
                    return not await open_messages(shop)

                await as_long_as_it_goes_on(settled, partial(tasks_done, shop), LONG)
            except TimeoutError:
                pytest.fail(await unsettled(shop, placed))
            finally:
                await asyncio.to_thread(processes.end)
            # A worker that loses its broker ends what runs: of each child one mail may be between answer and log.
            mailed = {f"{Kind.CONFIRMATION}.{order.id}" for order in placed}
            assert (await check_orders(shop, placed, mailed)).total() == ORDERS
            sent = await mails(cluster)
            assert sum(sent[mail] - 1 for mail in mailed) <= CHILDREN
            await check_books(shop, {product.id: PIECES - ORDERS}, ORDERS)


@pytest.mark.sabotage("workers/broker.py", "        broker_channel_error_retry=True,\n", "")
async def test_a_worker_outlives_a_broker_that_answers_and_refuses(
    cluster: Cluster, tmp_path: Path, free_port: int
) -> None:
    with running_redis(free_port, tmp_path):
        async with selling(cluster, tmp_path, free_port) as (shop, processes):
            product, customer = await made(shop, PIECES), await shop.customer()

            async def settled() -> bool:
                return not await open_messages(shop)

            async def refused() -> bool:
                return b"read only replica" in (tmp_path / "worker.log").read_bytes()

            placed = []
            try:
                placed.append(await place(shop, customer, product, "tok_ok"))
                await until(settled, seconds=LONG)
                # A failover has made it a replica, of a primary that is gone.
                await shop.apart.resources.redis.client.replicaof("127.0.0.1", "1")
                await until(refused, seconds=LONG)
                await shop.apart.resources.redis.client.replicaof("NO", "ONE")
                placed.append(await place(shop, customer, product, "tok_ok"))
                await until(settled, seconds=LONG)
            except TimeoutError:
                pytest.fail(await unsettled(shop, placed))
            finally:
                await asyncio.to_thread(processes.end)
            await check_books(shop, {product.id: PIECES - len(placed)}, len(placed))
