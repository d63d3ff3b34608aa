"""Reads and writes over all shards. Reader or writer is chosen where the session is opened, and is a type.

A `Reader` sends each statement, without a transaction, to a replica that has replayed what the caller must see, else
to the primary behind a cap. A `Writer` is one transaction on a primary; leaving `database.writer(...)` is the only
commit there is, and tells the work at hand the position that later reads must have reached. The map of shards says
which servers that are.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from uuid import UUID

from sqlalchemy import Column, ColumnElement, Row, Select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.core import context
from app.core.errors import Unavailable
from app.core.ids import logical_shard
from app.core.settings import DatabaseSettings
from app.scaling import dialect
from app.scaling.database.map_row import MapRow
from app.scaling.database.reader import Reader
from app.scaling.database.schema import metadata, shard_map
from app.scaling.database.shard import CATALOG_SHARD, PRIMARY_WAIT, Place, Shard, own
from app.scaling.database.writer import Insertion, Transactions, Writer
from app.scaling.dialect import Rows
from app.scaling.live_map import ALONE, LiveMap
from app.scaling.positions import Positions
from app.scaling.replicas import ReplicaSet
from app.scaling.sharding import ShardMap
from app.scaling.turns import Turns

__all__ = ["CATALOG_SHARD", "Database", "Queries", "Reader", "Writer", "metadata", "shard_map"]

Queries = Reader | Writer  # for a function that only reads and may also read inside a transaction


class Database:
    """All shards. Open one per process with `start`, close it with `stop`.

    Args:
        settings: where they are.
        positions: is told of every commit for a profile, so that its reads see it on every instance.
    """

    def __init__(self, settings: DatabaseSettings, positions: Positions | None = None) -> None:
        self._positions = positions
        self._settings = settings
        self.shards = tuple(
            Shard(
                number=number,
                replicas=ReplicaSet(number, address, settings),
                primary_reads=Turns(settings.primary_read_cap, PRIMARY_WAIT),
            )
            for number, address in enumerate(settings.shards)
        )
        row = MapRow(self.shards[CATALOG_SHARD], settings)
        self.map = LiveMap(len(settings.shards), row.newest, row.any)
        self._transactions = Transactions(settings, self.map)

    async def start(self) -> None:
        """Watch the servers; one that is down is no reason not to start."""
        for shard in self.shards:
            await shard.replicas.start()
        await self.map.start()

    async def warm(self) -> None:
        """Open the connections of every pool, so that the first requests do not wait for them; a node may be down."""
        pools = [
            pool
            for shard in self.shards
            for pool in (shard.replicas.primary.writes, *(node.reads for node in shard.replicas.nodes))
        ]
        await asyncio.gather(*(_fill(pool.engine, self._settings.connections) for pool in pools))

    async def stop(self) -> None:
        """Close every pool."""
        await self.map.stop()
        for shard in self.shards:
            await shard.replicas.stop()

    def reader(self, profile_id: UUID | None = None, *, newest: bool = False) -> Reader:
        """Return a reader of the profile's shard, or of the catalog without one.

        Args:
            profile_id: whose shard.
            newest: see all that is committed, whoever committed it; only the primary can say that, so use it for rare
                reads.
        """
        return Reader(partial(self._find, profile_id), newest=newest)

    @asynccontextmanager
    async def writer(self, profile_id: UUID | None = None, *, shown: bool = False) -> AsyncIterator[Writer]:
        """Open a transaction on the profile's shard, or on the catalog without one, and commit it at the end.

        An exception inside the block rolls everything back. Once the block is left without one, every later read for
        the profile sees what was written, on every instance; without a profile that holds for the caller's reads.

        Args:
            profile_id: whose shard.
            shown: whether it changes what the cache shows of the profile, which `Writer.shows` then has to tell it.

        Raises:
            Unavailable: if the primary cannot be reached, is lost before the commit is known, or has others to serve
                first, or if the profile is being moved to another shard at this moment.
            TimedOut: if a statement took too long.
        """
        places = ALONE if profile_id is None else await self.map.for_writing(logical_shard(profile_id))
        shard = self._shard(places, profile_id)
        reading = profile_id or context.current().profile_id
        if self._positions is None or reading is None:
            async with self._transactions.open(shard, places) as writer:
                yield writer
            await writer.show()
            return
        mark = await self._positions.mark(reading, shard.number, shown=shown)
        opened: Writer | None = None
        try:
            async with self._transactions.open(shard, places) as opened:
                yield opened
            await opened.show()
        finally:
            await self._positions.settle(mark, opened.position if opened else 0)

    async def insert_once(self, profile_id: UUID, first: Rows, *others: Rows) -> bool:
        """Insert rows of the profile as `Writer.insert_once` does, in a transaction of their own.

        Where the engine can, one statement is that transaction, which saves the round trips of BEGIN and COMMIT. Later
        reads see what was written, or found, as after `writer`.

        Raises:
            As `writer`.
        """
        places = await self.map.for_writing(logical_shard(profile_id))
        shard = self._shard(places, profile_id)
        # Citus finds no node for a statement that inserts into several tables what it reads from a parameter.
        together = self._settings.spread == "none"
        statement = dialect.insert_together(shard.replicas.primary.url, first, others) if together else None
        if statement is None:
            async with self.writer(profile_id) as writer:
                return await writer.insert_once(first, *others)
        insertion = Insertion(shard, *statement)
        if self._positions is None:
            return await self._transactions.insert(insertion)
        mark = await self._positions.mark(profile_id, shard.number)
        try:
            return await self._transactions.insert(insertion)
        finally:
            await self._positions.settle(mark, insertion.position)

    def readers(self) -> tuple[Reader, ...]:
        """Return a reader of each shard, for questions about the databases themselves; for rows, see `everywhere`."""
        return tuple(Reader(partial(self._there, shard, ALONE)) for shard in self.shards)

    async def everywhere(self, owner: Column[Any]) -> list[tuple[Reader, ColumnElement[bool]]]:
        """Return a reader of each shard, for what has to gather over all of them, and what to add to its `where`.

        While a range is moved, its rows are on two shards. The condition, on the column that holds the profile, keeps
        every row to the shard that answers for it.
        """
        places = await self.map.now()
        return [
            (Reader(partial(self._there, shard, places)), own(places, shard.number, owner)) for shard in self.shards
        ]

    async def gather(self, statement: Select[Any], owner: Column[Any]) -> list[Row[Any]]:
        """Run a statement on every shard at once and return the rows of all of them, shard by shard.

        Args:
            statement: ordered and limited; the first rows of all are among the first of each.
            owner: the column that holds the profile.
        """
        parts = await self.everywhere(owner)
        found = await asyncio.gather(*(reader.all(statement.where(own)) for reader, own in parts))
        return [row for rows in found for row in rows]

    @asynccontextmanager
    async def writer_of(self, shard: int) -> AsyncIterator[Writer]:
        """Open a transaction on a shard by its number, for upkeep that goes over all of them."""
        async with self._transactions.open(self.shards[shard], await self.map.now()) as writer:
            yield writer

    def takes_writes(self, profile_id: UUID | None = None) -> bool:
        """Say whether a write would find its primary, as far as its watcher knows; for writes that can wait."""
        return self._shard(self.map.latest, profile_id).replicas.takes_writes

    async def _find(self, profile_id: UUID | None) -> Place:
        if profile_id is None:
            return Place(self.shards[CATALOG_SHARD], 0)
        places = await self.map.now(logical_shard(profile_id))
        return await self._there(self._shard(places, profile_id), places)

    async def _there(self, shard: Shard, places: ShardMap) -> Place:
        return Place(shard, places.arrived(shard.number))

    def _shard(self, places: ShardMap, profile_id: UUID | None) -> Shard:
        number = CATALOG_SHARD if profile_id is None else places.shard_of(profile_id)
        if number >= len(self.shards):
            raise Unavailable("This instance does not know the shard of this data; try again.", code="shard_unknown")
        return self.shards[number]


async def _fill(pool: AsyncEngine, size: int) -> None:
    """Have a pool open `size` connections, or none where the node is down, whose watcher says so."""

    async def connect() -> AsyncConnection:
        return await pool.connect()

    opened = await asyncio.gather(*(connect() for _ in range(size)), return_exceptions=True)
    for connection in opened:
        if isinstance(connection, AsyncConnection):
            await connection.close()
