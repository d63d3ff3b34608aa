"""Writes: one transaction on a primary, whose commit tells the work at hand what later reads must have reached.

Leaving `transaction` is the only commit there is. What befell it becomes an error that says whether to try again; a
commit whose position nobody could tell any more is still a commit.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from time import monotonic
from typing import Any, NoReturn

from sqlalchemy import Column, ColumnElement, Executable, Row, insert
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection

from app.core import context
from app.core.context import NEWEST, unknown_position
from app.core.errors import Unavailable
from app.core.settings import DatabaseSettings
from app.scaling import dialect
from app.scaling.database.refusals import all_in_use, refuse
from app.scaling.database.shard import Shard, own, statements_of, timeouts_of, waits_of
from app.scaling.dialect import Rows, Trouble
from app.scaling.live_map import LiveMap
from app.scaling.node import Node
from app.scaling.positions import MARK_SECONDS
from app.scaling.sharding import ShardMap


class Writer:
    """One transaction on a primary. Do not build one, and do not commit: `async with database.writer(...)` does."""

    def __init__(self, connection: AsyncConnection, shard: int, places: ShardMap) -> None:
        self._connection = connection
        self._places = places
        self.shard = shard
        # What reads must have reached to see it: nothing until the commit begins, and all there is until its end is
        # known.
        self.position = 0
        self._then: list[Callable[[], None]] = []
        self._shows: list[Callable[[], Awaitable[None]]] = []

    def then(self, act: Callable[[], None]) -> None:
        """Call `act` once the transaction has committed, and never if it does not: for counting what has happened."""
        self._then.append(act)

    def shows(self, act: Callable[[], Awaitable[None]]) -> None:
        """Call `act` once the transaction has committed: it tells the cache, which until then is not to be believed."""
        self._shows.append(act)

    async def show(self) -> None:
        """Do what tells of the commit elsewhere; the end of the transaction is not known before."""
        position, self.position = self.position, NEWEST
        for act in self._shows:
            await act()
        self.position = position

    def committed(self) -> None:
        """Do what waits for the commit."""
        for act in self._then:
            act()

    async def insert_once(self, first: Rows, *others: Rows) -> bool:
        """Insert the one row of `first`, unless its key is there, and only then the `others`; return whether it did.

        It waits for a transaction that is inserting the same key.
        """
        inserted = await self.run(dialect.insert_ignore(first.table), first.values)
        for rows in others if inserted else ():
            await self.run(insert(rows.table), rows.values)
        return bool(inserted)

    async def all(self, statement: Executable) -> Sequence[Row[Any]]:
        """Run the statement and return all rows."""
        rows: Sequence[Row[Any]] = (await self._execute(statement)).all()
        return rows

    async def first(self, statement: Executable) -> Row[Any] | None:
        """Run the statement and return the first row, or None."""
        row: Row[Any] | None = (await self._execute(statement)).first()
        return row

    async def run(self, statement: Executable, parameters: Sequence[Mapping[str, Any]] | None = None) -> int:
        """Run the statement, once for each of `parameters` if given, and return the number of rows that it touched."""
        result = await self._execute(statement, parameters)
        return int(getattr(result, "rowcount", -1))

    def own(self, owner: Column[Any]) -> ColumnElement[bool]:
        """Return the condition that a row, with its profile in `owner`, belongs to this shard; see `everywhere`."""
        return own(self._places, self.shard, owner)

    async def _execute(self, statement: Executable, parameters: Sequence[Mapping[str, Any]] | None = None) -> Any:
        with context.current().timed("db", "primary"):
            result = await self._connection.execute(statement, parameters)
        statements_of(self.shard, "primary", "ok").inc()
        return result


class Insertion:
    """Rows that are yet to be inserted by one statement, which is a transaction by itself.

    Args:
        shard: where.
        text: of the statement, as `dialect.insert_together` makes it.
        values: of the statement.
    """

    def __init__(self, shard: Shard, text: str, values: Sequence[Any]) -> None:
        self.shard = shard
        self.text = text
        self.values = values
        # As a writer's: the commit begins with the statement.
        self.position = 0


class Transactions:
    """Opens transactions on the primaries.

    Args:
        settings: how long a connection is waited for, how much lag a replica may have, and who spreads the tables.
        live_map: is told of a shard that refuses a row, because it is or goes elsewhere.
    """

    def __init__(self, settings: DatabaseSettings, live_map: LiveMap) -> None:
        self._settings = settings
        self._map = live_map

    @asynccontextmanager
    async def open(self, shard: Shard, places: ShardMap) -> AsyncIterator[Writer]:
        """Open a transaction on a shard that `places` has led to, and commit it at the end; see `Database.writer`."""
        node, since = self._primary(shard), monotonic()
        try:
            async with node.writes.connect() as connection, AsyncExitStack() as stack:
                driver_connection = (await connection.get_raw_connection()).driver_connection
                node.in_use.add(driver_connection)
                stack.callback(node.in_use.discard, driver_connection)
                writer = Writer(connection, shard.number, places)
                async with connection.begin():
                    yield writer
                    writer.position = NEWEST
                writer.committed()
                writer.position = await self._position(driver_connection)
        except PoolTimeout as error:
            _none_free(shard, node, error)
        except dialect.ERRORS as error:
            await self._refuse(node, error, since)
        _tell(shard, writer.position)

    async def insert(self, insertion: Insertion) -> bool:
        """Send the one statement past SQLAlchemy, to which a transaction is several steps; return whether it inserted.

        The engine commits a statement that stands alone by itself.
        """
        shard = insertion.shard
        node, since = self._primary(shard), monotonic()
        try:
            connection = await node.writes.take()
        except PoolTimeout as error:
            _none_free(shard, node, error)
        except dialect.ERRORS as error:
            await self._refuse(node, error, since)
        driver_connection = connection.driver_connection
        node.in_use.add(driver_connection)
        try:
            insertion.position = NEWEST
            with context.current().timed("db", "primary"):
                ((inserted,),) = await dialect.fetch(driver_connection, insertion.text, insertion.values)
            statements_of(shard.number, "primary", "ok").inc()
            insertion.position = await self._position(driver_connection)
        except dialect.ERRORS as error:
            trouble = dialect.trouble(error)
            if trouble not in {Trouble.LOST, Trouble.SLOW}:
                insertion.position = 0  # the server has said that nothing is committed
            if trouble not in {None, Trouble.BUSY}:
                connection.invalidate()
            await self._refuse(node, error, since)
        except asyncio.CancelledError:
            connection.invalidate()  # the answer is still to come, and would be taken for the next one's
            raise
        finally:
            node.in_use.discard(driver_connection)
            node.writes.give(connection)
        _tell(shard, insertion.position)
        return bool(inserted)

    @staticmethod
    def _primary(shard: Shard) -> Node:
        """Return the node that takes the writes of a shard, and count who will wait for it."""
        node = shard.replicas.primary
        if node.writes.full:
            waits_of(shard.number, "primary", "write").inc()
        return node

    async def _refuse(self, node: Node, error: Exception, since: float) -> NoReturn:
        """Raise what the caller of a transaction that began at `since` (`time.monotonic`) is told."""
        if dialect.trouble(error) is Trouble.READ_ONLY:
            await node.writes.replace()  # they all lead to the same server
        if dialect.is_fenced(error):
            self._map.doubt()
            raise Unavailable("This data is being moved; try again.", code="shard_moving") from error
        refuse(error, alive=node.answered_at > since)

    async def _position(self, driver_connection: Any) -> int:
        """Return the position of what has just been committed.

        A primary that is lost at this very moment has committed: that is success, and later reads of the work ask for
        the newest position there can be, which only a primary has, until no replica that answers can lack the commit.
        """
        try:
            return await dialect.commit_position(driver_connection)
        except dialect.ERRORS as error:
            if dialect.trouble(error) is None:
                raise
            return unknown_position(MARK_SECONDS + self._settings.replica_max_lag)


def _none_free(shard: Shard, node: Node, error: PoolTimeout) -> NoReturn:
    if node.answers:
        timeouts_of(shard.number, "primary", "write").inc()
        raise all_in_use() from error
    gone = ConnectionError("the primary does not answer")
    gone.__cause__ = error
    refuse(gone, alive=False)


def _tell(shard: Shard, position: int) -> None:
    """Note on the work at hand what it has written, and up to where its later reads must see."""
    work = context.current()
    work.reached(shard.number, position)
    work.wrote.add(shard.number)
