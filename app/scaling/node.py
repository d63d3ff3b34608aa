"""One server of a shard: its connections, what is known of it, and how a read is put to it.

A read takes its turn among those of this process, so that none waits for ever while others pass it by, then one
connection, and is one round trip. SQLAlchemy runs a statement in one step of its own, a `Lookup` goes past it.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Executable, Row

from app.core.settings import DatabaseSettings
from app.scaling import dialect
from app.scaling.connections import Connections
from app.scaling.lookup import Lookup


@dataclass(slots=True, eq=False)
class Node:
    """A server of the shard, with what was last seen of it; `Node.at` makes one.

    Attributes:
        name: as `Server-Timing` shows it while the server is a replica.
        url: where it is.
        reads: its connections for reads.
        writes: its connections for transactions, used while it is the primary.
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
    reads: Connections
    writes: Connections
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
        places, patience = settings.connections, settings.pool_timeout
        reads = dialect.create_engine(url, settings, autocommit=True, name="reader")
        writes = dialect.create_engine(url, settings, autocommit=False, name="writer")
        return cls(
            name=name,
            url=url,
            reads=Connections(reads, places, patience),
            # A write has to be refused within a second while the primary hangs, also if it has to connect.
            writes=Connections(writes, places, patience, opening=patience),
        )

    async def all(self, statement: Executable) -> Sequence[Row[Any]]:
        """Run a statement that changes nothing and return its rows.

        Raises:
            PoolTimeout: if no connection became free in time.
            One of `dialect.ERRORS`: what befell the statement.
        """

        def ask(connection: Connection) -> Sequence[Row[Any]]:
            driver_connection = connection.connection.driver_connection
            self.in_use.add(driver_connection)
            try:
                return connection.execute(statement).all()
            finally:
                self.in_use.discard(driver_connection)

        return await self.reads.run(ask)

    async def find(self, lookup: Lookup, values: Mapping[str, Any]) -> list[Any]:
        """Return the rows of a lookup, their columns as attributes.

        Raises:
            As `all`.
        """
        connection = await self.reads.take()
        driver_connection = connection.driver_connection
        self.in_use.add(driver_connection)
        try:
            compiled = lookup.compiled(self.reads.engine.dialect)
            found = await dialect.fetch(driver_connection, compiled.text, compiled.values(values))
            return [compiled.read(columns) for columns in found]
        except asyncio.CancelledError:
            connection.invalidate()  # the answer is still to come, and would be taken for the next one's
            raise
        finally:
            self.in_use.discard(driver_connection)
            self.reads.give(connection)

    async def close(self) -> None:
        """Close its connections."""
        await self.reads.replace()
        await self.writes.replace()
