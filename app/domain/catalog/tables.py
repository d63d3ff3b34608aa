"""Products, warehouses, stock and what is set aside for orders, in the catalog database."""

from sqlalchemy import (
    CHAR,
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    Computed,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.mysql import MEDIUMTEXT
from sqlalchemy.dialects.postgresql import JSONB, TSVECTOR

from app.scaling.database import metadata
from app.scaling.dialect import search_words

products = Table(
    "products",
    metadata,
    Column("id", Uuid, nullable=False),
    Column("sku", String(64), nullable=False),
    Column("name", String(200), nullable=False),
    Column("description", Text, nullable=False),
    Column("category", String(64), nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("currency", CHAR(3), nullable=False),
    Column("attributes", JSON().with_variant(JSONB(), "postgresql"), nullable=False),
    # The sum of the stock rows, kept in the same transactions: a product is read a thousand times for each sale.
    Column("available", Integer, nullable=False),
    Column("version", Integer, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("updated_at", DateTime(timezone=True), nullable=False),
    Column(
        "words",
        Text().with_variant(TSVECTOR(), "postgresql").with_variant(MEDIUMTEXT(), "mariadb"),
        Computed(search_words("name", "description"), persisted=True),
    ),
    PrimaryKeyConstraint("id"),
    UniqueConstraint("sku"),
    CheckConstraint("amount >= 0", name="amount_not_negative"),
    CheckConstraint("available >= 0", name="available_not_negative"),
    Index("ix_products_category", "category"),  # GET /products/{id}/recommendations, those of the same category
    Index("ix_products_words", "words", postgresql_using="gin", mariadb_prefix="FULLTEXT"),  # GET /products/search
)

warehouses = Table(
    "warehouses",
    metadata,
    Column("id", Uuid, nullable=False),
    Column("name", String(100), nullable=False),
    Column("lat", Float(53), nullable=False),
    Column("lon", Float(53), nullable=False),
    PrimaryKeyConstraint("id"),
    UniqueConstraint("name"),
    # The nearest warehouse of a place, without reading them all.
    Index("ix_warehouses_place", text("point(lon, lat)"), postgresql_using="gist"),
)

stock = Table(
    "stock",
    metadata,
    Column("product_id", Uuid, ForeignKey("products.id"), nullable=False),
    Column("warehouse_id", Uuid, ForeignKey("warehouses.id"), nullable=False),
    Column("free", Integer, nullable=False),
    PrimaryKeyConstraint("product_id", "warehouse_id"),
    CheckConstraint("free >= 0", name="free_not_negative"),
)

# How often a product was looked at, brought up to date in batches. Apart, so that counting never touches a product.
product_views = Table(
    "product_views",
    metadata,
    Column("product_id", Uuid, nullable=False),
    Column("views", BigInteger, nullable=False),
    PrimaryKeyConstraint("product_id"),
    Index("ix_product_views_views", "views"),  # GET /products/{id}/recommendations, what is looked at most
)

# One row an order, whatever became of it: a reservation asked for twice answers what it answered first.
reservations = Table(
    "reservations",
    metadata,
    Column("order_id", Uuid, nullable=False),
    Column("state", String(16), nullable=False),  # reserved, refused, released, dispatched
    Column("allocations", JSON, nullable=False),  # [product, warehouse, pieces] each; of a refusal, the products short
    Column("warehouse_id", Uuid),  # the one that is told to ship; it ships the most pieces
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("updated_at", DateTime(timezone=True), nullable=False),
    PrimaryKeyConstraint("order_id"),
    Index("ix_reservations_pick_list", "warehouse_id", "state", "created_at"),  # what a warehouse has to ship
)
