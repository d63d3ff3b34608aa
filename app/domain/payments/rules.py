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
class Held:
    """What the provider has under an attempt's key; `status` in its own words."""

    provider_id: str
    status: str
    amount: int
    currency: str
    reference: str


# What the provider must say of an attempt in a state; None is that it knows nothing of it.
_AGREES: dict[State, frozenset[str | None]] = {
    State.PENDING: frozenset({None}),
    State.AUTHORISED: frozenset({"authorized"}),
    State.DECLINED: frozenset({"declined"}),
    State.CAPTURED: frozenset({"captured"}),
    State.VOIDED: frozenset({"voided"}),
    State.REFUNDED: frozenset({"refunded"}),
}


def difference(attempt: Attempt, held: Held | None) -> str | None:
    """Return in words what our record and the provider's differ in, or None if they agree to the cent."""
    expected = _AGREES[attempt.state]
    if attempt.provider_id is None:
        expected = frozenset({None})  # never asked, or refused without a case being opened
    status = held.status if held else None
    if status not in expected:
        return f"we have {attempt.state}, the provider {status or 'nothing'}"
    if held is None:
        return None
    ours = (attempt.provider_id, attempt.amount, attempt.currency, str(attempt.order_id))
    theirs = (held.provider_id, held.amount, held.currency, held.reference)
    names = ("id", "amount", "currency", "order")
    wrong = [
        f"{name} {our} here, {their} there"
        for name, our, their in zip(names, ours, theirs, strict=True)
        if our != their
    ]
    return "; ".join(wrong) or None


@dataclass(frozen=True, slots=True)
class Undone:
    """The provider neither holds nor keeps the money: it was voided or refunded, or declined in the first place."""

    state: State
    provider_id: str | None
