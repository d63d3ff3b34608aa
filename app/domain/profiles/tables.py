"""Profiles on their shard, and the e-mail directory that keeps addresses unique over all shards."""

from sqlalchemy import (
    CHAR,
    JSON,
    Column,
    DateTime,
    Float,
    Index,
    Integer,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    Uuid,
    func,
)
from sqlalchemy.dialects.postgresql import JSONB

from app.scaling.database import metadata

profiles = Table(
    "profiles",
    metadata,
    Column("profile_id", Uuid, nullable=False),
    Column("email", String(254)),
    Column("password_hash", String(255)),
    Column("name", String(100), nullable=False),
    Column("bio", Text),
    Column("tier", String(16), nullable=False),
    Column("role", String(16), nullable=False),
    Column("lat", Float(53)),
    Column("lon", Float(53)),
    Column("attributes", JSON().with_variant(JSONB(), "postgresql"), nullable=False),
    Column("avatar_key", String(255)),
    Column("version", Integer, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("updated_at", DateTime(timezone=True), nullable=False),
    Column("erased_at", DateTime(timezone=True)),
    PrimaryKeyConstraint("profile_id"),
)
# GET /profiles?name_prefix=…: a prefix match on an index needs byte order, whatever the database's collation.
Index(
    "ix_profiles_name_prefix",
    func.lower(profiles.c.name).label("name_lower"),
    postgresql_ops={"name_lower": "text_pattern_ops"},
)
# GET /profiles?attribute=key:value
Index(
    "ix_profiles_attributes",
    profiles.c.attributes,
    postgresql_using="gin",
    postgresql_ops={"attributes": "jsonb_path_ops"},
)

# In the catalog database, because only one place can say that an address is taken. An address is reserved before the
# profile exists and confirmed after; a reservation whose profile never came is swept.
email_directory = Table(
    "email_directory",
    metadata,
    Column("email_key", CHAR(64), nullable=False),
    Column("profile_id", Uuid, nullable=False),
    Column("confirmed", Integer, nullable=False),
    Column("reserved_at", DateTime(timezone=True), nullable=False),
    PrimaryKeyConstraint("email_key"),
    Index("ix_email_directory_unconfirmed", "confirmed", "reserved_at"),  # the sweep's question
)
