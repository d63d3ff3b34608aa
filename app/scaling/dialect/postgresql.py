"""PostgreSQL through asyncpg. A position is the write-ahead log's, the LSN, as a number of bytes.

What each function promises stands at its namesake in the package.
"""

from typing import Any

import asyncpg
from sqlalchemy import event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from app.core import wire
from app.core.settings import DatabaseSettings

_REPLICA_STATE = """
    SELECT pg_last_wal_replay_lsn() - '0/0'::pg_lsn AS replayed,
           coalesce(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) - '0/0'::pg_lsn AS received
"""
_PRIMARY_STATE = "SELECT pg_current_wal_flush_lsn() - '0/0'::pg_lsn"
_PRIMARY_POSITION = "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"

# The internal error is what asyncpg makes of a server that hangs up in the middle of the connection's first steps, as
# one that is starting does.
DRIVER_ERRORS: tuple[type[Exception], ...] = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)


def create_engine(
    url: str, settings: DatabaseSettings, *, autocommit: bool, name: str, lock_timeout: int
) -> AsyncEngine:
    """Return an engine of `postgresql://…`."""
    server_settings = {"application_name": f"scaleout {name}"}
    if not autocommit:
        server_settings["lock_timeout"] = str(lock_timeout)
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


def is_lock_timeout(error: BaseException) -> bool:
    """Return whether asyncpg's error says so."""
    return isinstance(error, asyncpg.LockNotAvailableError)


def is_lost(error: BaseException) -> bool:
    """Return whether asyncpg's error says so."""
    return isinstance(
        error,
        asyncpg.PostgresConnectionError
        | asyncpg.InterfaceError
        | asyncpg.InternalClientError
        | asyncpg.OperatorInterventionError  # shutting down, starting up, or our statement met a restart
        | asyncpg.TooManyConnectionsError,
    )
