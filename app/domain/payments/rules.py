"""What is true of a payment attempt: its states, and the ways between them.

    pending ─ authorised ─ captured
     │  └─ declined  └─ voided   └─ refunded
     └─ voided (cancelled before its answer was recorded)

The attempt's id is the provider's idempotency key: however often we ask, money moves once.
"""

from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID


class State(StrEnum):
    """Where an attempt is."""

    PENDING = "pending"
    AUTHORISED = "authorised"
    DECLINED = "declined"
    CAPTURED = "captured"
    VOIDED = "voided"
    REFUNDED = "refunded"


# What a state may follow. An undoing that was faster than the record of a capture stands: no way leads back from it.
COMES_FROM: dict[State, frozenset[State]] = {
    State.AUTHORISED: frozenset({State.PENDING}),
    State.DECLINED: frozenset({State.PENDING}),
    State.CAPTURED: frozenset({State.AUTHORISED}),
    State.VOIDED: frozenset({State.PENDING, State.AUTHORISED}),
    State.REFUNDED: frozenset({State.AUTHORISED, State.CAPTURED}),
}


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try to be paid for an order; `amount` in minor units, `provider_id` once the provider has answered."""

    id: UUID
    profile_id: UUID
    order_id: UUID
    amount: int
    currency: str
    method: str
    state: State
    provider_id: str | None


@dataclass(frozen=True, slots=True)
class Authorised:
    """The provider holds the money for us; without an id there was nothing to pay and nobody was asked."""

    provider_id: str | None


@dataclass(frozen=True, slots=True)
class Declined:
    """The provider refuses this payment for good; without an id it did not even open a case."""

    provider_id: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Undone:
    """The provider neither holds nor keeps the money: it was voided or refunded, or declined in the first place."""

    state: State
    provider_id: str | None
