"""How often products are looked at, and which batch of such counts was the last.

Revision: 0009
Follows: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add what is new."""
    op.create_table(
        "product_views",
        sa.Column("product_id", sa.Uuid(), nullable=False),
        sa.Column("views", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("product_id", name=op.f("pk_product_views")),
    )
    op.create_index("ix_product_views_views", "product_views", ["views"])
    op.create_table(
        "tally_batches",
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_tally_batches")),
    )


def downgrade() -> None:
    """Take it away again."""
    op.drop_table("tally_batches")
    op.drop_index("ix_product_views_views", table_name="product_views")
    op.drop_table("product_views")
