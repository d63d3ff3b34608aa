"""Products by category, for recommendations: without it each one reads the whole catalog.

Revision: 0008
Follows: 0007
"""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add what is new."""
    op.create_index("ix_products_category", "products", ["category"])


def downgrade() -> None:
    """Take it away again."""
    op.drop_index("ix_products_category", table_name="products")
