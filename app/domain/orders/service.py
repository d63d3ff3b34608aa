"""The use cases of orders. Placing one is one transaction; the saga's steps are further ones, one for each happening.

What happens to an order goes through `_happen`: it follows the table in `rules.py`, adds to the history and writes
the outbox message, all in the caller's transaction. Nothing else changes a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from time import time
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Row, Select, select, update

from app.core import wire
from app.core.errors import Conflict, FieldError, Invalid, NotFound, Unavailable
from app.core.ids import new_id
from app.core.telemetry import BUSINESS_EVENTS, REVENUE
from app.domain.catalog.service import Catalog
from app.domain.orders.rules import (
    STATUS,
    TRANSITIONS,
    Happening,
    Line,
    NewOrder,
    Order,
    Step,
)
from app.domain.orders.tables import order_items, orders
from app.domain.payments import attempts
from app.domain.payments.rules import Attempt, Authorised, Declined, State, Undone
from app.domain.profiles.tables import profiles
from app.scaling import outbox
from app.scaling.database import Database, Writer
from app.scaling.dialect import Rows
from app.scaling.idempotency import Claim
from app.scaling.paging import Cursors, Page
from app.scaling.storage import Storage

PLACE = "orders.place"  # the route's name in idempotency keys


@dataclass(frozen=True, slots=True)
class Placed:
    """The reply to an order, and whether it is the stored one of an earlier call."""

    reply: dict[str, Any]
    replayed: bool


class Orders:
    """Orders over all shards.

    Args:
        database: where they are.
        catalog: knows products and prices.
        storage: holds the invoices.
        cursors: makes the cursors of lists.
    """

    def __init__(self, database: Database, catalog: Catalog, storage: Storage, cursors: Cursors) -> None:
        self._database = database
        self._catalog = catalog
        self._storage = storage
        self._cursors = cursors

    async def place(self, profile_id: UUID, new: NewOrder, claim: Claim) -> Placed:
        """Accept an order: key, order, items, message and stored reply in one transaction.

        Raises:
            Invalid: a product does not exist, the currencies differ, or the key came with another body.
            Conflict: a request with this key is still under way.
            Unavailable: the database takes no writes; repeat with the same key.
        """
        lines, currency = await self._lines(new)
        order = self._draft(profile_id, lines, currency, new.payment_method)
        reply = order.view()
        placed = outbox.message_row("order.placed", profile_id=profile_id, subject_id=order.id, payload=order.told())
        stored = await claim.take(self._database, reply, *_rows(order), placed)
        if stored is not None:
            return Placed(stored, replayed=True)
        BUSINESS_EVENTS.labels("order", "placed").inc()
        return Placed(reply, replayed=False)

    async def get(self, profile_id: UUID, order_id: UUID) -> dict[str, Any]:
        """Return the view of one of the profile's own orders.

        Raises:
            NotFound: if there is none, or it is somebody else's.
        """
        return (await self.load(profile_id, order_id)).view()

    async def load(self, profile_id: UUID, order_id: UUID, *, newest: bool = False) -> Order:
        """Return one of the profile's orders, as the primary has it if it must be the `newest`.

        Raises:
            NotFound: if there is none.
        """
        rows = await self._database.reader(profile_id, newest=newest).all(
            _with_items(select(orders).where(orders.c.profile_id == profile_id, orders.c.id == order_id))
        )
        if not rows:
            raise NotFound("There is no such order.")
        return _orders(rows)[0]

    async def listed(self, profile_id: UUID, limit: int, cursor: str | None) -> Page[dict[str, Any]]:
        """Return a page of the profile's orders, newest first, in one statement."""
        scope = f"orders {profile_id}"
        after = self._cursors.open_id(scope, cursor)
        statement = select(orders).where(orders.c.profile_id == profile_id)
        if after is not None:
            statement = statement.where(orders.c.id < after)
        rows = await self._database.reader(profile_id).all(
            _with_items(statement.order_by(orders.c.id.desc()).limit(limit + 1))
        )
        return self._cursors.page(scope, _orders(rows), limit, key=lambda order: str(order.id), item=Order.view)

    async def cancel(self, profile_id: UUID, order_id: UUID) -> dict[str, Any]:
        """Begin to undo an order for its customer, unless that has begun already; return its view.

        Raises:
            NotFound: if there is none, or it is somebody else's.
            Conflict: `not_cancellable`, if it is at its end or being packed.
        """
        own = select(orders).where(orders.c.profile_id == profile_id, orders.c.id == order_id)
        async with self._database.writer(profile_id) as writer:
            # Locked: a step of the saga has committed before, or finds the order changed and rolls back.
            if not await writer.all(own.with_for_update()):
                raise NotFound("There is no such order.")
            (order,) = _orders(await writer.all(_with_items(own)))
            if order.step in {Step.CANCELLING, Step.CANCELLED}:
                return order.view()
            if not order.cancellable(datetime.now(UTC)):
                raise Conflict("The order cannot be cancelled any more.", code="not_cancellable")
            return (await self._happen(writer, order, Happening.CANCEL_ASKED)).view()

    async def invoiced_orders(self, profile_id: UUID) -> list[Order]:
        """Return the profile's orders that have an invoice."""
        rows = await self._database.reader(profile_id).all(
            _with_items(select(orders).where(orders.c.profile_id == profile_id, orders.c.invoice_key.is_not(None)))
        )
        return _orders(rows)

    async def invoice_link(self, profile_id: UUID, order_id: UUID) -> str:
        """Return a short-lived address of the order's invoice.

        Raises:
            NotFound: no such order, or `invoice_not_ready`.
        """
        order = await self.load(profile_id, order_id)
        if order.invoice_key is None:
            raise NotFound("The invoice is not issued yet; try again shortly.", code="invoice_not_ready")
        return await self._storage.link(order.invoice_key, time())

    async def place_of(self, order: Order) -> tuple[float, float] | None:
        """Return the latitude and longitude of the customer, if they gave them."""
        row = await self._database.reader(order.profile_id).first(
            select(profiles.c.lat, profiles.c.lon).where(profiles.c.profile_id == order.profile_id)
        )
        return None if row is None or row.lat is None else (row.lat, row.lon)

    async def attempt(self, order: Order) -> Attempt:
        """Return the payment attempt of a reserved order.

        Raises:
            NotFound: if there is none; reserving makes it.
        """
        attempt = await self.attempt_if_any(order)
        if attempt is None:
            raise NotFound("There is no payment attempt for this order.")
        return attempt

    async def attempt_if_any(self, order: Order) -> Attempt | None:
        """Return the payment attempt of an order, or None if its stock was never reserved."""
        return await attempts.of_order(self._database.reader(order.profile_id), order.profile_id, order.id)

    async def stock_reserved(self, writer: Writer, order: Order) -> None:
        """Note that the stock is set aside, and open the payment attempt."""
        await self._happen(writer, order, Happening.STOCK_RESERVED)
        await attempts.begin(
            writer,
            profile_id=order.profile_id,
            order_id=order.id,
            amount=order.amount,
            currency=order.currency,
            method=order.payment_method,
        )

    async def out_of_stock(self, writer: Writer, order: Order) -> None:
        """Reject the order because there is not enough of something."""
        await self._happen(writer, order, Happening.OUT_OF_STOCK)

    async def payment_waits(self, order: Order) -> None:
        """Show that the payment has to wait for the provider; once."""
        if order.step is Step.RESERVED:
            async with self._database.writer(order.profile_id) as writer:
                await self._happen(writer, order, Happening.PAYMENT_WAITS)

    async def payment_authorised(self, writer: Writer, order: Order, attempt: Attempt, answer: Authorised) -> None:
        """Confirm the order: its money is held."""
        await attempts.record(writer, attempt, State.AUTHORISED, answer.provider_id)
        await self._happen(writer, order, Happening.PAYMENT_AUTHORISED)

    async def payment_declined(self, writer: Writer, order: Order, attempt: Attempt, answer: Declined) -> None:
        """Begin to undo the order: its payment is declined."""
        await attempts.record(writer, attempt, State.DECLINED, answer.provider_id)
        await self._happen(writer, order, Happening.PAYMENT_DECLINED)

    async def stock_released(self, writer: Writer, order: Order) -> None:
        """End a declined order: its stock is back."""
        await self._happen(writer, order, Happening.STOCK_RELEASED)

    async def undone(self, writer: Writer, order: Order, attempt: Attempt | None, money: Undone | None) -> None:
        """End a cancelled order: its stock is back and no money is held or kept."""
        if attempt is not None and money is not None:
            await attempts.record(writer, attempt, money.state, money.provider_id)
        await self._happen(writer, order, Happening.UNDONE)

    async def payment_captured(self, writer: Writer, attempt: Attempt) -> None:
        """Note that the money is ours, unless a cancellation has given it back meanwhile."""
        await attempts.record(writer, attempt, State.CAPTURED, attempt.provider_id)

    async def invoiced(self, writer: Writer, order: Order, key: str) -> None:
        """Link the stored invoice of a confirmed order, and let the confirmation mail follow.

        Raises:
            Unavailable: `order_changed`, if it was cancelled meanwhile.
        """
        linked = await writer.run(
            update(orders)
            .where(*_as_known(order))
            .values(invoice_key=key, version=order.version + 1, updated_at=datetime.now(UTC))
        )
        if not linked:
            raise _changed()
        writer.then(BUSINESS_EVENTS.labels("invoice", "issued").inc)
        payload = replace(order, version=order.version + 1).told()
        await outbox.append(writer, "order.invoiced", profile_id=order.profile_id, subject_id=order.id, payload=payload)

    async def _happen(self, writer: Writer, order: Order, happening: Happening) -> Order:
        transition = TRANSITIONS.get((order.step, happening))
        if transition is None:
            raise Conflict(f"An order that is {order.step} cannot see {happening}.", code="out_of_turn")
        now = datetime.now(UTC)
        history = [*order.history]
        if STATUS[transition.to] != order.status:
            history.append((STATUS[transition.to], wire.rfc3339(now)))
        changed = replace(
            order,
            step=transition.to,
            reason=transition.reason or order.reason,
            history=history,
            version=order.version + 1,
            updated_at=now,
        )
        moved = await writer.run(
            update(orders)
            .where(*_as_known(order))
            .values(
                step=changed.step,
                reason=changed.reason,
                history=changed.history,
                version=changed.version,
                updated_at=changed.updated_at,
            )
        )
        if not moved:
            raise _changed()
        if transition.event:
            await outbox.append(
                writer, transition.event, profile_id=order.profile_id, subject_id=order.id, payload=changed.told()
            )
        writer.then(BUSINESS_EVENTS.labels("order", transition.to).inc)
        if transition.to is Step.CONFIRMED:
            writer.then(partial(REVENUE.labels(order.currency).inc, order.amount))
        return changed

    async def _lines(self, new: NewOrder) -> tuple[tuple[Line, ...], str]:
        shown = await self._catalog.shown(item.product_id for item in new.items)
        unknown = tuple(
            FieldError(f"/items/{number}/product_id", "There is no such product.")
            for number, item in enumerate(new.items)
            if item.product_id not in shown
        )
        if unknown:
            raise Invalid("The order names a product that does not exist.", code="unknown_product", fields=unknown)
        ordered = [(item, shown[item.product_id]) for item in new.items]
        currency: str = ordered[0][1]["price"]["currency"]
        if any(product["price"]["currency"] != currency for _, product in ordered):
            raise Invalid.field("/items", "All products of an order must have the same currency.")
        return tuple(
            Line(item.product_id, product["sku"], product["name"], item.quantity, product["price"]["amount"])
            for item, product in ordered
        ), currency

    def _draft(self, profile_id: UUID, lines: tuple[Line, ...], currency: str, payment_method: str) -> Order:
        now = datetime.now(UTC)
        return Order(
            id=new_id(profile_id),
            profile_id=profile_id,
            step=Step.PLACED,
            reason=None,
            lines=lines,
            amount=sum(line.amount for line in lines),
            currency=currency,
            payment_method=payment_method,
            history=((STATUS[Step.PLACED], wire.rfc3339(now)),),
            invoice_key=None,
            version=1,
            created_at=now,
            updated_at=now,
        )


def _as_known(order: Order) -> tuple[ColumnElement[bool], ...]:
    return (orders.c.profile_id == order.profile_id, orders.c.id == order.id, orders.c.version == order.version)


def _rows(order: Order) -> tuple[Rows, Rows]:
    """Return a new order and its items as rows."""
    own = {
        "profile_id": order.profile_id,
        "id": order.id,
        "step": order.step,
        "amount": order.amount,
        "currency": order.currency,
        "payment_method": order.payment_method,
        "history": order.history,
        "version": order.version,
        "created_at": order.created_at,
        "updated_at": order.updated_at,
    }
    items = [
        {
            "profile_id": order.profile_id,
            "order_id": order.id,
            "line": number,
            "product_id": line.product_id,
            "sku": line.sku,
            "name": line.name,
            "quantity": line.quantity,
            "unit_amount": line.unit_amount,
        }
        for number, line in enumerate(order.lines)
    ]
    return Rows(orders, [own]), Rows(order_items, items)


def _changed() -> Unavailable:
    return Unavailable("The order has changed meanwhile; look again.", code="order_changed")


def _with_items(found: Select[Any]) -> Select[Any]:
    """Join the items to the orders that `found` selects: an order and its lines in one statement."""
    page = found.subquery()
    return (
        select(
            page,
            order_items.c.line,
            order_items.c.product_id,
            order_items.c.sku,
            order_items.c.name,
            order_items.c.quantity,
            order_items.c.unit_amount,
        )
        .join(order_items, (order_items.c.profile_id == page.c.profile_id) & (order_items.c.order_id == page.c.id))
        .order_by(page.c.id.desc(), order_items.c.line)
    )


def _orders(rows: Sequence[Row[Any]]) -> list[Order]:
    found: dict[UUID, Order] = {}
    for row in rows:
        line = Line(row.product_id, row.sku, row.name, row.quantity, row.unit_amount)
        known = found.get(row.id)
        if known is not None:
            found[row.id] = replace(known, lines=(*known.lines, line))
            continue
        found[row.id] = Order(
            id=row.id,
            profile_id=row.profile_id,
            step=Step(row.step),
            reason=row.reason,
            lines=(line,),
            amount=row.amount,
            currency=row.currency,
            payment_method=row.payment_method,
            history=tuple((status, at) for status, at in row.history),
            invoice_key=row.invoice_key,
            version=row.version,
            created_at=row.created_at,
            updated_at=row.updated_at,
        )
    return list(found.values())
