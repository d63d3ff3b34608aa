"""One server of a shard: its pools, what is known of it, and how a read is put to it.

A read takes its turn among those of this process, so that none waits for ever while others pass it by, then one
connection, and is one round trip. SQLAlchemy runs a statement in one step of its own, a `Lookup` goes past it.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Executable, PoolProxiedConnection, Row
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import greenlet_spawn

from app.core.settings import DatabaseSettings
from app.scaling import dialect
from app.scaling.lookup import Compiled, Lookup
from app.scaling.turns import Turns


@dataclass(slots=True, eq=False)
class Node:
    """A server of the shard, with what was last seen of it; `Node.at` makes one.

    Attributes:
        name: as `Server-Timing` shows it while the server is a replica.
        url: where it is.
        engine: its pool for reads.
        writes: its pool for transactions, used while it is the primary.
        turns: as many as the pool for reads has connections; who waits for one gets it in the order of arrival.
        idle: connections of the pool for reads that lookups keep: to take one out and give it back costs more than to
            ask on it. With those in use they are never more than the pool has, as each use has its turn; `all` gives
            one back before it takes one.
        in_flight: reads that wait for a connection to it or for its answer.
        in_use: the driver's connections on which somebody waits for its answer.
        claims: whether it says that it is a primary; what a lost one said last stands.
        history: number of the history that its log follows, 0 if that is not known.
        answers: whether it answered its watcher the last time.
        answered_at: moment (`time.monotonic`) of its last answer to its watcher.
        position: how far it has replayed, as it last said while a replica; after a crash it may be less than before.
        lag: seconds behind the primary.
        healthy: whether it takes reads as a replica.
        failures: reads that it has failed, one after the other, since it was last all right.
        out_until: moment (`time.monotonic`) before which it does not come back.
    """

    name: str
    url: str = field(repr=False)
    engine: AsyncEngine
    writes: AsyncEngine
    turns: Turns
    idle: list[PoolProxiedConnection] = field(default_factory=list)
    in_flight: int = 0
    in_use: set[Any] = field(default_factory=set)
    claims: bool = False
    history: int = 0
    answers: bool = False
    answered_at: float = 0.0
    position: int = 0
    lag: float = 0.0
    healthy: bool = False
    failures: int = 0
    out_until: float = 0.0

    @classmethod
    def at(cls, url: str, name: str, settings: DatabaseSettings) -> "Node":
        """Return the node at `url`; nothing is opened before it is asked."""
        return cls(
            name=name,
            url=url,
            engine=dialect.create_engine(url, settings, autocommit=True, name="reader"),
            writes=dialect.create_engine(url, settings, autocommit=False, name="writer"),
            turns=Turns(settings.connections, settings.pool_timeout),
        )

    @property
    def writing(self) -> int:
        """How many connections of its pool for transactions are in use."""
        pool: Any = self.writes.pool
        return int(pool.checkedout())

    async def all(self, statement: Executable) -> Sequence[Row[Any]]:
        """Run a statement that changes nothing and return its rows.

        Raises:
            PoolTimeout: if no connection became free in time.
            One of `dialect.ERRORS`: what befell the statement.
        """
        await self._take_turn()
        try:
            if self.idle:
                self.idle.pop().close()
            # One step for connection, statement and rows: SQLAlchemy's own async faces make four of them.
            return await greenlet_spawn(self._all, statement)
        finally:
            self.turns.give()

    async def find(self, lookup: Lookup, values: Mapping[str, Any]) -> list[Any]:
        """Return the rows of a lookup, their columns as attributes.

        Raises:
            As `all`.
        """
        await self._take_turn()
        try:
            return await self._find(lookup.compiled(self.engine.dialect), values)
        finally:
            self.turns.give()

    async def close(self) -> None:
        """Close the pools."""
        while self.idle:
            self.idle.pop().close()
        await self.engine.dispose()
        await self.writes.dispose()

    def _all(self, statement: Executable) -> Sequence[Row[Any]]:
        with self.engine.sync_engine.connect() as connection:
            driver_connection = connection.connection.driver_connection
            self.in_use.add(driver_connection)
            try:
                return connection.execute(statement).all()
            finally:
                self.in_use.discard(driver_connection)

    async def _find(self, lookup: Compiled, values: Mapping[str, Any]) -> list[Any]:
        connection = self._take_idle() or await self.engine.raw_connection()
        driver_connection = connection.driver_connection
        self.in_use.add(driver_connection)
        try:
            found = await dialect.fetch(driver_connection, lookup.text, lookup.values(values))
            return [lookup.read(columns) for columns in found]
        except asyncio.CancelledError:
            connection.invalidate()  # the answer is still to come, and would be taken for the next one's
            raise
        finally:
            self.in_use.discard(driver_connection)
            if connection.is_valid:
                self.idle.append(connection)
            else:
                connection.close()

    def _take_idle(self) -> PoolProxiedConnection | None:
        while self.idle:
            connection = self.idle.pop()
            if not dialect.is_cut(connection.driver_connection):
                return connection
            connection.invalidate()
            connection.close()
        return None

    async def _take_turn(self) -> None:
        try:
            await self.turns.take()
        except TimeoutError as error:
            raise PoolTimeout("no connection became free in time") from error
