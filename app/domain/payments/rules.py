"""What is true of a payment attempt: its states, and the ways between them.

    pending ─ authorised ─ captured
       └─ declined   └─ voided   └─ refunded

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
    """The provider holds the money for us."""

    provider_id: str


@dataclass(frozen=True, slots=True)
class Declined:
    """The provider refuses this payment for good."""

    provider_id: str
    reason: str
