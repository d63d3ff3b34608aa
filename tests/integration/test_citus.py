"""On plain PostgreSQL: the tables of a shard can be spread by `profile_id` as they are, and so can the statements.

Citus itself is not installed here. What it asks of a schema and of statements is held: the column is in every unique
key, and every statement on such a table names it, except those that are meant for all shards and are listed.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from halves import Halves
from sqlalchemy import Connection, UniqueConstraint, event, text
from sqlalchemy.ext.asyncio import create_async_engine

from app.core.settings import SettingsError
from app.domain.profiles.rules import NewProfile
from app.domain.tables import metadata
from app.scaling import dialect, outbox
from migrations import citus

pytest_plugins = ("halves", "quiet")
pytestmark = pytest.mark.postgresql("Citus is an extension of it")

PASSWORD = "a long enough pass phrase"
SPREAD = {table.name: table for table in metadata.sorted_tables if "profile_id" in table.primary_key.columns}
# Statements that go over all profiles of a shard, by how they begin or what they ask for.
FOR_ALL = (
    re.compile(r"FROM profiles\s+WHERE profiles\.erased_at IS NULL"),  # GET /profiles
    re.compile(r"FROM outbox\s+WHERE outbox\.due_at <="),  # the relay's claim
)


def test_the_column_is_in_every_unique_key_of_every_table_of_a_shard() -> None:
    for table in SPREAD.values():
        unique = [one for one in table.constraints if isinstance(one, UniqueConstraint)]
        keys = [table.primary_key.columns, *(one.columns for one in unique)]
        keys += [index.columns for index in table.indexes if index.unique]
        assert all("profile_id" in key for key in keys), table.name
        assert not table.foreign_keys, table.name


@contextmanager
def heard(halves: Halves) -> Iterator[list[str]]:
    """Collect every statement that an instance sends to either shard."""
    statements: list[str] = []

    def hear(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    engines = [
        engine.sync_engine
        for shard in halves.one.database.shards
        for node in shard.replicas.nodes
        for engine in (node.engine, node.writes)
    ]
    for engine in engines:
        event.listen(engine, "before_cursor_execute", hear)
    yield statements
    for engine in engines:
        event.remove(engine, "before_cursor_execute", hear)


def names_the_profile(statement: str) -> bool:
    """Return whether a statement is about one profile, or writes rows that say whose they are."""
    into = re.match(r"INSERT INTO \w+ \(([^)]*)\)", statement)
    if into:
        return "profile_id" in into[1]
    where = statement.partition("WHERE")[2]
    return bool(re.search(r"profile_id\b[^=<>]{0,40}(=|IN)", where))


async def test_every_statement_on_a_table_of_a_shard_names_the_profile(halves: Halves) -> None:
    email = f"{uuid4().hex}@example.com"
    one = halves.one
    with heard(halves) as statements:
        profile = await one.profiles.sign_up(NewProfile(email, PASSWORD, "Somebody"))
        signed_in = await one.sessions.sign_in(email, PASSWORD, "browser")
        await one.redis.client.flushdb()
        assert await one.sessions.find(signed_in.token)
        await one.profiles.public(profile.id)
        await one.profiles.own(profile.id)
        await one.profiles.change(profile.id, 1, {"bio": "x"})
        await one.cache.page(one.profiles.listed(None, None, 5, None))
        await one.orders.listed(profile.id, 5, None)
        await one.sessions.listed(profile.id)
        for shard in (0, 1):
            async with one.database.writer_of(shard) as writer:
                messages = await outbox.claim(writer, batch=10_000, lease=timedelta(seconds=1))
                await outbox.finish(writer, messages[:1])
        await one.profiles.erase(profile.id, 2)
        await one.sessions.end_all(profile.id)
        await one.directory.sweep()
    touched = re.compile(rf"\b({'|'.join(SPREAD)})\b")
    about_shards = [statement for statement in statements if touched.search(statement)]
    assert len(about_shards) > 10
    strays = [
        statement
        for statement in about_shards
        if not names_the_profile(statement) and not any(known.search(statement) for known in FOR_ALL)
    ]
    assert strays == []


@pytest.mark.sabotage(
    path="migrations/citus.py",
    take_out='beside = "default" if name == "profiles" else "profiles"',
    put='beside = "none"',
)
async def test_the_tables_are_handed_over_once_in_one_group_without_our_fence(halves: Halves) -> None:
    def twice(connection: Connection) -> tuple[list[str], list[str]]:
        return citus.distribute(connection, metadata.sorted_tables), citus.distribute(
            connection, metadata.sorted_tables
        )

    def alone(connection: Connection) -> None:
        with pytest.raises(SettingsError, match="this database has no Citus"):
            citus.distribute(connection, metadata.sorted_tables)

    engine = create_async_engine(dialect.driver_url(halves.urls[1]))
    async with engine.connect() as connection:
        await connection.run_sync(alone)
        # What of Citus is called, as tables and functions that note it; all of it is rolled back.
        for statement in (
            "CREATE TABLE pg_dist_partition (logicalrelid regclass, beside text)",
            (
                "CREATE FUNCTION create_distributed_table(name regclass, by text, colocate_with text) RETURNS void "
                "LANGUAGE sql AS 'INSERT INTO pg_dist_partition VALUES (name, by || '' '' || colocate_with)'"
            ),
            (
                "CREATE FUNCTION create_reference_table(name regclass) RETURNS void "
                "LANGUAGE sql AS 'INSERT INTO pg_dist_partition VALUES (name, ''everywhere'')'"
            ),
        ):
            await connection.execute(text(statement))
        first, second = await connection.run_sync(twice)
        rows = await connection.execute(text("SELECT logicalrelid::text AS name, beside FROM pg_dist_partition"))
        placed = {row.name: row.beside for row in rows}
        fences = await connection.scalar(text("SELECT count(*) FROM pg_trigger WHERE tgname = 'fence_shard'"))
        await connection.rollback()
    await engine.dispose()
    assert set(first) == {*SPREAD, "invoice_counters"}
    assert second == []
    expected = dict.fromkeys(SPREAD, "profile_id profiles") | {"profiles": "profile_id default"}
    assert placed == expected | {"invoice_counters": "everywhere"}
    assert fences == 0
