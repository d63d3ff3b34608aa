"""Dead letters by id alone, which is how people name them and the order in which they are listed.

Revision: 0004
Follows: 0003
"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add what is new."""
    op.create_index("ix_dead_letters_id", "dead_letters", ["id"], unique=False)
    op.create_index("ix_dead_letters_message", "dead_letters", ["profile_id", "message_id"], unique=False)
    op.create_index("ix_dead_letters_replayed_at", "dead_letters", ["replayed_at"], unique=False)


def downgrade() -> None:
    """Take it away again."""
    op.drop_index("ix_dead_letters_replayed_at", table_name="dead_letters")
    op.drop_index("ix_dead_letters_message", table_name="dead_letters")
    op.drop_index("ix_dead_letters_id", table_name="dead_letters")
