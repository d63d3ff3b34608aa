"""Fence of shards: a database itself refuses rows of logical shards that it does not hold (any more).

Revision: 0007
Follows: 0006
"""

import sqlalchemy as sa
from alembic import op

from migrations.fence import set_up, take_down

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

FENCED = (
    "dead_letters",
    "idempotency_keys",
    "invoices",
    "mails",
    "order_items",
    "orders",
    "outbox",
    "payment_attempts",
    "profiles",
    "receipts",
    "sessions",
)


def upgrade() -> None:
    """Add what is new."""
    op.create_table(
        "shard_fences",
        sa.Column("logical", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("until", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("logical", name=op.f("pk_shard_fences")),
    )
    op.create_table(
        "shard_changes",
        sa.Column("id", sa.BigInteger(), autoincrement=True, nullable=False),
        sa.Column("profile_id", sa.Uuid(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_shard_changes")),
    )
    set_up(FENCED)


def downgrade() -> None:
    """Take it away again."""
    take_down(FENCED)
    op.drop_table("shard_changes")
    op.drop_table("shard_fences")
