"""One key is one order, also when both instances get it at once, and when one of them dies while it holds it."""

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest
from conftest import PATIENCE, Customer, until

from deploy.local.cluster import Cluster

INSTANCES = ("api-1", "api-2")
New = Callable[..., Awaitable[Any]]


@pytest.fixture
async def customer(new_customer: New) -> Customer:
    made: Customer = await new_customer()
    return made


@pytest.fixture
async def place(
    cluster: Cluster, customer: Customer, new_product: New
) -> AsyncIterator[Callable[[str, str], Awaitable[httpx.Response]]]:
    """Place an order of one product with a key, at an instance that is named."""
    product = await new_product()
    body = {"items": [{"product_id": product["id"], "quantity": 1}], "payment_method": "tok_ok"}
    async with httpx.AsyncClient(headers=customer.client.headers, timeout=15) as client:

        async def at(instance: str, key: str) -> httpx.Response:
            address = f"{cluster.process(instance).address}/api/v1/orders"
            return await client.post(address, json=body, headers={"Idempotency-Key": key})

        yield at


async def orders_of(customer: Customer) -> list[str]:
    """Return the ids of all orders of a customer."""
    listed = (await customer.client.get("/api/v1/orders?limit=100")).raise_for_status().json()["items"]
    return [order["id"] for order in listed]


@pytest.mark.sabotage(
    "app/scaling/idempotency.py", "        if fresh:\n            return None\n", "        return None\n"
)
async def test_a_key_that_both_instances_get_at_once_is_one_order(
    customer: Customer, place: Callable[[str, str], Awaitable[httpx.Response]]
) -> None:
    for rounds in range(1, 6):
        key = uuid4().hex
        answers = await asyncio.gather(*(place(instance, key) for instance in INSTANCES * 4))
        assert {answer.status_code for answer in answers} == {202}
        assert {answer.headers["x-instance"] for answer in answers} == set(INSTANCES)
        assert len({answer.content for answer in answers}) == 1
        assert Counter(answer.headers.get("idempotent-replayed") for answer in answers) == {None: 1, "true": 7}
        assert len(await orders_of(customer)) == rounds


@pytest.mark.sabotage(
    path="app/domain/orders/service.py",
    take_out="""        stored = await claim.take(self._database, reply, *_rows(order), placed)
""",
    put="""        stored = await claim.take(self._database, reply)
        await self._database.insert_once(profile_id, placed, *_rows(order))
""",
)
async def test_a_key_that_a_killed_instance_held_is_one_order_at_the_other_one(
    cluster: Cluster, customer: Customer, place: Callable[[str, str], Awaitable[httpx.Response]]
) -> None:
    key = uuid4().hex
    before = cluster.process("api-1")
    # One locks, the other one looks: inside a transaction what others do seems to stand still.
    locker, server = [await asyncpg.connect(cluster.environment["DATABASE_URL"]) for _ in range(2)]

    async def waits() -> bool:
        waiting = "wait_event_type = 'Lock' AND query LIKE '%order_items%'"
        return bool(await server.fetchval(f"SELECT count(*) FROM pg_stat_activity WHERE {waiting}"))  # noqa: S608

    async def back() -> bool:
        if cluster.process("api-1").pid in {None, before.pid}:
            return False
        return (await asyncio.to_thread(cluster.status))["api-1"] == "ready"

    try:
        # Where the message is to be written it has to wait, with the key in its hand and nothing committed.
        async with locker.transaction():
            await locker.execute("LOCK TABLE outbox IN SHARE MODE")
            dying = asyncio.create_task(place("api-1", key))
            await until(waits)
            cluster.kill("api-1", signal.SIGKILL)
            with pytest.raises(httpx.TransportError):
                await dying
        answer = await place("api-2", key)
        # Whether the database has heard of the death in time or not: there is one order, and this is it.
        assert answer.status_code == 202, answer.text
        assert await orders_of(customer) == [answer.json()["id"]]
    finally:
        await locker.close()
        await server.close()
        await until(back, seconds=2 * PATIENCE)
