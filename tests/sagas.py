"""Orders whose saga a test drives by hand, one task after the other, on servers where nobody else does.

What is left of an order in the end is looked at everywhere: in our tables, at the payment provider, in the mail sink.
A test module takes the fixture with `pytest_plugins = ("sagas",)`. (PYTEST_DONT_REWRITE)
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from apart import Apart, apart_from
from sqlalchemy import func, select

from app.core import context
from app.domain.catalog.rules import NewProduct, Product
from app.domain.catalog.tables import products, stock, warehouses
from app.domain.orders.rules import NewItem, NewOrder, Order
from app.domain.orders.service import PLACE
from app.domain.payments.rules import Attempt
from app.domain.profiles.rules import NewProfile, Profile
from app.domain.reports.tables import bought_together, sales
from app.scaling.dialect import insert_ignore
from app.scaling.idempotency import Claim
from app.scaling.outbox import Message, claim, settle
from deploy.local.cluster import Cluster
from workers.relay import ROUTES
from workers.task import Delivery, Outcome, execute
from workers.tasks import TASKS

WAREHOUSE = UUID("00000000-0000-8000-8000-000000000001")
STOCK = 10
BY_NAME = {task.name: task for task in TASKS}
MOST_ROUNDS = 60  # of messages until a saga has ended; more is a circle


@dataclass(frozen=True)
class Shop:
    """A shop of one warehouse, whose tasks run only when a test says so."""

    apart: Apart
    cluster: Cluster

    async def open(self) -> "Shop":
        """Put the warehouse up."""
        async with self.apart.resources.database.writer() as writer:
            await writer.run(insert_ignore(warehouses).values(id=WAREHOUSE, name="Hamburg", lat=53.55, lon=9.99))
        return self

    async def customer(self) -> Profile:
        """Sign somebody up."""
        new = NewProfile(f"{uuid4().hex}@example.com", "a long enough phrase", "Ada")
        return await self.apart.resources.profiles.sign_up(new)

    async def product(self, amount: int = 1250) -> Product:
        """Add a product of which there are `STOCK` pieces."""
        new = NewProduct(uuid4().hex, "Thing", "", "tests", amount, "EUR", {}, STOCK)
        return await self.apart.resources.catalog.create(new)

    async def order(self, *quantities: int, method: str = "tok_ok", amount: int = 1250) -> Order:
        """Place an order of a fresh customer, with a fresh product for each quantity."""
        customer = await self.customer()
        items = tuple([NewItem((await self.product(amount)).id, quantity) for quantity in quantities or (2, 3)])
        key = Claim.of(customer.id, PLACE, uuid4().hex, [])
        placed = await self.apart.resources.orders.place(customer.id, NewOrder(items, method), key)
        return await self.apart.resources.orders.load(customer.id, placed.reply["id"])

    async def now(self, order: Order) -> Order:
        """Return the order as it is now."""
        return await self.apart.resources.orders.load(order.profile_id, order.id)

    async def due(self) -> Sequence[Message]:
        """Claim every message that is not done, as if the time of all had come; those without tasks are done."""
        await self.apart.make_due()
        async with self.apart.resources.database.writer() as writer:
            claimed = await claim(writer, batch=100, lease=timedelta(minutes=1))
            for message in claimed:
                if not ROUTES[message.event]:
                    await settle(writer, message, 0)
        return [message for message in claimed if ROUTES[message.event]]

    async def run(self, message: Message, task: str) -> Outcome:
        """Run one task of a message, as a worker would; a repeated one only if it is told so by the message."""
        delivery = Delivery(task, message, len(ROUTES[message.event]), dict(context.current().positions))
        return await execute(BY_NAME[task], self.apart.resources, delivery)

    async def drain(self) -> None:
        """Run all tasks until no message is left."""
        for _ in range(MOST_ROUNDS):
            messages = await self.due()
            if not messages:
                return
            for message in messages:
                for task in ROUTES[message.event]:
                    await self.run(message, task)
        raise AssertionError(f"these never end: {sorted({message.event for message in messages})}")

    async def step(self) -> None:
        """Run the tasks of the messages that are there now, and of none that follow."""
        for message in await self.due():
            for task in ROUTES[message.event]:
                await self.run(replace(message, tries=1), task)

    async def free(self, order: Order) -> list[int]:
        """Return for each line what is free of the product, and check that shelf and product agree."""
        free = []
        async with self.apart.resources.database.writer() as writer:
            for line in order.lines:
                row = await writer.first(
                    select(products.c.available, func.sum(stock.c.free).label("free"))
                    .join(stock, stock.c.product_id == products.c.id)
                    .where(products.c.id == line.product_id)
                    .group_by(products.c.available)
                )
                assert row is not None
                assert row.available == row.free
                free.append(int(row.free))
        return free

    async def counted(self, order: Order) -> tuple[int, int]:
        """Return the pieces in the sales of the order's products, and how often those were bought together."""
        ids = [line.product_id for line in order.lines]
        async with self.apart.resources.database.writer() as writer:
            sold = await writer.first(
                select(func.coalesce(func.sum(sales.c.quantity), 0).label("n")).where(sales.c.product_id.in_(ids))
            )
            pairs = await writer.first(
                select(func.coalesce(func.sum(bought_together.c.orders), 0).label("n")).where(
                    bought_together.c.product_id.in_(ids)
                )
            )
        assert sold is not None
        assert pairs is not None
        return int(sold.n), int(pairs.n)

    async def attempt(self, order: Order) -> Attempt | None:
        """Return the payment attempt as we have it."""
        return await self.apart.resources.orders.attempt_if_any(order)

    async def ledger(self, order: Order) -> list[dict[str, Any]]:
        """Return what the provider has under the order's reference."""
        async with httpx.AsyncClient(base_url=self.apart.settings.payments.url) as client:
            entries = (await client.get("/ledger")).raise_for_status().json()
        return [entry for entry in entries.values() if entry["reference"] == str(order.id)]

    async def mails(self, order: Order) -> list[str]:
        """Return the kinds of the mails that went out about the order."""
        address = self.cluster.process("smtp").http_address
        async with httpx.AsyncClient(base_url=str(address)) as client:
            messages = (await client.get("/messages")).raise_for_status().json()["items"]
        identities = [message["message_id"].strip("<>").split("@")[0] for message in messages]
        return [kind for kind, _, order_id in (each.partition(".") for each in identities) if order_id == str(order.id)]


@pytest.fixture(scope="module")
async def shop_opened(cluster: Cluster) -> AsyncIterator[Shop]:
    """One shop for the tests of a module."""
    async with apart_from(cluster) as apart:
        yield await Shop(apart, cluster).open()


@pytest.fixture
async def shop(shop_opened: Shop) -> Shop:
    """The module's shop without a message in it."""
    await shop_opened.apart.clear()
    return shop_opened
