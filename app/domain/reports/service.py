"""Feeds the sales read model. Keyed by order and product: recording an order twice, or taking it back, changes it once.

What was taken back stays as rows of nought: a recording that comes later finds its place taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import combinations
from uuid import UUID

from sqlalchemy import update

from app.domain.reports.tables import bought_together, sales
from app.scaling.database import Database, Writer
from app.scaling.dialect import insert_ignore

# Products of one order that are paired: 190 pairs. A larger order says little about taste and would cost thousands.
MOST_PAIRED = 20


@dataclass(frozen=True, slots=True)
class Sold:
    """One line of a confirmed order; `amount` in minor units."""

    product_id: UUID
    quantity: int
    amount: int


class Reports:
    """The sales read model.

    Args:
        database: its catalog database holds the model.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def record_sale(self, order_id: UUID, at: datetime, currency: str, lines: Sequence[Sold]) -> None:
        """Count the lines of a confirmed order, and which products were bought together; once."""
        async with self._database.writer() as writer:
            fresh = 0
            # Sorted, so that two orders of the same products lock their rows in one order.
            for line in sorted(lines, key=lambda sold: sold.product_id):
                fresh += await writer.run(
                    insert_ignore(sales).values(
                        order_id=order_id,
                        product_id=line.product_id,
                        day=at.date(),
                        quantity=line.quantity,
                        amount=line.amount,
                        currency=currency,
                    )
                )
            if fresh:
                await _pair(writer, lines, 1)

    async def take_back(self, order_id: UUID, at: datetime, currency: str, lines: Sequence[Sold]) -> None:
        """Count a cancelled order no longer, whether it was recorded before or not; once."""
        async with self._database.writer() as writer:
            taken = 0
            for line in sorted(lines, key=lambda sold: sold.product_id):
                await writer.run(
                    insert_ignore(sales).values(
                        order_id=order_id,
                        product_id=line.product_id,
                        day=at.date(),
                        quantity=0,
                        amount=0,
                        currency=currency,
                    )
                )
                taken += await writer.run(
                    update(sales)
                    .where(sales.c.order_id == order_id, sales.c.product_id == line.product_id, sales.c.quantity > 0)
                    .values(quantity=0, amount=0)
                )
            if taken:
                await _pair(writer, lines, -1)


async def _pair(writer: Writer, lines: Sequence[Sold], change: int) -> None:
    """Count the products of one order as bought together, or not any more."""
    for product_id, other_id in combinations(sorted({line.product_id for line in lines})[:MOST_PAIRED], 2):
        await writer.run(insert_ignore(bought_together).values(product_id=product_id, other_id=other_id, orders=0))
        await writer.run(
            update(bought_together)
            .where(bought_together.c.product_id == product_id, bought_together.c.other_id == other_id)
            .values(orders=bought_together.c.orders + change)
        )
