"""What tests do to database servers, in the words of each engine; `TEST_DATABASE` names the one of this run.

A test that can only be about one engine says so: `@pytest.mark.postgresql("why")`. (PYTEST_DONT_REWRITE: nothing is
asserted here.)
"""

import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg

from app.core.settings import DatabaseSettings
from app.scaling.dialect import mariadb

DATABASE = os.environ.get("TEST_DATABASE", "postgresql")
PATIENT = DatabaseSettings(connect_timeout=10)


@dataclass(frozen=True)
class Words:
    """Statements of one engine.

    Attributes:
        maintenance: the database from which others are made and dropped.
        drop: drops a database, whoever uses it.
        tables: names the tables, as `name`.
        newest: how far a commit of now is, as the service counts, as `position`.
        position: where the log of a primary is, as `position`.
        has_replayed: says of a replica whether it has replayed a position, as `so`.
        pause: stops the replay of a replica; `is_paused` says so; `resume` undoes it.
        cut_off: keeps a replica from its primary; `receives_nothing` says so, `believes` that it thinks itself up to
            date; `reconnect` undoes it.
        own_id: the number of the connection, as `id`.
        end: ends the connection of that number.
        sleep: takes five seconds.
        waits_for_row: answers while somebody waits for the lock of a row.
    """

    maintenance: str
    drop: str
    tables: str
    newest: str
    position: str
    has_replayed: str
    pause: str
    is_paused: str
    resume: str
    cut_off: tuple[str, ...]
    receives_nothing: str
    believes: str
    reconnect: tuple[str, ...]
    own_id: str
    end: str
    sleep: str
    waits_for_row: str


WORDS = {
    "postgresql": Words(
        maintenance="postgres",
        drop="DROP DATABASE IF EXISTS {} WITH (FORCE)",
        tables="SELECT tablename AS name FROM pg_tables WHERE schemaname = 'public'",
        newest="SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn AS position",
        position="SELECT pg_current_wal_flush_lsn()::text AS position",
        has_replayed="SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn AS so",
        pause="SELECT pg_wal_replay_pause()",
        is_paused="SELECT pg_get_wal_replay_pause_state() = 'paused' AS so",
        resume="SELECT pg_wal_replay_resume()",
        cut_off=("ALTER SYSTEM SET primary_conninfo = 'host=127.0.0.1 port=1'", "SELECT pg_reload_conf()"),
        receives_nothing="SELECT NOT EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming') AS so",
        believes="SELECT pg_last_wal_receive_lsn() <= pg_last_wal_replay_lsn() AS so",
        reconnect=("ALTER SYSTEM RESET primary_conninfo", "SELECT pg_reload_conf()"),
        own_id="SELECT pg_backend_pid() AS id",
        end="SELECT pg_terminate_backend($1, 5000)",
        sleep="SELECT pg_sleep(5)",
        waits_for_row="SELECT 1 FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'",
    ),
    "mariadb": Words(
        maintenance="mysql",
        drop="DROP DATABASE IF EXISTS {}",
        tables="SELECT table_name AS name FROM information_schema.tables WHERE table_schema = database()",
        newest="SELECT CAST(substring_index(@@gtid_binlog_pos, '-', -1) AS UNSIGNED) AS position",
        position="SELECT @@gtid_binlog_pos AS position",
        has_replayed="SELECT MASTER_GTID_WAIT($1, 0) = 0 AS so",
        pause="STOP SLAVE SQL_THREAD",
        is_paused="SELECT variable_value = 'OFF' AS so FROM information_schema.global_status "
        "WHERE variable_name = 'SLAVE_RUNNING'",
        resume="START SLAVE SQL_THREAD",
        cut_off=("STOP SLAVE IO_THREAD",),
        receives_nothing="SELECT variable_value = 'OFF' AS so FROM information_schema.global_status "
        "WHERE variable_name = 'SLAVE_RUNNING'",
        believes="SELECT 1 AS so",
        reconnect=("START SLAVE IO_THREAD",),
        own_id="SELECT CONNECTION_ID() AS id",
        end="KILL $1",
        sleep="SELECT SLEEP(5)",
        waits_for_row="SELECT 1 FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'",
    ),
}[DATABASE]


async def ask(url: str | None, *statements: str, arguments: tuple[Any, ...] = ()) -> list[Any]:
    """Run statements on a server and return the rows of the last one, by name; its arguments are `$1` and so on."""
    address = url or ""
    if address.startswith("postgresql:"):
        server = await asyncpg.connect(address)
        try:
            for statement in statements[:-1]:
                await server.execute(statement)
            return list(await server.fetch(statements[-1], *arguments))
        finally:
            await server.close()
    connection = await mariadb.connect(address, PATIENT, 30, name="test")
    try:
        for statement in statements[:-1]:
            await mariadb.rows(connection, statement)
        bound = tuple(map(_bound, arguments))
        rows = await mariadb.rows(connection, re.sub(r"\$\d", "%s", statements[-1]), bound)
        return [{name: _held(value) for name, value in row.items()} for row in rows]
    finally:
        connection.abort()


def _bound(value: Any) -> Any:
    """Return what aiomysql writes as the column keeps it."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).replace(tzinfo=None)
    return value.bytes if isinstance(value, UUID) else value


def _held(value: Any) -> Any:
    """Return what a column holds: nothing but ids is kept in bytes, and moments are in UTC."""
    if isinstance(value, datetime):
        return value.replace(tzinfo=UTC)
    return UUID(bytes=value) if isinstance(value, bytes) else value


def elsewhere(url: str | None, database: str) -> str:
    """Return the URL of another database on the same server."""
    return urlsplit(url or "")._replace(path=f"/{database}").geturl()


async def is_level(primary: str | None, replica: str | None) -> bool:
    """Return whether a replica has replayed all that its primary has; both are URLs."""
    (now,) = await ask(primary, WORDS.position)
    (row,) = await ask(replica, WORDS.has_replayed, arguments=(now["position"],))
    return bool(row["so"])


@asynccontextmanager
async def database_at(url: str | None, name: str) -> AsyncIterator[str]:
    """Make an empty database on a primary, yield its URL, and drop it, whoever uses it."""
    server = elsewhere(url, WORDS.maintenance)
    await ask(server, WORDS.drop.format(name))
    await ask(server, f"CREATE DATABASE {name}")
    try:
        yield elsewhere(url, name)
    finally:
        await ask(server, WORDS.drop.format(name))
