"""What differs between database engines, in one place: positions in the log, lost connections, driver options.

A position is the engine's log position as one integer that grows with every commit (PostgreSQL: the WAL LSN), so that
"has this replica replayed that commit" is one comparison.
"""

import asyncio
from typing import Any

import asyncpg
from sqlalchemy import Column, ColumnElement, Table, event, type_coerce
from sqlalchemy.dialects.postgresql import JSONB, Insert, insert
from sqlalchemy.exc import DBAPIError, DisconnectionError, InterfaceError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from app.core import wire
from app.core.settings import DatabaseSettings

_REPLICA_STATE = """
    SELECT pg_last_wal_replay_lsn() - '0/0'::pg_lsn AS replayed,
           coalesce(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) - '0/0'::pg_lsn AS received
"""
# Long enough for the transaction in front, which is a few statements long; short enough to answer 409 within the
# deadline of a request instead of hanging on a lock.
LOCK_TIMEOUT = "3000"  # milliseconds
NEWEST = 2**62  # a position that no replica ever reaches
_PRIMARY_STATE = "SELECT pg_current_wal_flush_lsn() - '0/0'::pg_lsn"
_PRIMARY_POSITION = "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"


def create_engine(url: str, settings: DatabaseSettings, *, autocommit: bool, name: str) -> AsyncEngine:
    """Return an engine whose pool is bounded, last-in-first-out and never pings.

    Args:
        url: `postgresql://…`, as in the settings.
        settings: pool size and timeouts.
        autocommit: True for reads: each statement is one round trip, without BEGIN and COMMIT around it.
        name: shown by the server as the connection's application.
    """
    server_settings = {"application_name": f"scaleout {name}"}
    if not autocommit:
        server_settings["lock_timeout"] = LOCK_TIMEOUT
    engine = create_async_engine(
        url.replace("postgresql://", "postgresql+asyncpg://", 1),
        isolation_level="AUTOCOMMIT" if autocommit else "READ COMMITTED",
        hide_parameters=True,  # an error goes to the log; what was bound may be personal
        pool_size=settings.connections,
        max_overflow=0,
        pool_timeout=settings.pool_timeout,
        pool_use_lifo=True,
        pool_pre_ping=False,
        json_serializer=lambda value: wire.encode(value).decode(),
        json_deserializer=wire.decode,
        connect_args={
            "timeout": settings.connect_timeout,
            "command_timeout": settings.command_timeout,
            "server_settings": server_settings,
        },
    )
    event.listen(engine.sync_engine, "checkout", _replace_cut)
    return engine


def _replace_cut(connection: Any, _record: Any, _proxy: Any) -> None:
    """Have the pool replace a connection whose server has hung up, before anybody pays for it with a failed request.

    Asking the socket costs nothing, unlike a ping. After a restart every pooled connection of every instance is so.
    """
    if connection.driver_connection.is_closed():
        raise DisconnectionError("the server has hung up")


async def connect(url: str, settings: DatabaseSettings, *, name: str) -> asyncpg.Connection:
    """Open one connection outside of any pool, for whoever watches a node."""
    return await asyncpg.connect(
        url,
        timeout=settings.connect_timeout,
        command_timeout=settings.connect_timeout,
        server_settings={"application_name": f"scaleout {name}"},
    )


def cut(driver_connection: asyncpg.Connection) -> None:
    """Break the connection off at once, without asking the server: whoever waits on it is told that it is lost."""
    driver_connection.terminate()


async def commit_position(driver_connection: asyncpg.Connection) -> int:
    """Return a position at or after everything that this connection has committed."""
    return int(await driver_connection.fetchval(_PRIMARY_POSITION))


async def primary_state(driver_connection: asyncpg.Connection) -> int:
    """Return up to which position a primary's log is safe and can be sent.

    It is not what `commit_position` says: that one may lie behind the header of a page whose first record is still to
    come, and no replica reaches it until then.

    Raises:
        asyncpg.ObjectNotInPrerequisiteStateError: if the server is a replica.
    """
    return int(await driver_connection.fetchval(_PRIMARY_STATE))


async def replica_state(driver_connection: asyncpg.Connection) -> tuple[int, int]:
    """Return up to which position a replica has replayed, and up to which it has received."""
    row = await driver_connection.fetchrow(_REPLICA_STATE)
    return int(row["replayed"] or 0), int(row["received"] or 0)


def insert_ignore(table: Table) -> Insert:
    """Return an insert that touches no row, and raises nothing, where the key is there already.

    It waits for a transaction that is inserting the same key.
    """
    return insert(table).on_conflict_do_nothing()


def json_contains(column: Column[Any], value: dict[str, Any]) -> ColumnElement[bool]:
    """Return the condition that the column's JSON object has all of `value`; an index answers it."""
    return type_coerce(column, JSONB).contains(value)


def is_lock_timeout(error: DBAPIError) -> bool:
    """Return whether a statement gave up waiting for another transaction's lock."""
    original: Any = error.orig
    return isinstance(getattr(original, "__cause__", None), asyncpg.LockNotAvailableError)


# What a driver may raise while it talks to a node, besides OSError and TimeoutError. The internal error is what asyncpg
# makes of a server that hangs up in the middle of the connection's first steps, as one that is starting does.
DRIVER_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)


def is_lost(error: BaseException) -> bool:
    """Return whether the node is gone, hangs or refuses, rather than that the statement is wrong."""
    if isinstance(error, DBAPIError):
        original: Any = error.orig
        cause = getattr(original, "__cause__", None)
        return error.connection_invalidated or isinstance(error, InterfaceError) or is_lost_driver_error(cause)
    return is_lost_driver_error(error)


def is_lost_driver_error(error: BaseException | None) -> bool:
    """Return the same for an error of the driver or of the network, not wrapped by SQLAlchemy."""
    return isinstance(
        error,
        OSError
        | asyncio.TimeoutError
        | asyncpg.PostgresConnectionError
        | asyncpg.InterfaceError
        | asyncpg.InternalClientError
        | asyncpg.OperatorInterventionError  # shutting down, starting up, or our statement met a restart
        | asyncpg.TooManyConnectionsError,
    )
