"""Following one order: its history as it is, then each further status when it comes, none twice and none left out.

A status is numbered by its place in the history, which only grows; whoever comes back names the last number that they
have and goes on from there, on any instance. The event stream only says when to look; the database says what happened.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from app.core import context
from app.core.errors import NotFound, Unavailable
from app.domain.orders.rules import STATUS, Order, Step
from app.domain.orders.service import Orders
from app.scaling.events import EventStream, Watch

# With nothing new for so long we look all the same, and the caller is told that the line still stands.
QUIET_SECONDS = 15.0
# Without the event stream a status is seen this late, and the replicas take a read in this time from each who follows.
UNTOLD_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Told:
    """One status of the history; `number` is its place there, from 1."""

    number: int
    status: str
    at: str
    reason: str | None

    def view(self, order_id: UUID) -> dict[str, Any]:
        """Return what the customer sees."""
        view: dict[str, Any] = {"order_id": order_id, "status": self.status, "at": self.at}
        return view | {"reason": self.reason} if self.reason else view


class Following:
    """Follows orders for their customers.

    Args:
        orders: reads them.
        events: says when to look.
    """

    def __init__(self, orders: Orders, events: EventStream) -> None:
        self._orders = orders
        self._events = events

    async def follow(
        self, profile_id: UUID, order_id: UUID, after: int, seconds: float
    ) -> AsyncGenerator[Sequence[Told]]:
        """Yield what of the order's history comes after number `after`, at once and then as it grows.

        What is yielded may be empty: after `QUIET_SECONDS` without news, while the database does not answer, and
        whenever the process begins to drain. It ends once nothing can happen to the order any more, or after `seconds`.
        """
        clock = asyncio.get_running_loop().time
        end = clock() + seconds
        with self._events.watching(order_id) as watch:
            while True:
                order = await self._look(profile_id, order_id, watch)
                news = () if order is None else since(order, after)
                yield news
                after += len(news)
                over = order is not None and order.ended(datetime.now(UTC)) and after >= len(order.history)
                if over or clock() >= end:
                    return
                patience = QUIET_SECONDS if self._events.live else random.uniform(0.5, 1.5) * UNTOLD_SECONDS
                await watch.wait(min(patience, end - clock()))

    async def _look(self, profile_id: UUID, order_id: UUID, watch: Watch) -> Order | None:
        """Return the order, at least as new as the watch was told of, or None while nobody can say."""
        # What somebody wrote for the caller when they came is long settled: the replicas may answer again.
        with context.working(replace(context.current(), unsettled=set(), spans={})):
            try:
                order = await self._orders.load(profile_id, order_id)
                if order.version < watch.version:
                    order = await self._orders.load(profile_id, order_id, newest=True)
            except (Unavailable, NotFound):  # not found: by a replica that is not that far yet
                return None
        return order


def since(order: Order, after: int) -> Sequence[Told]:
    """Return the order's history after number `after`."""
    return tuple(
        Told(number, status, at, order.reason if status == STATUS[Step.REJECTED] else None)
        for number, (status, at) in enumerate(order.history, start=1)
        if number > after
    )
