"""The sales read model and the jobs that report on it, in the catalog database."""

from sqlalchemy import (
    CHAR,
    JSON,
    BigInteger,
    Column,
    Date,
    DateTime,
    Index,
    Integer,
    PrimaryKeyConstraint,
    String,
    Table,
    Uuid,
)

from app.scaling.database import metadata

# One row for each line of a confirmed order.
sales = Table(
    "sales",
    metadata,
    Column("order_id", Uuid, nullable=False),
    Column("product_id", Uuid, nullable=False),
    Column("day", Date, nullable=False),
    Column("quantity", Integer, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("currency", CHAR(3), nullable=False),
    PrimaryKeyConstraint("order_id", "product_id"),
    Index("ix_sales_day", "day", "product_id"),  # a report's period
)

# How often two products were in one order; the recommendations' model. `product_id` < `other_id` in every row.
bought_together = Table(
    "bought_together",
    metadata,
    Column("product_id", Uuid, nullable=False),
    Column("other_id", Uuid, nullable=False),
    Column("orders", Integer, nullable=False),
    PrimaryKeyConstraint("product_id", "other_id"),
    Index("ix_bought_together_other", "other_id"),
)

# Work that somebody asked for and does not wait for; `parameters` is what they asked.
jobs = Table(
    "jobs",
    metadata,
    Column("id", Uuid, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("parameters", JSON, nullable=False),
    Column("status", String(16), nullable=False),  # processing, done, failed, cancelled
    Column("progress", Integer, nullable=False),  # per cent
    Column("result_key", String(255)),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("updated_at", DateTime(timezone=True), nullable=False),
    PrimaryKeyConstraint("id"),
    Index("ix_jobs_status", "status", "created_at"),  # how many are open, and which have been for too long
    Index("ix_jobs_created_at", "created_at"),  # the purge's question
)
