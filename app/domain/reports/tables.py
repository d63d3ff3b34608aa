"""The sales read model, in the catalog database: one row for each line of a confirmed order."""

from sqlalchemy import (
    CHAR,
    BigInteger,
    Column,
    Date,
    Index,
    Integer,
    PrimaryKeyConstraint,
    Table,
    Uuid,
)

from app.scaling.database import metadata

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
