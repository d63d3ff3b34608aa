"""Issues invoices: a number without gaps, a PDF rendered off the event loop, stored under a key of the order.

Each step may be repeated: the number belongs to the order, the PDF to the number, the key to the order.
"""

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from sqlalchemy import insert, select, update

from app.core.errors import Unavailable
from app.domain.orders import invoice as document
from app.domain.orders.rules import TAX_RATE, Order
from app.domain.orders.tables import invoice_counters, invoices
from app.domain.profiles.tables import profiles
from app.scaling.database import Database, Writer
from app.scaling.dialect import insert_ignore
from app.scaling.storage import Storage

FORGOTTEN = "Customer (data erased on request)"


@dataclass(frozen=True, slots=True)
class Issued:
    """A number and when it was given."""

    number: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Stored:
    """An invoice in the object storage: under which key, and whether it names its buyer."""

    key: str
    names_buyer: bool


class Invoices:
    """Invoices over all shards.

    Args:
        database: numbers them.
        storage: keeps them.
    """

    def __init__(self, database: Database, storage: Storage) -> None:
        self._database = database
        self._storage = storage

    async def issue(self, order: Order) -> Stored:
        """Number, render and store the invoice of a confirmed order; `keep` belongs to the transaction that links it.

        Raises:
            Unavailable: the database or the object storage does not take it; repeat later.
        """
        made = await self._document(order, await self._number(order))
        key = key_of(order.id)
        await self._storage.put(key, await asyncio.to_thread(document.render, made), "application/pdf")
        return Stored(key, made.buyer.name != FORGOTTEN)

    async def keep(self, writer: Writer, order: Order, stored: Stored) -> None:
        """Have whoever it names be there until the commit: who is erased after it has the linked invoice issued again.

        Raises:
            Unavailable: `buyer_erased`, if they were erased while it was made; issue it again.
        """
        if not stored.names_buyer:
            return
        there = select(profiles.c.profile_id).where(
            profiles.c.profile_id == order.profile_id, profiles.c.erased_at.is_(None)
        )
        if not await writer.all(there.with_for_update(read=True)):
            raise Unavailable("The buyer was erased while the invoice was made.", code="buyer_erased")

    async def pdf(self, order: Order) -> bytes:
        """Return the stored invoice of the order."""
        return await self._storage.get(key_of(order.id))

    async def _number(self, order: Order) -> Issued:
        """Return the order's number, a new one if it has none; numbers of a shard and year have no gaps.

        The counter's row is locked until the commit, so that a number is used or was never given.
        """
        now = datetime.now(UTC)
        async with self._database.writer(order.profile_id) as writer:
            await writer.run(insert_ignore(invoice_counters).values(year=now.year, last=0))
            counter = await writer.first(
                select(invoice_counters.c.last).where(invoice_counters.c.year == now.year).with_for_update()
            )
            known = await writer.first(
                select(invoices.c.number, invoices.c.issued_at).where(
                    invoices.c.profile_id == order.profile_id, invoices.c.order_id == order.id
                )
            )
            if known is not None:
                return Issued(known.number, known.issued_at)
            last = (counter.last if counter else 0) + 1
            number = f"INV-{now.year}-{writer.shard:02d}-{last:06d}"
            await writer.run(update(invoice_counters).where(invoice_counters.c.year == now.year).values(last=last))
            await writer.run(
                insert(invoices).values(profile_id=order.profile_id, order_id=order.id, number=number, issued_at=now)
            )
        return Issued(number, now)

    async def _document(self, order: Order, issued: Issued) -> document.Invoice:
        buyer = await self._database.reader(order.profile_id).first(
            select(profiles.c.name, profiles.c.email).where(
                profiles.c.profile_id == order.profile_id, profiles.c.erased_at.is_(None)
            )
        )
        lines = tuple(document.Line(line.sku, line.name, line.quantity, line.unit_amount) for line in order.lines)
        sums = document.totals(lines, TAX_RATE)
        return document.Invoice(
            number=issued.number,
            issued_at=issued.at,
            seller=document.SHOP,
            buyer=document.Party(buyer.name, email=buyer.email) if buyer else document.Party(FORGOTTEN),
            order_id=str(order.id),
            lines=lines,
            net=sums.net,
            tax_rate=TAX_RATE,
            tax=sums.tax,
            total=sums.total,
            currency=order.currency,
            paid_with=f"card ({order.payment_method})",
        )


def key_of(order_id: UUID) -> str:
    """Return the key of an order's invoice; deriving it makes storing it again harmless."""
    return f"invoices/{order_id}.pdf"
