"""Every instance is replaced while customers browse and order: each request succeeds, and each order is there once."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from conftest import Customer

from deploy.local.cluster import Cluster

# Requests in a second, over both instances; of 20 of them one places an order and one changes a profile.
RATE = 200
# At once at most, on a machine that is slower than the rate: fewer than the places of one instance (48), which is all
# there is while the other one is replaced, and hardly more than have a connection. More would be a test of overload.
MOST = 12
MIX = ("product",) * 12 + ("list",) * 4 + ("profile",) * 2 + ("change", "order")
CUSTOMERS = 10


class Shop:
    """Customers who go on at a fixed rate whatever the answers are, and what came of it."""

    def __init__(self, customers: list[Customer], product: dict[str, Any]) -> None:
        self.customers = customers
        self.product = product
        self.answers: Counter[str] = Counter()
        self.orders: dict[str, set[str]] = {}
        self._versions = dict.fromkeys((customer.email for customer in customers), 1)
        self._changes = {customer.email: asyncio.Lock() for customer in customers}
        self._over = asyncio.Event()
        self._places = asyncio.Semaphore(MOST)

    async def open(self) -> None:
        """Send requests until closed, each at its own time."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        async with asyncio.TaskGroup() as requests:
            for number, what in enumerate(itertools.cycle(MIX)):
                if self._over.is_set():
                    return
                customer = self.customers[number // len(MIX) % CUSTOMERS]
                await self._places.acquire()
                requests.create_task(self._count(what, customer, number))
                await asyncio.sleep(begun + number / RATE - loop.time())

    def close(self) -> None:
        """Send no more."""
        self._over.set()

    async def _count(self, what: str, customer: Customer, number: int) -> None:
        try:
            answers = await self._ask(what, customer, number)
        except httpx.TransportError as error:
            self.answers[f"{what}: {type(error).__name__}"] += 1
            return
        finally:
            self._places.release()
        for answer in answers:
            self.answers["ok" if answer.is_success else f"{what}: {answer.status_code} {answer.text[:120]}"] += 1

    async def _ask(self, what: str, customer: Customer, number: int) -> list[httpx.Response]:
        match what:
            case "product":
                return [await customer.client.get(f"/api/v1/products/{self.product['id']}")]
            case "list":
                return [await customer.client.get("/api/v1/products?limit=5")]
            case "profile":
                return [await customer.client.get("/api/v1/profiles/me")]
            case "change":
                return [await self._change(customer, f"number {number}")]
            case _:
                return await self._order(customer, f"rollout-{number}")

    async def _change(self, customer: Customer, bio: str) -> httpx.Response:
        """Change the customer's profile, one change after the other, as each names the version before it."""
        async with self._changes[customer.email]:
            answer = await customer.client.patch(
                f"/api/v1/profiles/{customer.profile['id']}",
                json={"bio": bio},
                headers={"If-Match": f'"v{self._versions[customer.email]}"'},
            )
            self._versions[customer.email] += 1
        return answer

    async def _order(self, customer: Customer, key: str) -> list[httpx.Response]:
        """Place an order, and then again with its key, most likely on the other instance."""
        body = {"items": [{"product_id": self.product["id"], "quantity": 1}], "payment_method": "tok_ok"}
        answers = [
            await customer.client.post("/api/v1/orders", json=body, headers={"Idempotency-Key": key}) for _ in range(2)
        ]
        self.orders[key] = {answer.json().get("id", answer.text) for answer in answers}
        return answers


@pytest.mark.sabotage("deploy/local/programs.py", '.get(kind, "SIGTERM")', '.get(kind, "SIGKILL")')
async def test_a_rollout_under_load_fails_no_request_and_doubles_no_order(
    cluster: Cluster,
    new_customer: Callable[..., Awaitable[Customer]],
    new_product: Callable[..., Awaitable[dict[str, Any]]],
) -> None:
    customers = [await new_customer() for _ in range(CUSTOMERS)]
    shop = Shop(customers, await new_product(stock=1_000_000))
    before = {process.name: process.pid for process in cluster.processes if process.kind == "api"}
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(shop.open())
        await asyncio.to_thread(cluster.roll_out, lambda _name: None)
        shop.close()
    after = {process.name: process.pid for process in cluster.processes if process.kind == "api"}
    assert all(before[name] != after[name] for name in before)
    assert set(shop.answers) == {"ok"}, "\n".join(map(str, shop.answers.items()))
    assert shop.answers["ok"] > RATE
    assert {len(made) for made in shop.orders.values()} == {1}
