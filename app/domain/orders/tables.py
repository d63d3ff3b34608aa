"""Orders, their items, invoices and the log of mails, on the shard of the profile that ordered."""

from sqlalchemy import (
    CHAR,
    JSON,
    BigInteger,
    Column,
    DateTime,
    Index,
    Integer,
    PrimaryKeyConstraint,
    String,
    Table,
    Uuid,
)

from app.scaling.database import metadata

orders = Table(
    "orders",
    metadata,
    Column("profile_id", Uuid, nullable=False),
    Column("id", Uuid, nullable=False),
    Column("step", String(32), nullable=False),
    Column("reason", String(32)),
    Column("amount", BigInteger, nullable=False),
    Column("currency", CHAR(3), nullable=False),
    Column("payment_method", String(64), nullable=False),
    Column("history", JSON, nullable=False),
    Column("invoice_key", String(255)),
    Column("version", Integer, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("updated_at", DateTime(timezone=True), nullable=False),
    PrimaryKeyConstraint("profile_id", "id"),  # also GET /orders: a profile's orders by id are its orders by age
    Index("ix_orders_step", "step", "updated_at"),  # which orders are stuck
)

order_items = Table(
    "order_items",
    metadata,
    Column("profile_id", Uuid, nullable=False),
    Column("order_id", Uuid, nullable=False),
    Column("line", Integer, nullable=False),
    Column("product_id", Uuid, nullable=False),
    Column("sku", String(64), nullable=False),
    Column("name", String(200), nullable=False),
    Column("quantity", Integer, nullable=False),
    Column("unit_amount", BigInteger, nullable=False),
    PrimaryKeyConstraint("profile_id", "order_id", "line"),
)

invoices = Table(
    "invoices",
    metadata,
    Column("profile_id", Uuid, nullable=False),
    Column("order_id", Uuid, nullable=False),
    Column("number", String(32), nullable=False),
    Column("issued_at", DateTime(timezone=True), nullable=False),
    PrimaryKeyConstraint("profile_id", "order_id"),
)

# The one table of a shard without a profile: the next number belongs to the shard and the year. Where the database
# spreads the tables itself this one is a reference table.
invoice_counters = Table(
    "invoice_counters",
    metadata,
    Column("year", Integer, nullable=False, autoincrement=False),
    Column("last", Integer, nullable=False),
    PrimaryKeyConstraint("year"),
)

mails = Table(
    "mails",
    metadata,
    Column("profile_id", Uuid, nullable=False),
    Column("order_id", Uuid, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("sent_at", DateTime(timezone=True), nullable=False),
    PrimaryKeyConstraint("profile_id", "order_id", "kind"),
)
