"""What is MariaDB's own: how many round trips a statement takes, a commit's position, locks, and cut-off migrations.

The rest of the suite runs on MariaDB as it is: `make test-mysql`.
"""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any
from uuid import uuid4

import pytest
from conftest import settings_from, until
from engines import WORDS, ask
from pymysql.constants import COMMAND
from quiet import Servers, database_on, environment_of, started, stranger
from sqlalchemy import insert, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import create_async_engine

from app.core import context
from app.core.errors import TimedOut, Unavailable
from app.core.settings import Settings
from app.domain.reports.tables import bought_together as rows
from app.scaling import dialect
from app.scaling.database import Database
from app.scaling.dialect import insert_ignore, mariadb
from app.scaling.dialect.mariadb_steps import MariaDbImpl
from app.wiring import Resources
from migrations import runner

pytest_plugins = ("quiet",)
pytestmark = pytest.mark.mariadb


def pair() -> dict[str, Any]:
    identifier = uuid4()
    return {"product_id": identifier, "other_id": identifier, "orders": 1}


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every command that a pooled connection of this process sends from now on: each is one round trip."""
    commands: list[str] = []
    real = mariadb.Connection._execute_command
    names = {value: name for name, value in vars(COMMAND).items() if isinstance(value, int)}

    async def note(connection: mariadb.Connection, command: int, sql: Any) -> None:
        said = sql.decode(errors="replace") if isinstance(sql, bytes | bytearray) else str(sql)
        if "@@gtid" not in said and "SLAVES" not in said:  # the watchers ask all the time
            commands.append(said.split()[0] if names[command] == "COM_QUERY" else names[command])
        await real(connection, command, sql)

    monkeypatch.setattr(mariadb.Connection, "_execute_command", note)
    return commands


@pytest.mark.sabotage(
    path="app/scaling/dialect/mariadb.py", take_out="        skip_autocommit_rollback=True,\n", put=""
)
async def test_a_read_on_mariadb_is_one_round_trip(quiet: Resources, sent: list[str]) -> None:
    read = quiet.database.reader().first
    for _ in range(20):  # until the pools of both replicas have a connection
        await read(text("SELECT 4711"))
    sent.clear()
    for _ in range(20):
        await read(text("SELECT 4711"))
    assert sent == ["SELECT"] * 20


@pytest.mark.sabotage(
    path="app/scaling/dialect/mariadb.py",
    take_out="if self.server_status & _SESSION_STATE_CHANGED:",
    put="if False:",
)
async def test_the_answer_to_a_commit_says_its_position(
    quiet: Resources, servers: Servers, sent: list[str], monkeypatch: pytest.MonkeyPatch, work: context.Work
) -> None:
    async def asked(_: Any) -> Any:
        raise AssertionError("the position was asked for")

    async with quiet.database.writer() as writer:
        await writer.run(insert(rows).values(pair()))
    with monkeypatch.context() as patched:
        # The watchers have their connections; nobody else may ask.
        patched.setattr(mariadb, "commit_position", _told_only(asked))
        sent.clear()
        async with quiet.database.writer() as writer:
            await writer.run(insert(rows).values(pair()))
    assert sent == ["INSERT", "COMMIT"]
    (newest,) = await servers.sql("primary", WORDS.newest)
    assert work.positions[0] <= newest["position"]
    # What wrote nothing has no position of its own; it may have seen what was the newest.
    with context.working(stranger()) as nothing_written:
        async with quiet.database.writer():
            pass
    assert nothing_written.positions[0] >= work.positions[0]


def _told_only(otherwise: Any) -> Any:
    async def position(connection: mariadb.Connection) -> Any:
        return connection.committed if connection.committed is not None else await otherwise(connection)

    return position


@pytest.mark.sabotage(
    path="app/scaling/dialect/statements.py",
    take_out="ON DUPLICATE KEY UPDATE {key} = {key}",
    put="ON DUPLICATE KEY UPDATE orders = orders + 1",
)
async def test_an_insert_that_finds_its_key_counts_nothing_and_changes_nothing(
    quiet: Resources, servers: Servers
) -> None:
    once = pair()
    for expected in (1, 0):
        async with quiet.database.writer() as writer:
            assert await writer.run(insert_ignore(rows).values(once)) == expected
    (row,) = await servers.sql(
        "primary", "SELECT orders FROM bought_together WHERE product_id = $1", once["product_id"]
    )
    assert row["orders"] == 1


@pytest.mark.sabotage(
    path="app/scaling/dialect/statements.py",
    take_out='return f"{inserted} ON DUPLICATE KEY UPDATE {key} = {key}"',
    put='return inserted.replace("INSERT", "INSERT IGNORE", 1)',
)
async def test_two_that_find_the_same_key_and_then_change_it_do_not_wait_for_each_other_in_a_ring(
    quiet: Resources,
) -> None:
    shared = pair()
    async with quiet.database.writer() as writer:
        await writer.run(insert_ignore(rows).values(shared))

    async def count() -> None:
        async with quiet.database.writer() as writer:
            await writer.run(insert_ignore(rows).values(shared))
            await writer.run(
                update(rows).where(rows.c.product_id == shared["product_id"]).values(orders=rows.c.orders + 1)
            )

    for _ in range(10):
        await asyncio.gather(*(count() for _ in range(4)))


@pytest.fixture
async def hasty(quiet: Resources) -> AsyncIterator[Database]:
    """An instance whose statements have little time."""
    async with started(quiet, command_timeout=0.3) as database:
        yield database


@pytest.mark.sabotage(
    path="app/scaling/dialect/mariadb.py",
    take_out="        async with asyncio.timeout(self._patience):\n            rows",
    put="        if True:\n            rows",
)
async def test_a_statement_without_an_answer_in_time_costs_its_connection_and_nobody_gets_its_answer_later(
    hasty: Database,
) -> None:
    for _ in range(2 * hasty.shards[0].replicas.primary.reads.engine.pool.size()):  # type: ignore[attr-defined]
        with pytest.raises((TimedOut, Unavailable)):
            await hasty.reader(newest=True).first(text("SELECT SLEEP(0.6), 1 AS late"))

    async def now() -> Any:
        try:
            return await hasty.reader(newest=True).first(text("SELECT 2 AS now"))
        except (TimedOut, Unavailable):  # on a busy machine this one may be late, too
            return None

    assert (await until(now))._mapping == {"now": 2}


@pytest.mark.sabotage(
    path="app/scaling/dialect/mariadb_steps.py",
    take_out="        if not inspect(self.connection).has_table(table.name):",
    put="        if True:",
)
async def test_a_migration_that_was_cut_off_anywhere_is_simply_run_again(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes of tables commit by themselves: what is done before the end of a step stays."""
    async with database_on(cluster, "cut_off") as url:
        settings: Settings = settings_from(environment_of(cluster, "cut_off"))
        real = MariaDbImpl._exec
        for survived in (2, 5, 12):
            left = survived

            def cut(self: Any, *arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    raise OperationalError("cut off", None, Exception())
                return real(self, *arguments, **options)

            with monkeypatch.context() as patched:
                patched.setattr(MariaDbImpl, "_exec", cut)
                with pytest.raises(OperationalError):
                    await asyncio.to_thread(runner.upgrade, settings)
        await asyncio.to_thread(runner.upgrade, settings)
        assert await asyncio.to_thread(runner.check, url) == []


@pytest.mark.sabotage(
    path="app/scaling/dialect/mariadb.py", take_out="    if not connection.scalar(", put="    if connection.scalar("
)
async def test_one_migration_of_a_database_runs_at_a_time(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with database_on(cluster, "twice") as url:
        settings: Settings = settings_from(environment_of(cluster, "twice"))
        monkeypatch.setattr(runner, "MIGRATION_SECONDS", 1)

        engine = create_async_engine(dialect.driver_url(url))
        async with engine.connect() as first:
            await first.run_sync(partial(dialect.hold_for_migrations, lock=runner.LOCK, seconds=1, lock_seconds=1))
            with pytest.raises(mariadb.OperationalError, match="another migration"):
                await asyncio.to_thread(runner.upgrade, settings)
        await engine.dispose()
        assert await ask(url, WORDS.tables) == []
        await asyncio.to_thread(runner.upgrade, settings)
        assert await runner._on(url, runner.current)
