"""kill -9 before and after each effect of the saga, in the relay, and a flushed Redis: every order still comes right.

`CRASH_ORDERS=200 CRASH_SEED=7` makes a longer run and repeats a certain one. A run that fails prints everything that
is known of the order that went wrong.
"""

import asyncio
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import pytest
from apart import apart_from
from conftest import until
from crashing import EFFECTS, POINTS
from sagas import Shop
from sqlalchemy import func, select

from app.domain.catalog.rules import NewProduct, Product
from app.domain.catalog.tables import products
from app.domain.orders.rules import NewItem, NewOrder, Order, Step
from app.domain.orders.service import PLACE
from app.domain.orders.tables import invoices
from app.domain.payments.reconciliation import reconcile
from app.domain.profiles.rules import Profile
from app.scaling.idempotency import Claim
from app.scaling.outbox import outbox, receipts
from deploy.local.cluster import Cluster

ORDERS = int(os.environ.get("CRASH_ORDERS", "30"))
SEED = int(os.environ.get("CRASH_SEED", str(random.SystemRandom().randrange(10_000))))
PATIENCE = 60 + 2.0 * ORDERS  # seconds; each death costs a fork, and what was lost comes again after 5 s
SCARCE = 3  # pieces of a product that more want
PIECES = 100_000


class Processes:
    """One worker and one relay that die as planned and are started again, as a supervisor does."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self._environment = environment | {"LOG_FORMAT": "json", "PYTHONPATH": str(Path(__file__).parents[2])}
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def keep_up(self) -> None:
        """Start what is down."""
        for kind in ("worker", "relay"):
            process = self._running.get(kind)
            if process is None or process.poll() is not None:
                with (self._folder / f"{kind}.log").open("ab") as log:
                    self._running[kind] = subprocess.Popen(  # noqa: S603  # our own program
                        [sys.executable, str(Path(__file__).with_name("crashing.py")), kind, str(self._folder)],
                        env=self._environment,
                        stdout=log,
                        stderr=log,
                    )

    def end(self) -> None:
        """Stop both."""
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.wait()


@pytest.fixture
async def shop(cluster: Cluster) -> AsyncIterator[Shop]:
    async with apart_from(cluster) as apart:
        yield await Shop(apart, cluster).open()


async def made(shop: Shop, stock: int) -> Product:
    new = NewProduct(uuid4().hex, "Thing", "", "tests", 1250, "EUR", {}, stock)
    return await shop.apart.resources.catalog.create(new)


async def place(shop: Shop, customer: Profile, product: Product, method: str) -> Order:
    new = NewOrder((NewItem(product.id, 1),), method)
    claim = Claim.of(customer.id, PLACE, uuid4().hex, [])
    placed = await shop.apart.resources.orders.place(customer.id, new, claim)
    return await shop.apart.resources.orders.load(customer.id, placed.reply["id"])


async def open_messages(shop: Shop) -> int:
    async with shop.apart.resources.database.writer() as writer:
        row = await writer.first(select(func.count().label("n")).where(outbox.c.done_at.is_(None)))
    return row.n if row else 0


async def told(shop: Shop, order: Order) -> str:
    """Return everything that is known of an order."""
    async with shop.apart.resources.database.writer() as writer:
        messages = await writer.all(select(outbox).where(outbox.c.subject_id == order.id).order_by(outbox.c.id))
        left = await writer.all(select(receipts).where(receipts.c.message_id.in_([each.id for each in messages])))
    lines = [f"seed {SEED}, order {await shop.now(order)}", *map(str, messages), *map(str, left)]
    return "\n".join([*lines, str(await shop.ledger(order)), str(await shop.apart.dead_letters())])


async def mails(cluster: Cluster) -> Counter[str]:
    """Return how many mails the sink has, by the order that their Message-ID names."""
    async with httpx.AsyncClient(base_url=str(cluster.process("smtp").http_address)) as client:
        items = (await client.get("/messages")).raise_for_status().json()["items"]
    return Counter(item["message_id"].partition(".")[2].partition("@")[0] for item in items)


@pytest.mark.sabotage(
    "app/scaling/outbox.py", ".values(due_at=now + lease, tries=outbox.c.tries + 1)", ".values(due_at=None, tries=1)"
)
async def test_every_order_comes_right_whatever_is_killed_wherever(
    shop: Shop, cluster: Cluster, tmp_path: Path
) -> None:
    chance = random.Random(SEED)
    plenty, scarce = await made(shop, PIECES), await made(shop, SCARCE)
    customers = [await shop.customer() for _ in range(3)]
    methods = ["tok_ok"] * 6 + ["tok_lost", "tok_flaky", "tok_declined", "tok_declined"]
    placed = []
    for number in range(ORDERS):
        product = scarce if number < 2 * SCARCE else plenty
        method = "tok_ok" if product is scarce else methods[number % len(methods)]
        placed.append(await place(shop, chance.choice(customers), product, method))

    def deaths(point: str) -> list[str]:
        declined = [order for order in placed if order.payment_method == "tok_declined"]
        paid = [order for order in placed[2 * SCARCE :] if order.payment_method != "tok_declined"]
        which = declined if point.startswith("catalog.release") else paid
        return [str(order.id) for order in chance.sample(which, max(1, ORDERS // 40))]

    plan = {point: deaths(point) for point in POINTS}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    processes = Processes(shop.apart.environment, tmp_path)
    flushed = False

    async def settled() -> bool:
        nonlocal flushed
        processes.keep_up()
        left = await open_messages(shop)
        if not flushed and deaths_in(tmp_path).total() > len(POINTS) // 3:
            await shop.apart.broker.flushdb()
            flushed = True
        return left == 0

    try:
        await until(settled, seconds=PATIENCE)
    except TimeoutError:
        stuck = [order for order in placed if (await shop.now(order)).status in {"processing", "payment_pending"}]
        what = [await told(shop, each) for each in stuck[:3]]
        pytest.fail("\n".join([f"seed {SEED}: not settled after {deaths_in(tmp_path)}", *what]))
    finally:
        await asyncio.to_thread(processes.end)
    assert flushed
    assert deaths_in(tmp_path) == {point.replace(" ", "-"): len(orders) for point, orders in plan.items()}, SEED
    repeated = set(plan["mail.order_confirmation after"])
    confirmed = await check_orders(shop, placed, await mails(cluster), repeated)
    assert confirmed[scarce.id] == SCARCE
    assert confirmed[plenty.id] == sum(
        order.payment_method != "tok_declined" for order in placed if order.lines[0].product_id == plenty.id
    )
    await check_books(shop, {scarce.id: 0, plenty.id: PIECES - confirmed[plenty.id]}, confirmed.total())


def deaths_in(folder: Path) -> Counter[str]:
    """Return how many processes have died at each point."""
    return Counter(path.name.removeprefix("died-").rsplit("-", 5)[0] for path in folder.glob("died-*"))


async def check_orders(shop: Shop, placed: list[Order], sent: Counter[str], repeated: set[str]) -> Counter[UUID]:
    """Expect of every order what its customer expects; return the pieces that were sold of each product."""
    confirmed = Counter[UUID]()
    for order in placed:
        now, entries = await shop.now(order), await shop.ledger(order)
        try:
            assert now.step in {Step.CONFIRMED, Step.REJECTED}
            assert len(entries) <= 1
            if now.step is Step.CONFIRMED:
                confirmed[order.lines[0].product_id] += 1
                assert (entries[0]["charges"], entries[0]["captured"], entries[0]["refunded"]) == (1, order.amount, 0)
                assert now.invoice_key
                # SMTP has no way to ask: what dies between the server's answer and our log is sent again.
                assert sent[str(order.id)] in ({1, 2} if str(order.id) in repeated else {1})
            else:
                assert [entry["captured"] for entry in entries] in ([], [0])
                assert sent[str(order.id)] == 0
        except AssertionError as error:
            raise AssertionError(f"{error}\n{await told(shop, order)}") from error
    return confirmed


async def check_books(shop: Shop, available: dict[UUID, int], sold: int) -> None:
    """Expect of stock, invoices and payments as a whole what warehouse and accountant expect."""
    async with shop.apart.resources.database.writer() as writer:
        rows = await writer.all(select(products.c.id, products.c.available))
        numbers = [row.number for row in await writer.all(select(invoices.c.number))]
    assert {row.id: row.available for row in rows} == available
    assert sorted(int(number.rpartition("-")[2]) for number in numbers) == list(range(1, sold + 1))
    assert await shop.apart.dead_letters() == []
    compared = await reconcile(shop.apart.resources.database, shop.apart.resources.payments, on_its_way=timedelta(0))
    assert compared.differences == ()


def test_every_effect_outside_has_its_two_points() -> None:
    assert {point.partition(" ")[0] for point in POINTS} >= set(EFFECTS)
    assert len(POINTS) == 2 * len(EFFECTS) + 3
