"""Migrations: from nothing to the models, several at once without harm, only adding, and back."""

import asyncio
import re
from collections.abc import AsyncIterator

import asyncpg
import pytest
from alembic import command
from conftest import PATIENCE, settings_from, until
from engines import WORDS, ask
from quiet import database_on, environment_of
from sqlalchemy import Connection, event

from app.core.settings import Settings
from app.domain.tables import metadata
from deploy.local.cluster import Cluster
from migrations import runner

pytest_plugins = ("quiet",)

NAME = "quiet_migrations"


@pytest.fixture
async def empty(cluster: Cluster) -> AsyncIterator[Settings]:
    """Settings of an empty database."""
    async with database_on(cluster, NAME):
        yield settings_from(environment_of(cluster, NAME))


async def tables(url: str) -> set[str]:
    return {row["name"] for row in await ask(url, WORDS.tables)}


@pytest.mark.sabotage(
    path="migrations/versions/0001_first_tables.py",
    take_out='    op.create_index("ix_outbox_due_at", "outbox", ["due_at"], unique=False)\n',
    put="",
)
async def test_an_empty_database_becomes_what_the_models_say(empty: Settings) -> None:
    url = empty.database.shards[0].primary
    assert await asyncio.to_thread(runner.check, url) == []
    assert await tables(url) == {*metadata.tables, "alembic_version"}


@pytest.mark.postgresql("its advisory locks are looked at")
@pytest.mark.sabotage(
    path="app/scaling/dialect/postgresql.py",
    take_out='    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": lock})\n',
    put="",
)
async def test_a_run_waits_for_one_that_is_under_way_and_a_further_one_finds_nothing_to_do(empty: Settings) -> None:
    url = empty.database.shards[0].primary
    waiting = (
        "SELECT 1 FROM pg_locks JOIN pg_database ON pg_database.oid = database "
        "WHERE datname = current_database() AND locktype = 'advisory' AND NOT granted"
    )
    first = await asyncpg.connect(url)
    try:
        async with first.transaction():
            await first.execute("SELECT pg_advisory_xact_lock($1)", runner.LOCK)
            second = asyncio.create_task(asyncio.to_thread(runner.upgrade, empty))

            async def waits_or_ended() -> bool:
                return second.done() or bool(await first.fetch(waiting))

            await until(waits_or_ended)
            assert not second.done()
            assert await tables(url) == set()
        await second
    finally:
        await first.close()
    await asyncio.to_thread(runner.upgrade, empty)
    assert await asyncio.to_thread(runner.check, url) == []
    assert await runner._on(url, runner.current)


@pytest.mark.postgresql("its locks are looked at")
@pytest.mark.sabotage("migrations/runner.py", "lock_seconds=LOCK_SECONDS", "lock_seconds=0")
@pytest.mark.sabotage(
    "migrations/runner.py", "        except dialect.ERRORS as error:\n", "        except ZeroDivisionError as error:\n"
)
async def test_a_long_transaction_delays_a_migration_and_nobody_else(empty: Settings) -> None:
    url = empty.database.shards[0].primary
    await runner._on(
        url, lambda connection: runner._upgrade(connection, "0009")
    )  # the step after it changes the outbox
    reading, other = await asyncpg.connect(url), await asyncpg.connect(url)
    waiting = (
        "SELECT 1 FROM pg_locks JOIN pg_database ON pg_database.oid = database "
        "WHERE datname = current_database() AND relation = 'outbox'::regclass AND NOT granted"
    )
    try:
        async with reading.transaction():  # a backup, a report, somebody's psql
            await reading.fetch("SELECT 1 FROM outbox")
            migration = asyncio.create_task(asyncio.to_thread(runner.upgrade, empty))

            async def waits() -> bool:
                return bool(await other.fetch(waiting))

            await until(waits)
            # Whoever comes to the table now stands behind the migration.
            await other.fetch("SELECT 1 FROM outbox", timeout=PATIENCE)
            await until(waits)
            assert not migration.done()
        await migration
    finally:
        await reading.close()
        await other.close()
    assert await runner._on(url, runner.current)


async def test_a_database_that_is_not_migrated_is_known_as_such(empty: Settings) -> None:
    assert not await runner._on(empty.database.shards[0].primary, runner.current)


@pytest.mark.sabotage(
    path="migrations/versions/0008_products_by_category.py",
    take_out='    op.create_index("ix_products_category", "products", ["category"])\n',
    put='    op.create_index("ix_products_category", "products", ["category"])\n'
    '    op.alter_column("products", "description", new_column_name="about")\n'
    '    op.alter_column("products", "about", new_column_name="description")\n',
)
async def test_migrations_only_add_so_that_old_code_runs_on(empty: Settings) -> None:
    said: list[str] = []

    def upgrade(connection: Connection) -> None:
        event.listen(connection, "before_cursor_execute", lambda *told: said.append(" ".join(told[2].split())))
        runner._upgrade(connection)

    await runner._on(empty.database.shards[0].primary, upgrade)
    changes = [statement for statement in said if statement.startswith(("ALTER", "CREATE", "DROP"))]
    assert len(changes) > 20
    # What old code writes lacks a new column, and what it reads must keep its name and its type.
    assert [
        statement
        for statement in changes
        if re.search(r"^DROP (TABLE|INDEX)|DROP COLUMN|RENAME|ALTER COLUMN|MODIFY|CHANGE ", statement)
        or (" ADD COLUMN " in statement and "NOT NULL" in statement and "DEFAULT" not in statement)
    ] == []


async def test_every_step_can_be_taken_back(empty: Settings) -> None:
    url = empty.database.shards[0].primary
    await asyncio.to_thread(runner.upgrade, empty)

    def downgrade(connection: Connection) -> None:
        config = runner.configuration()
        config.attributes["connection"] = connection
        command.downgrade(config, "base")

    await runner._on(url, downgrade)
    assert await tables(url) == {"alembic_version"}
    await asyncio.to_thread(runner.upgrade, empty)
    assert await asyncio.to_thread(runner.check, url) == []
