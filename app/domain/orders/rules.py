"""The saga of an order as one table: in which step what may happen, and where that leads.

    placed ── stock_reserved ─→ reserved ── payment_authorised ─→ confirmed
       │                           │  └─ payment_waits ─→ payment_pending (and from there as from reserved)
       └─ out_of_stock ─→ rejected └─ payment_declined ─→ declined ── stock_released ─→ rejected

    placed, reserved, payment_pending, confirmed ── cancel_asked ─→ cancelling ── undone ─→ cancelled

A customer sees the status, which is coarser than the step: while a decline or a cancellation is being undone the order
is still processing, so that a rejected or cancelled order has always given its stock and its money back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

LARGEST_QUANTITY = 10_000
MOST_LINES = 100
TAX_RATE = 19  # per cent, included in every price
# A confirmed order is on a warehouse's pick list; nobody there packs it before this time is over.
CANCELLABLE = timedelta(minutes=30)


class Step(StrEnum):
    """Where the saga is."""

    PLACED = "placed"
    RESERVED = "reserved"
    PAYMENT_PENDING = "payment_pending"
    DECLINED = "declined"
    CONFIRMED = "confirmed"
    REJECTED = "rejected"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


class Happening(StrEnum):
    """What can happen to an order."""

    STOCK_RESERVED = "stock_reserved"
    OUT_OF_STOCK = "out_of_stock"
    PAYMENT_WAITS = "payment_waits"
    PAYMENT_AUTHORISED = "payment_authorised"
    PAYMENT_DECLINED = "payment_declined"
    STOCK_RELEASED = "stock_released"
    CANCEL_ASKED = "cancel_asked"
    UNDONE = "undone"


class Reason(StrEnum):
    """Why an order was rejected."""

    OUT_OF_STOCK = "out_of_stock"
    PAYMENT_DECLINED = "payment_declined"


@dataclass(frozen=True, slots=True)
class Transition:
    """Where a happening leads, the event that tells of it, and the reason that it gives."""

    to: Step
    event: str | None = None
    reason: Reason | None = None


_AUTHORISED = Transition(Step.CONFIRMED, "order.confirmed")
_DECLINED = Transition(Step.DECLINED, "order.declined", Reason.PAYMENT_DECLINED)
_CANCELLING = Transition(Step.CANCELLING, "order.cancelling")

TRANSITIONS: dict[tuple[Step, Happening], Transition] = {
    (Step.PLACED, Happening.STOCK_RESERVED): Transition(Step.RESERVED, "order.reserved"),
    (Step.PLACED, Happening.OUT_OF_STOCK): Transition(Step.REJECTED, "order.rejected", Reason.OUT_OF_STOCK),
    (Step.PLACED, Happening.CANCEL_ASKED): _CANCELLING,
    (Step.RESERVED, Happening.PAYMENT_WAITS): Transition(Step.PAYMENT_PENDING, "order.payment_pending"),
    (Step.RESERVED, Happening.PAYMENT_AUTHORISED): _AUTHORISED,
    (Step.RESERVED, Happening.PAYMENT_DECLINED): _DECLINED,
    (Step.RESERVED, Happening.CANCEL_ASKED): _CANCELLING,
    (Step.PAYMENT_PENDING, Happening.PAYMENT_AUTHORISED): _AUTHORISED,
    (Step.PAYMENT_PENDING, Happening.PAYMENT_DECLINED): _DECLINED,
    (Step.PAYMENT_PENDING, Happening.CANCEL_ASKED): _CANCELLING,
    (Step.CONFIRMED, Happening.CANCEL_ASKED): _CANCELLING,
    (Step.DECLINED, Happening.STOCK_RELEASED): Transition(Step.REJECTED, "order.rejected"),
    (Step.CANCELLING, Happening.UNDONE): Transition(Step.CANCELLED, "order.cancelled"),
}
# Where an order may stay for ever. A confirmed one can still be cancelled for a while.
FINAL = frozenset({Step.CONFIRMED, Step.REJECTED, Step.CANCELLED})

STATUS = {
    Step.PLACED: "processing",
    Step.RESERVED: "processing",
    Step.DECLINED: "processing",
    Step.PAYMENT_PENDING: "payment_pending",
    Step.CONFIRMED: "confirmed",
    Step.REJECTED: "rejected",
    Step.CANCELLING: "processing",
    Step.CANCELLED: "cancelled",
}


@dataclass(frozen=True, slots=True)
class NewItem:
    """So many pieces of a product, as ordered."""

    product_id: UUID
    quantity: int


@dataclass(frozen=True, slots=True)
class NewOrder:
    """What a customer orders, and how they pay."""

    items: tuple[NewItem, ...]
    payment_method: str


@dataclass(frozen=True, slots=True)
class Line:
    """One line, with the product as it was when it was ordered; `unit_amount` in minor units, tax included."""

    product_id: UUID
    sku: str
    name: str
    quantity: int
    unit_amount: int

    @property
    def amount(self) -> int:
        """The line's total in minor units."""
        return self.quantity * self.unit_amount


@dataclass(frozen=True, slots=True)
class Order:
    """An order as stored.

    Attributes:
        history: (status, moment in RFC 3339) for each status that the customer could see.
        invoice_key: where the invoice is stored, once it is.
        version: grows with every change.
    """

    id: UUID
    profile_id: UUID
    step: Step
    reason: str | None
    lines: tuple[Line, ...]
    amount: int
    currency: str
    payment_method: str
    history: Sequence[tuple[str, str]]
    invoice_key: str | None
    version: int
    created_at: datetime
    updated_at: datetime

    @property
    def status(self) -> str:
        """What the customer sees."""
        return STATUS[self.step]

    @property
    def confirmed_at(self) -> datetime | None:
        """When the order was confirmed, also if it was cancelled afterwards; None if it never was."""
        times = [at for status, at in self.history if status == STATUS[Step.CONFIRMED]]
        return datetime.fromisoformat(times[-1]) if times else None

    def cancellable(self, now: datetime) -> bool:
        """Return whether its customer may still cancel the order."""
        in_time = self.confirmed_at is None or now < self.confirmed_at + CANCELLABLE
        return in_time and (self.step, Happening.CANCEL_ASKED) in TRANSITIONS

    def ended(self, now: datetime) -> bool:
        """Return whether nothing can happen to the order any more."""
        return self.step in FINAL and not self.cancellable(now)

    def told(self) -> dict[str, Any]:
        """Return what an event says of the order as it is: how it stands, and nothing of a person."""
        return {"status": self.status, "sequence": len(self.history), "version": self.version}

    def view(self) -> dict[str, Any]:
        """Return what the customer sees, JSON-ready."""
        view: dict[str, Any] = {
            "id": self.id,
            "status": self.status,
            "items": [
                {
                    "product_id": line.product_id,
                    "sku": line.sku,
                    "name": line.name,
                    "quantity": line.quantity,
                    "unit_price": {"amount": line.unit_amount, "currency": self.currency},
                    "amount": {"amount": line.amount, "currency": self.currency},
                }
                for line in self.lines
            ],
            "total": {"amount": self.amount, "currency": self.currency},
            "payment_method": self.payment_method,
            "history": [{"status": status, "at": at} for status, at in self.history],
            "invoice_url": f"/api/v1/orders/{self.id}/invoice" if self.invoice_key else None,
            "created_at": self.created_at,
            "updated_at": self.updated_at,
        }
        if self.step is Step.REJECTED:
            view["reason"] = self.reason
        return view
