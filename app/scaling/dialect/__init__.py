"""What differs between database engines, in one place: drivers, log positions, lost connections, a few statements.

The rest of the service calls the functions here and never asks which engine answers. Each engine has a room with the
same functions, `Engine`. A position is the engine's log position as one integer that grows with every commit, so that
"has this replica replayed that commit" is one comparison.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.core.settings import DatabaseSettings
from app.scaling.dialect import mariadb, postgresql
from app.scaling.dialect.answers import Limits, State, Trouble
from app.scaling.dialect.statements import (
    Rows,
    begins_with,
    by_primary_key,
    insert_adding,
    insert_ignore,
    json_has,
    logical_shard_of,
    match_rank,
    matches,
    search_words,
)

__all__ = [
    "ERRORS",
    "LOCK_TIMEOUT",
    "Limits",
    "Rows",
    "State",
    "Trouble",
    "begins_with",
    "by_primary_key",
    "commit_position",
    "connect",
    "create_engine",
    "cut",
    "driver_url",
    "fetch",
    "hold_for_migrations",
    "insert_adding",
    "insert_ignore",
    "insert_together",
    "is_cut",
    "is_fenced",
    "json_has",
    "limits",
    "logical_shard_of",
    "match_rank",
    "matches",
    "search_words",
    "state",
    "trouble",
]

# Long enough for the transaction in front, which is a few statements long; short enough to answer 409 within the
# deadline of a request instead of hanging on a lock.
LOCK_TIMEOUT = 3000  # milliseconds
FENCED = "SH001"  # the SQLSTATE with which a shard refuses a row; see `docs/patterns/sharding.md`


class Engine(Protocol):
    """What a room of an engine offers; connections are the driver's own."""

    DRIVER_ERRORS: tuple[type[Exception], ...]

    def create_engine(
        self, url: str, settings: DatabaseSettings, *, autocommit: bool, name: str, lock_timeout: int
    ) -> AsyncEngine:
        """See `create_engine` below."""

    def driver_url(self, url: str) -> str:
        """See `driver_url` below."""

    def hold_for_migrations(self, connection: Connection, *, lock: int, seconds: int, lock_seconds: float) -> None:
        """See `hold_for_migrations` below."""

    async def connect(self, url: str, settings: DatabaseSettings, patience: float, *, name: str) -> Any:
        """See `connect` below."""

    def cut(self, driver_connection: Any) -> None:
        """See `cut` below."""

    def is_cut(self, driver_connection: Any) -> bool:
        """See `is_cut` below."""

    async def commit_position(self, driver_connection: Any) -> int:
        """See `commit_position` below."""

    async def fetch(self, driver_connection: Any, text: str, values: Sequence[Any]) -> Sequence[Any]:
        """See `fetch` below."""

    def insert_together(self, first: Rows, others: Sequence[Rows]) -> tuple[str, Sequence[Any]] | None:
        """See `insert_together` below."""

    async def limits(self, driver_connection: Any) -> Limits:
        """See `limits` below."""

    async def state(self, driver_connection: Any) -> State:
        """See `state` below."""

    def trouble(self, error: BaseException) -> Trouble | None:
        """Return what the driver's error says, or None if it is none of the driver's or the statement is wrong."""


_ENGINES: dict[str, Engine] = {"postgresql": postgresql, "mariadb": mariadb, "mysql": mariadb}
# What talking to a node may raise, through SQLAlchemy or not; `trouble` tells what of it is no mistake of ours.
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
    engine = _at(url).create_engine(url, settings, autocommit=autocommit, name=name, lock_timeout=LOCK_TIMEOUT)
    event.listen(engine.sync_engine, "checkout", _replace_cut)
    return engine


def _replace_cut(connection: Any, record: Any, _proxy: Any) -> None:
    """Have the pool replace a connection whose server has hung up, before anybody pays for it with a failed request.

    After a restart every pooled connection of every instance is so. A new one that is cut already is not replaced: the
    server is going down, and SQLAlchemy, which tries twice, would then say that its caller has made a mistake.
    """
    new = not record.info.get("was used")
    record.info["was used"] = True  # until the record gets another connection
    if is_cut(connection.driver_connection):
        raise ConnectionError("the server has hung up") if new else DisconnectionError("the server has hung up")


def driver_url(url: str) -> str:
    """Return a URL of the settings as SQLAlchemy takes it, with the name of the driver."""
    return _at(url).driver_url(url)


def hold_for_migrations(connection: Connection, *, lock: int, seconds: int, lock_seconds: float) -> None:
    """Let one migration of this database run at a time, and give its statements more time than a request's.

    Args:
        connection: of the migration; the lock is held until its transaction or, where changes of tables commit by
            themselves, the connection ends.
        lock: its number.
        seconds: that a statement may take, and that the lock is waited for.
        lock_seconds: that a change of a table may wait for whoever uses it, rounded up to what the engine knows.
    """
    _ENGINES[connection.dialect.name].hold_for_migrations(
        connection, lock=lock, seconds=seconds, lock_seconds=lock_seconds
    )


async def connect(url: str, settings: DatabaseSettings, patience: float, *, name: str) -> Any:
    """Open one connection of the driver outside of any pool, whose statements take `patience` seconds at most.

    Raises:
        TimeoutError: if the server does not answer in time; a statement raises the same.
    """
    return await _at(url).connect(url, settings, patience, name=name)


def cut(driver_connection: Any) -> None:
    """Break the connection off at once, without asking the server: whoever waits on it is told that it is lost."""
    _behind(driver_connection).cut(driver_connection)


def is_cut(driver_connection: Any) -> bool:
    """Say whether either side has hung up; asking costs nothing, unlike a ping."""
    return _behind(driver_connection).is_cut(driver_connection)


async def commit_position(driver_connection: Any) -> int:
    """Return a position at or after everything that this connection has committed."""
    return await _behind(driver_connection).commit_position(driver_connection)


async def fetch(driver_connection: Any, text: str, values: Sequence[Any]) -> Sequence[Any]:
    """Run a statement and return its rows, the columns of each in their order, as the driver reads them.

    Args:
        driver_connection: on which nothing else goes on.
        text: with the driver's own marks for the values.
        values: in their order.
    """
    return await _behind(driver_connection).fetch(driver_connection, text, values)


def insert_together(url: str, first: Rows, others: Sequence[Rows] = ()) -> tuple[str, Sequence[Any]] | None:
    """Return one statement that inserts the one row of `first`, unless its key is there, and only then the `others`.

    It is a text and its values, as `fetch` takes them. Its answer is one row with one column, 1 or 0: whether it did.
    It waits for a transaction that is inserting the same key. None where the engine at `url` cannot say that in one
    statement.
    """
    return _at(url).insert_together(first, others)


async def limits(driver_connection: Any) -> Limits:
    """Ask a server how many connections and how much time it allows the role of this connection."""
    return await _behind(driver_connection).limits(driver_connection)


async def state(driver_connection: Any) -> State:
    """Ask a server what it is and how far it is."""
    return await _behind(driver_connection).state(driver_connection)


def trouble(error: BaseException) -> Trouble | None:
    """Return what befell a statement, or None if the statement itself is wrong.

    Args:
        error: one of ERRORS.
    """
    found = next((found for found in map(_trouble, _told(error)) if found is not None), None)
    lost = isinstance(error, DBAPIError) and error.connection_invalidated
    return Trouble.LOST if found is None and lost else found


def is_fenced(error: BaseException) -> bool:
    """Return whether a database has refused a write because the row belongs to another one, or is about to."""
    return any(getattr(told, "sqlstate", None) == FENCED for told in _told(error))


def _trouble(told: BaseException) -> Trouble | None:
    if isinstance(told, TimeoutError):
        return Trouble.SLOW
    if isinstance(told, OSError):
        return Trouble.LOST
    return next((found for engine in _ENGINES.values() if (found := engine.trouble(told)) is not None), None)


def _told(error: BaseException) -> Iterator[BaseException]:
    """Yield what the driver raised: SQLAlchemy's asyncpg wraps it twice, everybody else once or not at all."""
    original = error.orig if isinstance(error, DBAPIError) else error
    if original is not None:
        yield original
        if original.__cause__ is not None:
            yield original.__cause__


def _at(url: str) -> Engine:
    return _ENGINES[url.partition("://")[0]]


def _behind(driver_connection: Any) -> Engine:
    return mariadb if isinstance(driver_connection, mariadb.Connection) else postgresql
