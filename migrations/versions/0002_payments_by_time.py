"""Payments by the time at which they last moved, for the comparison with the provider.

Revision: 0002
Follows: 0001
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add what is new."""
    op.create_index(
        "ix_payment_attempts_updated_at", "payment_attempts", ["updated_at", "profile_id", "id"], unique=False
    )


def downgrade() -> None:
    """Take it away again."""
    op.drop_index("ix_payment_attempts_updated_at", table_name="payment_attempts")
