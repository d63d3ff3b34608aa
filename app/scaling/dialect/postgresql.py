"""PostgreSQL through asyncpg. A position is the write-ahead log's, the LSN, as a number of bytes.

What each function promises stands at its namesake in the package.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import asyncpg
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from app.core import wire
from app.core.settings import DatabaseSettings
from app.scaling.dialect.answers import Limits, State, Trouble
from app.scaling.dialect.statements import Rows
from app.scaling.dialect.together import Together

# Where a server may not read its receiver's state (that takes `pg_read_all_stats`) it cannot say which history it
# follows; without a receiver it says the last that it is sure of.
_STATE = """
    SELECT NOT pg_is_in_recovery() AS is_primary,
           CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END
               - '0/0'::pg_lsn AS position,
           pg_last_wal_receive_lsn() - '0/0'::pg_lsn AS received,
           CASE WHEN pg_is_in_recovery() THEN (
               SELECT CASE WHEN receiver.pid IS NULL THEN control.min_recovery_end_timeline
                           ELSE coalesce(receiver.received_tli, 0) END
               FROM pg_control_recovery() AS control LEFT JOIN pg_stat_wal_receiver AS receiver ON true
           ) ELSE ('x' || left(pg_walfile_name(pg_current_wal_flush_lsn()), 8))::bit(32)::int END AS history
"""
_PRIMARY_POSITION = "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"

_LIMITS = """
    SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
               - coalesce(current_setting('reserved_connections', true)::int, 0) AS connections,
           ARRAY(SELECT name FROM pg_settings WHERE setting = '0' AND name = ANY ($1)) AS endless
"""
# The last one comes with each connection, unless a pooler hands them out.
_TIME_LIMITS = ["statement_timeout", "idle_in_transaction_session_timeout", "lock_timeout"]

# asyncpg's own default: statements that go past SQLAlchemy are a handful.
STATEMENTS_KEPT = 100

# The internal error is what asyncpg makes of a server that hangs up in the middle of the connection's first steps, as
# one that is starting does.
DRIVER_ERRORS: tuple[type[Exception], ...] = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)


class _Connection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
    """asyncpg's connection; whoever comes late to one that was cut is told that it is closed, as asyncpg says it.

    asyncpg's own forgets its protocol at that moment. Whoever was between preparing a statement and executing it, or
    about to begin a transaction, would find None there: an `AttributeError`, which looks like a mistake of ours.

    Attributes:
        positions: of the server; those of a pool, which lead to the same one, ask for them together.
    """

    positions: Together

    def _abort(self) -> None:
        self._aborted = True
        self._protocol.abort()  # from now on it refuses whatever it is asked


def create_engine(
    url: str, settings: DatabaseSettings, *, autocommit: bool, name: str, lock_timeout: int
) -> AsyncEngine:
    """Return an engine of `postgresql://…`."""
    pooled = settings.pooler == "transaction"
    server_settings = {} if autocommit or pooled else {"lock_timeout": str(lock_timeout)}

    positions = Together()

    async def open_connection() -> asyncpg.Connection:
        try:
            connection = await connect(url, settings, settings.command_timeout, name=name, **server_settings)
        except TimeoutError as error:
            # Nobody answered the door. A statement that takes too long is another matter.
            raise ConnectionError("the server did not accept the connection in time") from error
        except DRIVER_ERRORS as error:
            # What a server says before it was asked anything is its own trouble: it starts, it has lost its files. Only
            # what the driver says by itself may be a mistake of ours.
            if isinstance(error, asyncpg.InterfaceError) and trouble(error) is not Trouble.LOST:
                raise
            # Said here, because of a connection that is asked of the pool alone SQLAlchemy tells in a class of its own
            # that is neither the driver's nor its usual one.
            raise ConnectionError("the server did not accept the connection") from error
        connection.positions = positions
        return connection

    # Prepared statements stay on the connection of the server that prepared them, and the next one may meet another
    # connection behind a pooler: there each is unnamed, and sent whole.
    unprepared = {"prepared_statement_cache_size": 0, "prepared_statement_name_func": str} if pooled else {}
    return create_async_engine(
        "postgresql+asyncpg://",
        connect_args={"async_creator_fn": open_connection, **unprepared},
        isolation_level="AUTOCOMMIT" if autocommit else "READ COMMITTED",
        hide_parameters=True,  # an error goes to the log; what was bound may be personal
        pool_size=settings.connections,
        max_overflow=0,
        pool_timeout=settings.pool_timeout,
        pool_use_lifo=True,
        pool_pre_ping=False,
        json_serializer=lambda value: wire.encode(value).decode(),
        json_deserializer=wire.decode,
    )


def driver_url(url: str) -> str:
    """Return the URL with asyncpg in it."""
    return url.replace("postgresql://", "postgresql+asyncpg://", 1)


def hold_for_migrations(connection: Connection, *, lock: int, seconds: int, lock_seconds: float) -> None:
    """Hold an advisory lock until the transaction ends."""
    connection.execute(text(f"SET statement_timeout = '{seconds}s'"))
    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": lock})
    connection.execute(text(f"SET LOCAL lock_timeout = '{lock_seconds * 1000:.0f}ms'"))


async def connect(
    url: str, settings: DatabaseSettings, patience: float, *, name: str, **server_settings: str
) -> asyncpg.Connection:
    """Open one connection."""
    connection = await asyncpg.connect(
        url,
        connection_class=_Connection,
        statement_cache_size=0 if settings.pooler == "transaction" else STATEMENTS_KEPT,
        timeout=settings.connect_timeout,
        command_timeout=patience,
        server_settings={"application_name": f"scaleout {name}"} | server_settings,
    )
    connection.positions = Together()
    return connection


def cut(driver_connection: asyncpg.Connection) -> None:
    """Break the connection off at once, without asking the server: whoever waits on it is told that it is lost."""
    driver_connection.terminate()


def is_cut(driver_connection: asyncpg.Connection) -> bool:
    """Ask the socket."""
    return bool(driver_connection.is_closed())


async def commit_position(driver_connection: asyncpg.Connection) -> int:
    """Return a position at or after everything that this connection has committed."""

    async def put() -> int:
        return int(await driver_connection.fetchval(_PRIMARY_POSITION))

    together: Together | None = getattr(driver_connection, "positions", None)
    # The mover's own connections are of no pool.
    return await (put() if together is None else together.ask(put))


async def fetch(driver_connection: asyncpg.Connection, text: str, values: Sequence[Any]) -> Sequence[Any]:
    """Run a statement and return its rows."""
    rows: Sequence[Any] = await driver_connection.fetch(text, *values)
    return rows


def insert_together(first: Rows, others: Sequence[Rows]) -> tuple[str, Sequence[Any]]:
    """Return the statement: common table expressions that all depend on whether the first one has inserted.

    The rows come as JSON, so that the statement is the same for one row and for a hundred.
    """
    together = (first, *others)
    names = tuple((rows.table.name, tuple(rows.values[0])) for rows in together)
    return _together(names), [wire.encode(list(rows.values)).decode() for rows in together]


@lru_cache
def _together(names: tuple[tuple[str, tuple[str, ...]], ...]) -> str:
    inserts = []
    for number, (table, columns) in enumerate(names, start=1):
        listed = ", ".join(f'"{column}"' for column in columns)
        source = f'json_populate_recordset(NULL::"{table}", ${number})'
        inserts.append(f'INSERT INTO "{table}" ({listed}) SELECT {listed} FROM {source}')  # noqa: S608  # our own names
    inserts[0] += " ON CONFLICT DO NOTHING RETURNING 1"
    inserts[1:] = [f"{insert} WHERE EXISTS (SELECT FROM part0)" for insert in inserts[1:]]
    parts = ", ".join(f"part{number} AS ({insert})" for number, insert in enumerate(inserts))
    return f"WITH {parts} SELECT count(*) FROM part0"  # noqa: S608  # the same


async def limits(driver_connection: asyncpg.Connection) -> Limits:
    """Ask a server what it allows."""
    row = await driver_connection.fetchrow(_LIMITS, _TIME_LIMITS)
    endless = tuple((name, f"ALTER ROLE … SET {name} sets it") for name in row["endless"])
    return Limits(row["connections"], endless)


async def state(driver_connection: asyncpg.Connection) -> State:
    """Ask a server what it is and how far it is."""
    row = await driver_connection.fetchrow(_STATE)
    position = int(row["position"] or 0)
    received = position if row["received"] is None else int(row["received"])
    return State(row["is_primary"], position, received, row["history"])


_TROUBLES = (
    (Trouble.READ_ONLY, (asyncpg.ReadOnlySQLTransactionError,)),
    (Trouble.SLOW, (asyncpg.QueryCanceledError,)),
    (Trouble.BUSY, (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError, asyncpg.SerializationError)),
    (
        Trouble.LOST,
        (
            asyncpg.PostgresConnectionError,
            asyncpg.InternalClientError,
            asyncpg.OperatorInterventionError,  # shutting down, starting up, or our statement met a restart
            asyncpg.IdleInTransactionSessionTimeoutError,
            # Its connections, its memory or its disk are used up; files are gone or cannot be read; or it has found
            # itself broken.
            asyncpg.InsufficientResourcesError,
            asyncpg.PostgresSystemError,
            asyncpg.InternalServerError,
        ),
    ),
)


def trouble(error: BaseException) -> Trouble | None:
    """Return what befell a statement."""
    # asyncpg's own errors have no codes, and most of them are ours: too many arguments, a bad option.
    if isinstance(error, asyncpg.InterfaceError):
        return Trouble.LOST if "closed" in str(error) else None
    return next((found for found, kinds in _TROUBLES if isinstance(error, kinds)), None)
