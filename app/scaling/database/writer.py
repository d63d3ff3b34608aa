"""Writes: one transaction on a primary, whose commit tells the work at hand what later reads must have reached.

Leaving `transaction` is the only commit there is. What befell it becomes an error that says whether to try again; a
commit whose position nobody could tell any more is still a commit.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from time import monotonic
from typing import Any

from sqlalchemy import Column, ColumnElement, Executable, Row, insert
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection

from app.core import context
from app.core.context import NEWEST, unknown_position
from app.core.errors import Unavailable
from app.core.settings import DatabaseSettings
from app.scaling import dialect
from app.scaling.database.refusals import all_in_use, refuse
from app.scaling.database.shard import Shard, own, statements_of
from app.scaling.dialect import Rows, Trouble
from app.scaling.live_map import LiveMap
from app.scaling.node import Node
from app.scaling.positions import MARK_SECONDS
from app.scaling.sharding import ShardMap


class Writer:
    """One transaction on a primary. Do not build one, and do not commit: `async with database.writer(...)` does."""

    def __init__(
        self, connection: AsyncConnection, shard: int, places: ShardMap, *, url: str, together: bool, at_once: bool
    ) -> None:
        self._connection = connection
        self._places = places
        self._url = url
        self._together = together
        self._at_once = at_once
        self.shard = shard
        # What reads must have reached to see it: nothing until the commit begins, and all there is until its end is
        # known.
        self.position = 0
        self._then: list[Callable[[], None]] = []

    def then(self, act: Callable[[], None]) -> None:
        """Call `act` once the transaction has committed, and never if it does not: for counting what has happened."""
        self._then.append(act)

    def committed(self) -> None:
        """Do what waits for the commit."""
        for act in self._then:
            act()

    async def insert_once(self, first: Rows, *others: Rows) -> bool:
        """Insert the one row of `first`, unless its key is there, and only then the `others`; return whether it did.

        It waits for a transaction that is inserting the same key.
        """
        statement = dialect.insert_together(self._url, first, others) if self._together else None
        if statement is not None:
            return await self._insert_together(statement)
        inserted = await self.run(dialect.insert_ignore(first.table), first.values)
        for rows in others if inserted else ():
            await self.run(insert(rows.table), rows.values)
        return bool(inserted)

    async def _insert_together(self, statement: Executable) -> bool:
        if self._at_once:
            self.position = NEWEST
        try:
            (row,) = await self.all(statement)
        except dialect.ERRORS as error:
            if dialect.trouble(error) not in {Trouble.LOST, Trouble.SLOW}:
                self.position = 0  # the server has said that nothing is committed
            raise
        if not row.inserted:
            self.position = 0
        return bool(row.inserted)

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
    async def open(self, shard: Shard, places: ShardMap, *, at_once: bool = False) -> AsyncIterator[Writer]:
        """Open a transaction on a shard that `places` has led to, and commit it at the end; see `Database.writer`."""
        node, since = shard.replicas.primary, monotonic()
        async with AsyncExitStack() as stack:
            try:
                connection = await self._connect(node, stack)
                # Citus finds no node for a statement that inserts into several tables what it reads from a parameter.
                together = self._settings.spread == "none" and dialect.inserts_together(node.url)
                at_once = at_once and together
                if at_once:  # each statement commits by itself then; to say so asks nobody
                    await connection.execution_options(isolation_level="AUTOCOMMIT")
                writer = Writer(connection, shard.number, places, url=node.url, together=together, at_once=at_once)
                async with connection.begin():
                    yield writer
                    writer.position = NEWEST
                writer.committed()
                writer.position = await self._position(connection)
            except dialect.ERRORS as error:
                if dialect.is_fenced(error):
                    self._map.doubt()
                    raise Unavailable("This data is being moved; try again.", code="shard_moving") from error
                refuse(error, alive=node.answered_at > since)
        work = context.current()
        work.reached(shard.number, writer.position)
        work.wrote.add(shard.number)

    async def _connect(self, node: Node, stack: AsyncExitStack) -> AsyncConnection:
        """Take a connection for a transaction until `stack` ends; waiting for one and opening it count together."""
        try:
            async with asyncio.timeout(self._settings.pool_timeout):
                connection = await stack.enter_async_context(node.writes.connect())
        except (PoolTimeout, TimeoutError) as error:
            if node.answers:
                raise all_in_use() from error
            raise ConnectionError("the primary does not answer") from error
        driver_connection = (await connection.get_raw_connection()).driver_connection
        node.in_use.add(driver_connection)
        stack.callback(node.in_use.discard, driver_connection)
        return connection

    async def _position(self, connection: AsyncConnection) -> int:
        """Return the position of what has just been committed.

        A primary that is lost at this very moment has committed: that is success, and later reads of the work ask for
        the newest position there can be, which only a primary has, until no replica that answers can lack the commit.
        """
        try:
            raw = await connection.get_raw_connection()
            return await dialect.commit_position(raw.driver_connection)
        except dialect.ERRORS as error:
            if dialect.trouble(error) is None:
                raise
            return unknown_position(MARK_SECONDS + self._settings.replica_max_lag)
