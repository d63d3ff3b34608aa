"""The durable copy of sessions, on the profile's shard: losing Redis signs nobody out."""

from sqlalchemy import CHAR, Column, DateTime, Index, PrimaryKeyConstraint, String, Table, Uuid

from app.scaling.database import metadata

sessions = Table(
    "sessions",
    metadata,
    Column("profile_id", Uuid, nullable=False),
    Column("key", CHAR(64), nullable=False),
    Column("id", Uuid, nullable=False),
    Column("user_agent", String(200), nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("seen_at", DateTime(timezone=True), nullable=False),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    PrimaryKeyConstraint("profile_id", "key"),
    Index("ix_sessions_expires_at", "expires_at"),  # the purge's question
)
