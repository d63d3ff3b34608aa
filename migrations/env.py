"""Alembic's entry: runs the steps on the connection that `runner.py` hands over, in its transaction."""

from alembic import context

from app.domain.tables import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, compare_type=True)
with context.begin_transaction():
    context.run_migrations()
