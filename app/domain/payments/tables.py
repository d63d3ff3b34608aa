"""Payment attempts, on the shard of the profile that pays."""

from sqlalchemy import CHAR, BigInteger, Column, DateTime, Index, PrimaryKeyConstraint, String, Table, Uuid

from app.scaling.database import metadata

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
