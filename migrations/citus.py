"""Lets Citus spread the tables of a shard over its nodes, for those who want the database to do it.

Every key of these tables begins with what they are spread by, `profile_id`, so nothing of the schema changes: the
tables are handed to Citus as they are, all in one group, so that a profile is on one node. Tables of the catalog
stay local to the coordinator. Our own fence goes: Citus moves its shards itself, and spreads no table with triggers.
"""

from collections.abc import Iterable

from sqlalchemy import Connection, Table, text

from app.core.settings import SettingsError

# The one table of a shard without a profile; small, and locked for each number: a copy on every node.
REFERENCE_TABLES = ("invoice_counters",)


def distribute(connection: Connection, tables: Iterable[Table]) -> list[str]:
    """Hand the tables whose key holds `profile_id` to Citus; return the names of those that it did not have yet.

    Raises:
        SettingsError: Citus is not there.
    """
    if connection.scalar(text("SELECT to_regclass('pg_dist_partition')")) is None:
        raise SettingsError("DATABASE_SPREAD: this database has no Citus; install it and run CREATE EXTENSION citus.")
    known = set(connection.scalars(text("SELECT logicalrelid::regclass::text FROM pg_dist_partition")))
    spread = [table.name for table in tables if "profile_id" in table.primary_key.columns and table.name not in known]
    # `profiles` first: the others are placed where it is.
    for name in sorted(spread, key=lambda name: (name != "profiles", name)):
        connection.execute(text(f'DROP TRIGGER IF EXISTS fence_shard ON "{name}"'))
        beside = "default" if name == "profiles" else "profiles"
        connection.execute(
            text("SELECT create_distributed_table(CAST(:name AS regclass), 'profile_id', colocate_with => :beside)"),
            {"name": name, "beside": beside},
        )
    copied = [name for name in REFERENCE_TABLES if name not in known]
    for name in copied:
        connection.execute(text("SELECT create_reference_table(CAST(:name AS regclass))"), {"name": name})
    return [*spread, *copied]
