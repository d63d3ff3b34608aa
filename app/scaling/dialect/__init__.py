"""What differs between database engines, in one place: drivers, log positions, lost connections, a few statements.

The rest of the service calls the functions here and never asks which engine answers. Each engine has a room with the
same functions, `Engine`. A position is the engine's log position as one integer that grows with every commit, so that
"has this replica replayed that commit" is one comparison.
"""

from collections.abc import Iterator
from typing import Any, Protocol

from sqlalchemy.exc import DBAPIError, InterfaceError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.core.settings import DatabaseSettings
from app.scaling.dialect import postgresql
from app.scaling.dialect.statements import insert_ignore, json_contains

__all__ = [
    "ERRORS",
    "LOCK_TIMEOUT",
    "NEWEST",
    "commit_position",
    "connect",
    "create_engine",
    "cut",
    "insert_ignore",
    "is_lock_timeout",
    "is_lost",
    "json_contains",
    "primary_state",
    "replica_state",
]

# Long enough for the transaction in front, which is a few statements long; short enough to answer 409 within the
# deadline of a request instead of hanging on a lock.
LOCK_TIMEOUT = 3000  # milliseconds
NEWEST = 2**62  # a position that no replica ever reaches


class Engine(Protocol):
    """What a room of an engine offers; connections are the driver's own."""

    DRIVER_ERRORS: tuple[type[Exception], ...]

    def create_engine(
        self, url: str, settings: DatabaseSettings, *, autocommit: bool, name: str, lock_timeout: int
    ) -> AsyncEngine:
        """See `create_engine` below."""

    async def connect(self, url: str, settings: DatabaseSettings, *, name: str) -> Any:
        """See `connect` below."""

    def cut(self, driver_connection: Any) -> None:
        """See `cut` below."""

    async def commit_position(self, driver_connection: Any) -> int:
        """See `commit_position` below."""

    async def primary_state(self, driver_connection: Any) -> int:
        """See `primary_state` below."""

    async def replica_state(self, driver_connection: Any) -> tuple[int, int]:
        """See `replica_state` below."""

    def is_lock_timeout(self, error: BaseException) -> bool:
        """Return whether the driver's error says that a lock was waited for in vain."""

    def is_lost(self, error: BaseException) -> bool:
        """Return whether the driver's error says that the node is gone, hangs or refuses."""


_ENGINES: dict[str, Engine] = {"postgresql": postgresql}
# What talking to a node may raise, through SQLAlchemy or not; `is_lost` tells which of it is the node's end.
ERRORS: tuple[type[Exception], ...] = (
    *(error for engine in _ENGINES.values() for error in engine.DRIVER_ERRORS),
    DBAPIError,
    OSError,
    TimeoutError,
)


def create_engine(url: str, settings: DatabaseSettings, *, autocommit: bool, name: str) -> AsyncEngine:
    """Return an engine whose pool is bounded, last-in-first-out and never pings.

    Args:
        url: as in the settings.
        settings: pool size and timeouts.
        autocommit: True for reads: each statement is one round trip, without BEGIN and COMMIT around it.
        name: shown by the server as the connection's application.
    """
    return _at(url).create_engine(url, settings, autocommit=autocommit, name=name, lock_timeout=LOCK_TIMEOUT)


async def connect(url: str, settings: DatabaseSettings, *, name: str) -> Any:
    """Open one connection of the driver outside of any pool, for whoever watches a node."""
    return await _at(url).connect(url, settings, name=name)


def cut(driver_connection: Any) -> None:
    """Break the connection off at once, without asking the server: whoever waits on it is told that it is lost."""
    _behind(driver_connection).cut(driver_connection)


async def commit_position(driver_connection: Any) -> int:
    """Return a position at or after everything that this connection has committed."""
    return await _behind(driver_connection).commit_position(driver_connection)


async def primary_state(driver_connection: Any) -> int:
    """Return up to which position a primary's log is safe and can be sent; one of ERRORS from a replica."""
    return await _behind(driver_connection).primary_state(driver_connection)


async def replica_state(driver_connection: Any) -> tuple[int, int]:
    """Return up to which position a replica has replayed, and up to which it has received."""
    return await _behind(driver_connection).replica_state(driver_connection)


def is_lock_timeout(error: DBAPIError) -> bool:
    """Return whether a statement gave up waiting for another transaction's lock."""
    return any(engine.is_lock_timeout(told) for told in _told(error) for engine in _ENGINES.values())


def is_lost(error: BaseException) -> bool:
    """Return whether the node is gone, hangs or refuses, rather than that the statement is wrong."""
    if isinstance(error, DBAPIError) and (error.connection_invalidated or isinstance(error, InterfaceError)):
        return True
    return any(
        isinstance(told, OSError | TimeoutError) or any(engine.is_lost(told) for engine in _ENGINES.values())
        for told in _told(error)
    )


def _told(error: BaseException) -> Iterator[BaseException]:
    """Yield what the driver raised: SQLAlchemy's asyncpg wraps it twice, everybody else once or not at all."""
    original = error.orig if isinstance(error, DBAPIError) else error
    if original is not None:
        yield original
        if original.__cause__ is not None:
            yield original.__cause__


def _at(url: str) -> Engine:
    return _ENGINES[url.partition("://")[0]]


def _behind(_driver_connection: Any) -> Engine:
    return postgresql
