"""MariaDB through aiomysql. A position is the sequence number of the log's GTID: 270 of `0-1-270`.

aiomysql lacks what the service relies on, so a small connection class adds it: a bound on every answer, a way to break
off at once, and the position of a commit, which the server sends along with the commit's own answer. One shard is one
replication domain, whose sequence numbers go on after a promotion. What each function promises stands at its namesake
in the package.
"""

import asyncio
import math
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

import aiomysql
from pymysql.constants import CLIENT, CR, ER
from pymysql.err import InterfaceError, MySQLError, OperationalError
from pymysql.protocol import OKPacketWrapper
from sqlalchemy import Connection as SqlConnection
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from app.core import wire
from app.core.settings import DatabaseSettings
from app.scaling.dialect import mariadb_sql
from app.scaling.dialect.answers import Limits, State, Trouble
from app.scaling.dialect.statements import Rows

DRIVER_ERRORS: tuple[type[Exception], ...] = (MySQLError,)
PORT = 3306
OLDEST = (10, 6)  # the first that skips locked rows

# A value that does not fit is an error, never cut.
_SQL_MODE = "STRICT_ALL_TABLES,NO_ZERO_DATE,NO_ZERO_IN_DATE,ERROR_FOR_DIVISION_BY_ZERO,NO_ENGINE_SUBSTITUTION"
# What is tracked comes with every answer that changes it: so the commit's answer carries the commit's GTID.
_SESSION = f"time_zone = '+00:00', sql_mode = '{_SQL_MODE}', session_track_system_variables = 'last_gtid'"
_SESSION_STATE_CHANGED = 0x4000  # in a server's answer; pymysql has no name for it
# A name and a value, each behind its length; nine characters are a tab.
_LAST_GTID = re.compile(rb"\tlast_gtid.\d+-\d+-(\d+)", re.DOTALL)
_TIME_LIMITS = ("max_statement_time", "idle_transaction_timeout")
_LIMITS = f"SELECT @@max_connections AS connections, {', '.join(f'@@{name} AS {name}' for name in _TIME_LIMITS)}"
_STATE = "SELECT @@gtid_current_pos AS position, @@gtid_domain_id AS domain, @@read_only AS is_replica"


class Connection(aiomysql.Connection):  # type: ignore[misc]  # aiomysql ships no types
    """aiomysql's connection with bounded answers, `abort`, and the GTID of its last commit.

    Args:
        patience: seconds that an answer may take.
        options: aiomysql's own.
    """

    def __init__(self, patience: float, **options: Any) -> None:
        # Without FOUND_ROWS, which SQLAlchemy would set: of an update the rows that it changed are counted. Only so can
        # an insert that found its key there tell that it did nothing.
        super().__init__(charset="utf8mb4", client_flag=CLIENT.SESSION_TRACK, **options)
        # aiomysql asks for it whatever one says; no statement of ours has a second one behind a semicolon.
        self.client_flag &= ~CLIENT.MULTI_STATEMENTS
        self._patience = patience
        self.committed: int | None = None

    @property
    def is_cut(self) -> bool:
        """Whether either side has hung up; asking costs nothing."""
        return self._reader is None or self._reader.eof_received or self._reader.exception() is not None

    def abort(self) -> None:
        """Close without saying goodbye; whoever waits for an answer is told that the connection is lost."""
        if self._writer is not None:
            self._writer.transport.abort()
        self.close()

    def escape(self, obj: Any) -> Any:
        """Return a literal; bytes in aiomysql's own way do not work with PyMySQL from 1.2 on."""
        return f"X'{obj.hex()}'" if isinstance(obj, bytes) else super().escape(obj)

    async def query(self, sql: str, unbuffered: bool = False) -> int:  # noqa: FBT001, FBT002  # aiomysql's signature
        """Send a statement and read its answer.

        Raises:
            TimeoutError: if there is none in time; the connection is closed then, or its late answer would be taken
                for the next one's. aiomysql does that when it is cancelled while it reads.
        """
        async with asyncio.timeout(self._patience):
            rows: int = await super().query(sql, unbuffered)
        return rows

    async def commit(self) -> None:
        """Commit, and keep in `committed` the position that the server answers with: None if nothing was written."""
        self.committed = None
        await super().commit()

    async def _read_ok_packet(self) -> bool:
        async with asyncio.timeout(self._patience):
            answer = OKPacketWrapper(await self._read_packet())
        self.server_status = answer.server_status
        if self.server_status & _SESSION_STATE_CHANGED:
            told = _LAST_GTID.search(answer.message)
            self.committed = int(told[1]) if told else None
        return True


def create_engine(
    url: str, settings: DatabaseSettings, *, autocommit: bool, name: str, lock_timeout: int
) -> AsyncEngine:
    """Return an engine of `mariadb://…` or `mysql://…`."""
    session = _SESSION
    if not autocommit:
        session += f", innodb_lock_wait_timeout = {math.ceil(lock_timeout / 1000)}"  # whole seconds

    async def open_connection() -> Connection:
        try:
            return await connect(
                url, settings, settings.command_timeout, name=name, init_command=f"SET SESSION {session}"
            )
        except TimeoutError as error:
            # Nobody answered the door. A statement that takes too long is another matter.
            raise ConnectionError("the server did not accept the connection in time") from error

    return create_async_engine(
        f"{mariadb_sql.DRIVER}://",
        async_creator=open_connection,
        isolation_level="AUTOCOMMIT" if autocommit else "READ COMMITTED",
        hide_parameters=True,  # an error goes to the log; what was bound may be personal
        pool_size=settings.connections,
        max_overflow=0,
        pool_timeout=settings.pool_timeout,
        pool_use_lifo=True,
        pool_pre_ping=False,
        # Each of the two would be one more round trip; whoever takes a connection ends its own transaction.
        pool_reset_on_return=None,
        skip_autocommit_rollback=True,
        json_serializer=lambda value: wire.encode(value).decode(),
        json_deserializer=wire.decode,
    )


def driver_url(url: str) -> str:
    """Return the URL under which SQLAlchemy finds our dialect."""
    return f"{mariadb_sql.DRIVER}://{url.partition('://')[2]}"


def hold_for_migrations(connection: SqlConnection, *, lock: int, seconds: int, lock_seconds: float) -> None:
    """Hold a named lock until the connection ends: a change of a table would end every transaction's."""
    times = f"max_statement_time = {seconds}, lock_wait_timeout = {math.ceil(lock_seconds)}"
    connection.execute(text(f"SET SESSION {times}"))
    # The name is the server's, the lock is one database's.
    name = {"name": f"{connection.engine.url.database}.{lock}", "seconds": seconds}
    if not connection.scalar(text("SELECT GET_LOCK(:name, :seconds)"), name):
        raise OperationalError(ER.LOCK_WAIT_TIMEOUT, "another migration of this database goes on")


async def connect(url: str, settings: DatabaseSettings, patience: float, *, name: str, **options: Any) -> Connection:
    """Open one connection that commits each statement by itself."""
    parts = urlsplit(url)
    connection = Connection(
        patience,
        host=parts.hostname,
        port=parts.port or PORT,
        user=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
        db=parts.path.lstrip("/"),
        program_name=f"scaleout {name}",
        autocommit=True,
        **options,
    )
    try:
        # aiomysql's own timeout ends with the TCP connection, and a server that hangs has that.
        async with asyncio.timeout(settings.connect_timeout):
            await connection._connect()  # noqa: SLF001  # aiomysql.connect would build its own class
        check_version(connection.get_server_info())
    except BaseException:
        connection.abort()
        raise
    return connection


def check_version(version: str) -> None:
    """Refuse a server whose positions mean something else, or that cannot skip the messages that others claim.

    Raises:
        ConnectionError: it is none of MariaDB from `OLDEST` on.
    """
    # Behind 5.5.5-, which stands there for replicas of MySQL's that take no number above 5.
    numbers = re.match(r"(?:5\.5\.5-)?(\d+)\.(\d+)", version)
    if "MariaDB" not in version or numbers is None or (int(numbers[1]), int(numbers[2])) < OLDEST:
        raise ConnectionError(f"MariaDB {'.'.join(map(str, OLDEST))} or newer is needed; the server there is {version}")


def cut(driver_connection: Connection) -> None:
    """Break the connection off at once."""
    driver_connection.abort()


def is_cut(driver_connection: Connection) -> bool:
    """Ask the socket."""
    return driver_connection.is_cut


async def commit_position(driver_connection: Connection) -> int:
    """Return what the commit's answer said; asked for, one round trip, only where nothing was written."""
    if driver_connection.committed is not None:
        return driver_connection.committed
    return (await state(driver_connection)).position


async def fetch(driver_connection: Connection, text: str, values: Sequence[Any]) -> Sequence[Any]:
    """Run a statement and return its rows."""
    async with driver_connection.cursor(_Columns) as cursor:
        await cursor.execute(text, values)
        found: Sequence[Any] = await cursor.fetchall()
    return found


def insert_together(_first: Rows, _others: Sequence[Rows]) -> None:
    """Return nothing: an insert is no part of another statement here."""


async def limits(driver_connection: Connection) -> Limits:
    """Ask a server what it allows; one more connection is kept for an administrator."""
    (row,) = await rows(driver_connection, _LIMITS)
    endless = [(name, f"SET GLOBAL {name} sets it") for name in _TIME_LIMITS if not float(row[name])]
    return Limits(int(row["connections"]), tuple(endless))


async def state(driver_connection: Connection) -> State:
    """Ask a server what it is and how far it is; what it has received takes the right SLAVE MONITOR.

    Its GTID does not tell how many promotions there were: a primary of before must stay read-only.
    """
    (row,) = await rows(driver_connection, _STATE)
    position = _sequence(row["position"], row["domain"])
    if not row["is_replica"]:
        return State(is_primary=True, position=position, received=position, history=0)
    sources = await rows(driver_connection, "SHOW ALL SLAVES STATUS")
    received = [_sequence(source["Gtid_IO_Pos"], row["domain"]) for source in sources]
    return State(is_primary=False, position=position, received=max([position, *received]), history=0)


# pymysql has no names for 1927, the connection was killed, and 1969, max_statement_time.
_TROUBLES: dict[int, Trouble] = dict.fromkeys(
    (
        CR.CR_CONN_HOST_ERROR, CR.CR_SERVER_GONE_ERROR, CR.CR_SERVER_LOST, ER.CON_COUNT_ERROR, ER.SERVER_SHUTDOWN,
        ER.NET_READ_ERROR, ER.NET_READ_INTERRUPTED, ER.NET_ERROR_ON_WRITE, ER.NET_WRITE_INTERRUPTED, 1927,
        ER.DISK_FULL
    ),
    Trouble.LOST,
) | {
    ER.OPTION_PREVENTS_STATEMENT: Trouble.READ_ONLY,
    ER.QUERY_INTERRUPTED: Trouble.SLOW,
    1969: Trouble.SLOW,
    ER.LOCK_WAIT_TIMEOUT: Trouble.BUSY,
    ER.LOCK_DEADLOCK: Trouble.BUSY,
}  # fmt: skip


def trouble(error: BaseException) -> Trouble | None:
    """Return what befell a statement."""
    if isinstance(error, InterfaceError):
        return Trouble.LOST
    return _TROUBLES.get(error.args[0]) if isinstance(error, MySQLError) and error.args else None


class _Columns(aiomysql.Cursor):  # type: ignore[misc]  # aiomysql ships no types
    async def _show_warnings(self, _connection: Connection) -> None:
        """Ask nothing: aiomysql would fetch every warning, one round trip more, and raise it as Python's."""


class _Rows(_Columns, aiomysql.DictCursor):  # type: ignore[misc]  # the same
    """The same, with rows by name."""


async def rows(driver_connection: Connection, statement: str, values: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
    """Run a statement and return its rows by name; `%s` stands for each of the values."""
    async with driver_connection.cursor(_Rows) as cursor:
        await cursor.execute(statement, values or None)
        found: list[dict[str, Any]] = list(await cursor.fetchall())
    return found


def _sequence(position: str, domain: int) -> int:
    """Return the sequence number of the domain in a position such as `0-1-270,5-2-8`; others are of the past."""
    for gtid in position.split(","):
        if gtid.startswith(f"{domain}-"):
            return int(gtid.rpartition("-")[2])
    return 0
