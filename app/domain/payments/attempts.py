"""Payment attempts as rows: one an order, opened when its stock is reserved and kept in step with the provider.

They live on the shard of the profile that pays. A row is committed before the provider is asked, so there is no money
of ours at the provider without a row here. A state is only overwritten by one that may follow it.
"""

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    CHAR,
    BigInteger,
    Column,
    DateTime,
    Index,
    PrimaryKeyConstraint,
    Row,
    String,
    Table,
    Uuid,
    insert,
    select,
    update,
)

from app.core.ids import new_id
from app.domain.payments.rules import COMES_FROM, Attempt, State
from app.scaling.database import Queries, Writer, metadata

payment_attempts = Table(
    "payment_attempts",
    metadata,
    Column("profile_id", Uuid, nullable=False),
    Column("id", Uuid, nullable=False),
    Column("order_id", Uuid, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("currency", CHAR(3), nullable=False),
    Column("method", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("provider_id", String(64)),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("updated_at", DateTime(timezone=True), nullable=False),
    PrimaryKeyConstraint("profile_id", "id"),
    Index("ix_payment_attempts_order", "profile_id", "order_id"),
    Index("ix_payment_attempts_updated_at", "updated_at", "profile_id", "id"),  # what is compared with the provider
)


async def begin(writer: Writer, *, profile_id: UUID, order_id: UUID, amount: int, currency: str, method: str) -> None:
    """Open the attempt of an order in the caller's transaction."""
    now = datetime.now(UTC)
    await writer.run(
        insert(payment_attempts).values(
            profile_id=profile_id,
            id=new_id(profile_id),
            order_id=order_id,
            amount=amount,
            currency=currency,
            method=method,
            state=State.PENDING,
            created_at=now,
            updated_at=now,
        )
    )


async def of_order(queries: Queries, profile_id: UUID, order_id: UUID) -> Attempt | None:
    """Return the attempt of an order, or None if its stock was never reserved."""
    row = await queries.first(
        select(payment_attempts).where(
            payment_attempts.c.profile_id == profile_id, payment_attempts.c.order_id == order_id
        )
    )
    return None if row is None else attempt_from(row)


async def record(writer: Writer, attempt: Attempt, state: State, provider_id: str | None) -> bool:
    """Note where the attempt is now; False, and nothing changed, if that may not follow what is recorded."""
    moved = await writer.run(
        update(payment_attempts)
        .where(
            payment_attempts.c.profile_id == attempt.profile_id,
            payment_attempts.c.id == attempt.id,
            payment_attempts.c.state.in_(COMES_FROM[state]),
        )
        .values(state=state, provider_id=provider_id, updated_at=datetime.now(UTC))
    )
    return bool(moved)


def attempt_from(row: Row[Any]) -> Attempt:
    """Return the attempt that a row of the table holds."""
    return Attempt(
        id=row.id,
        profile_id=row.profile_id,
        order_id=row.order_id,
        amount=row.amount,
        currency=row.currency,
        method=row.method,
        state=State(row.state),
        provider_id=row.provider_id,
    )
