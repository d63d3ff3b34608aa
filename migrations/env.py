"""Alembic's entry: runs the steps on the connection that `runner.py` hands over, in its transaction."""

from alembic import context

from app.domain.tables import metadata
from app.scaling.dialect import mariadb_steps  # noqa: F401  # Alembic finds it once it is imported

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, compare_type=True)
with context.begin_transaction():
    context.run_migrations()
