"""On plain PostgreSQL: the tables of a shard can be spread by `profile_id` as they are, and so can the statements.

Citus itself is not installed here. What it asks of a schema and of statements is held: the column is in every unique
key, and every statement on such a table names it, except those that are meant for all shards and are listed.
"""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from apart import apart_from
from halves import Halves
from sagas import STOCK, Shop
from spreading import SPREAD, about_shards, strays
from sqlalchemy import Connection, UniqueConstraint, text
from sqlalchemy.ext.asyncio import create_async_engine
from wiretap import Wire

from app.core.settings import SettingsError
from app.domain.tables import metadata
from app.scaling import dialect
from app.scaling.outbox import backlog
from app.wiring import open_resources
from deploy.local.cluster import Cluster
from migrations import citus
from workers.relay import AWAITED
from workers.task import Outcome
from workers.tasks import CHORES
from workers.tasks.upkeep import attend

pytest_plugins = ("halves", "quiet")
pytestmark = pytest.mark.postgresql("Citus is an extension of it")

# What of it all the test itself sends.
LET_TIME_PASS = "UPDATE outbox SET due_at=$1::TIMESTAMP WITH TIME ZONE WHERE outbox.due_at IS NOT NULL"


def test_the_column_is_in_every_unique_key_of_every_table_of_a_shard() -> None:
    for table in SPREAD.values():
        unique = [one for one in table.constraints if isinstance(one, UniqueConstraint)]
        keys = [table.primary_key.columns, *(one.columns for one in unique)]
        keys += [index.columns for index in table.indexes if index.unique]
        assert all("profile_id" in key for key in keys), table.name
        assert not table.foreign_keys, table.name


@pytest.fixture
async def tapped(cluster: Cluster) -> AsyncIterator[tuple[Shop, set[str]]]:
    """A shop whose process says that Citus spreads its tables, and what it sends to the database."""
    async with apart_from(cluster) as apart:
        (only,) = apart.settings.database.shards
        async with Wire.to(only.primary) as wire:
            behind = only.model_copy(update={"primary": wire.instead_of(only.primary)})
            database = apart.settings.database.model_copy(update={"shards": (behind,), "spread": "citus"})
            async with open_resources(apart.settings.model_copy(update={"database": database})) as resources:
                yield await Shop(replace(apart, resources=resources), cluster).open(), wire.statements


@pytest.mark.sabotage(
    path="app/scaling/database/__init__.py",
    take_out='together = self._settings.spread == "none"',
    put="together = True",
)
async def test_every_statement_of_an_order_and_of_upkeep_names_the_profile(tapped: tuple[Shop, set[str]]) -> None:
    shop, statements = tapped
    for method in ("tok_ok", "tok_declined", "tok_lost"):
        await shop.order(2, 3, method=method)
        await shop.order(STOCK + 1, method=method)
        await shop.drain()
    for steps in range(4):
        order = await shop.order(2)
        for _ in range(steps):
            await shop.step()
        await shop.apart.resources.orders.cancel(order.profile_id, order.id)
        await shop.drain()
    async with shop.apart.resources.database.writer() as writer:
        await backlog(writer, besides=AWAITED)
    for chore in CHORES:
        assert await attend(chore, shop.apart.resources) is Outcome.DONE
    sent = [statement for statement in about_shards(statements) if not statement.startswith(LET_TIME_PASS)]
    assert {name for name in SPREAD if any(f" {name} " in statement for statement in sent)} == set(SPREAD)
    assert strays(sent) == []
    assert [statement for statement in sent if statement.startswith("WITH")] == []


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
