"""What a failure test works with: processes that are kept up, orders to place, and what is expected of each in the end.

Whatever was killed meanwhile: an order is at its end, charged once or not at all, invoiced and mailed once, and stock,
invoices and the provider's ledger add up. What fails tells everything that is known of the order.
"""

import asyncio
import subprocess
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

import httpx
from conftest import PATIENCE
from sagas import Shop
from sqlalchemy import func, select

from app.domain.catalog.rules import NewProduct, Product
from app.domain.catalog.tables import products
from app.domain.orders.mail import Kind
from app.domain.orders.rules import FINAL, NewItem, NewOrder, Order, Step
from app.domain.orders.service import PLACE
from app.domain.orders.tables import invoices
from app.domain.payments.attempts import payment_attempts
from app.domain.payments.reconciliation import reconcile
from app.domain.profiles.rules import Profile
from app.scaling.idempotency import Claim
from app.scaling.outbox import outbox, receipts
from deploy.local.cluster import Cluster


class Processes:
    """Processes that are started again when they have died, as a supervisor does.

    Args:
        environment: of all of them.
        folder: where their logs go.
        commands: name -> command.
    """

    def __init__(self, environment: dict[str, str], folder: Path, commands: dict[str, list[str]]) -> None:
        self._environment = environment | {"LOG_FORMAT": "json", "PYTHONPATH": str(Path(__file__).parents[2])}
        self._folder = folder
        self._commands = commands
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def keep_up(self) -> None:
        """Start what is down."""
        for name, command in self._commands.items():
            process = self._running.get(name)
            if process is None or process.poll() is not None:
                with (self._folder / f"{name}.log").open("ab") as log:
                    self._running[name] = subprocess.Popen(  # noqa: S603  # our own programs
                        command,
                        env=self._environment | {"INSTANCE": name},
                        stdout=log,
                        stderr=log,
                    )

    def end(self) -> None:
        """Stop all of them."""
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            process.kill()
            process.wait()


async def made(shop: Shop, stock: int) -> Product:
    """Add a product."""
    new = NewProduct(uuid4().hex, "Thing", "", "tests", 1250, "EUR", {}, stock)
    return await shop.apart.resources.catalog.create(new)


async def place(shop: Shop, customer: Profile, product: Product, method: str) -> Order:
    """Place an order of one piece."""
    new = NewOrder((NewItem(product.id, 1),), method)
    claim = Claim.of(customer.id, PLACE, uuid4().hex, [])
    placed = await shop.apart.resources.orders.place(customer.id, new, claim)
    return await shop.apart.resources.orders.load(customer.id, placed.reply["id"])


async def open_messages(shop: Shop) -> int:
    """Return how many messages are not done."""
    async with shop.apart.resources.database.writer() as writer:
        row = await writer.first(select(func.count().label("n")).where(outbox.c.done_at.is_(None)))
    return row.n if row else 0


async def tasks_done(shop: Shop) -> int:
    """Return how many tasks of all orders are done."""
    async with shop.apart.resources.database.writer() as writer:
        row = await writer.first(select(func.count().label("n")).select_from(receipts))
    return row.n if row else 0


async def as_long_as_it_goes_on(
    so: Callable[[], Awaitable[bool]], progress: Callable[[], Awaitable[int]], seconds: float
) -> None:
    """Wait until it is so, however long a busy machine takes for it.

    Raises:
        TimeoutError: for so many seconds there was no `progress`.
    """
    most = -1
    while True:
        async with asyncio.timeout(seconds):
            while (now := await progress()) <= most:
                if await so():
                    return
                await asyncio.sleep(0.1)
        most = now


async def told(shop: Shop, order: Order) -> str:
    """Return everything that is known of an order: its history, its messages with their receipts, money, mails.

    The money stands there twice, charges and refunds alike: as we have recorded it and as the provider has.
    """
    async with shop.apart.resources.database.writer() as writer:
        messages = await writer.all(select(outbox).where(outbox.c.subject_id == order.id).order_by(outbox.c.id))
        left = await writer.all(
            select(receipts)
            .where(receipts.c.message_id.in_([each.id for each in messages]))
            .order_by(receipts.c.done_at)
        )
        payments = await writer.all(select(payment_attempts).where(payment_attempts.c.order_id == order.id))
    ids = {message.id for message in messages}
    letters = [letter for letter in await shop.apart.dead_letters() if letter.message_id in ids]
    facts = {
        "order": [await shop.now(order)],
        "messages": messages,
        "receipts": left,
        "dead letters": letters,
        "payments": payments,
        "ledger": await shop.ledger(order),
        "mails": await shop.mails(order),
    }
    return "\n".join(f"{name}: {fact}" for name, found in facts.items() for fact in found or ["none"])


async def unsettled(shop: Shop, placed: list[Order]) -> str:
    """Return what is known of the first few orders that are not at an end."""
    stuck = [order for order in placed if (await shop.now(order)).step not in FINAL]
    return "\n\n".join([f"{len(stuck)} orders are not at an end", *[await told(shop, order) for order in stuck[:3]]])


async def mails(cluster: Cluster) -> Counter[str]:
    """Return how many mails the sink has, by `kind.order id`, as their Message-ID names them."""
    async with httpx.AsyncClient(base_url=str(cluster.process("smtp").http_address)) as client:
        items = (await client.get("/messages")).raise_for_status().json()["items"]
    return Counter(item["message_id"].strip("<>").partition("@")[0] for item in items)


async def check_orders(shop: Shop, placed: list[Order], repeated: set[str]) -> Counter[UUID]:
    """Expect of every order what its customer expects; return the pieces that were sold of each product.

    Args:
        shop: where they were placed.
        placed: all of them.
        repeated: `kind.order id` of the mails whose sender was killed between the server's answer and our log: SMTP has
            no way to ask, so these may be there twice.
    """
    sent = await mails(shop.cluster)
    sold = Counter[UUID]()
    for order in placed:
        now, entries = await shop.now(order), await shop.ledger(order)
        counts = {kind: sent[f"{kind}.{order.id}"] for kind in Kind}
        for kind in Kind:
            if f"{kind}.{order.id}" in repeated:
                counts[kind] = min(counts[kind], 1)
        money = [(entry["charges"], entry["captured"], entry["refunded"], entry["status"]) for entry in entries]
        try:
            if now.step is Step.CONFIRMED:
                sold[order.lines[0].product_id] += 1
                assert money == [(1, order.amount, 0, "captured")]
                assert now.invoice_key
                assert counts == {Kind.CONFIRMATION: 1, Kind.CANCELLATION: 0}
            elif now.step is Step.CANCELLED:
                assert len(money) <= 1
                assert all(captured == refunded and status != "authorized" for _, captured, refunded, status in money)
                assert counts[Kind.CANCELLATION] == 1
                assert counts[Kind.CONFIRMATION] <= 1
            else:
                assert now.step is Step.REJECTED
                assert money in ([], [(0, 0, 0, "declined")])
                assert set(counts.values()) == {0}
        except AssertionError as error:
            raise AssertionError(f"{error}\n{counts} {money}\n{await told(shop, order)}") from error
    return sold


async def check_books(shop: Shop, available: dict[UUID, int], sold: int, cancelled: int = 0) -> None:
    """Expect of stock, invoices and payments as a whole what warehouse and accountant expect.

    An order that was cancelled may have had its invoice before: the number stays.
    """
    async with shop.apart.resources.database.writer() as writer:
        rows = await writer.all(select(products.c.id, products.c.available))
        numbers = [row.number for row in await writer.all(select(invoices.c.number))]
    assert {row.id: row.available for row in rows} == available
    assert sold <= len(numbers) <= sold + cancelled
    assert sorted(int(number.rpartition("-")[2]) for number in numbers) == list(range(1, len(numbers) + 1))
    assert await shop.apart.dead_letters() == []
    compared = await reconcile(shop.apart.resources.database, shop.apart.resources.payments, on_its_way=timedelta(0))
    assert compared.differences == ()
