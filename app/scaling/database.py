"""Reads and writes over all shards. Reader or writer is chosen where the session is opened, and is a type.

A `Reader` sends each statement, without a transaction, to a replica that has replayed what the caller must see, else
to the primary behind a cap. A `Writer` is one transaction on a primary; leaving `database.writer(...)` is the only
commit there is, and tells the work at hand the position that later reads must have reached.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any, NamedTuple, NoReturn
from uuid import UUID

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    ColumnElement,
    Executable,
    Integer,
    MetaData,
    Row,
    Select,
    Table,
    false,
    insert,
    or_,
    select,
    true,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.core import context
from app.core.context import NEWEST, unknown_position
from app.core.errors import TimedOut, Unavailable
from app.core.ids import logical_shard
from app.core.settings import DatabaseSettings
from app.core.telemetry import DATABASE_FALLBACKS, DATABASE_STATEMENTS
from app.scaling import dialect
from app.scaling.dialect import Rows, Trouble
from app.scaling.live_map import ALONE, LiveMap
from app.scaling.positions import MARK_SECONDS, Positions
from app.scaling.replicas import Node, ReplicaSet
from app.scaling.sharding import ShardMap

# One naming rule for every constraint, so that migrations can name what they change on any engine.
metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# The one row says where every logical shard is; whoever changes it names the epoch that it has seen. In the catalog.
shard_map = Table(
    "shard_map",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("epoch", BigInteger, nullable=False),
    Column("body", JSON, nullable=False),
)

# Replicas that one read may lose before it asks the primary: two, because replicas that share a machine or a restart
# die together, sooner than any watcher sees it.
REPLICA_TRIES = 2

# Seconds a read waits for its turn at the primary: a burst passes in this time, an outage of the replicas does not.
PRIMARY_WAIT = 0.25

CATALOG_SHARD = 0  # holds what belongs to no profile: directory, products, warehouses, stock, jobs


@dataclass(frozen=True, slots=True)
class Shard:
    """A primary with its replicas, and how many reads the primary takes at a time."""

    number: int
    replicas: ReplicaSet
    primary_reads: asyncio.Semaphore


class Place(NamedTuple):
    """Where a read goes: a shard, and the position up to which its log holds what has moved there."""

    shard: Shard
    arrived: int


class Reader:
    """Statements that change nothing, each on the best node at that moment, each one round trip.

    A statement whose node is lost under it is sent again, to another node. Do not build one: `database.reader`.
    """

    def __init__(self, find: Callable[[], Awaitable[Place]], *, newest: bool = False) -> None:
        self._find = find
        self._newest = newest

    async def all(self, statement: Executable) -> Sequence[Row[Any]]:
        """Return all rows."""
        return await self._run(statement)

    async def first(self, statement: Executable) -> Row[Any] | None:
        """Return the first row, or None."""
        rows = await self._run(statement)
        return rows[0] if rows else None

    async def _run(self, statement: Executable) -> Sequence[Row[Any]]:
        shard, arrived = await self._find()
        nodes = shard.replicas
        lost: list[Node] = []
        while True:
            work = context.current()
            newest = self._newest or shard.number in work.unsettled
            position = NEWEST if newest else max(arrived, work.position(shard.number))
            replica = nodes.choose(position, besides=lost) if len(lost) < REPLICA_TRIES else None
            node = replica or nodes.primary
            since = monotonic()
            try:
                if replica is not None:
                    return await self._send(shard, replica, statement)
                return await self._ask_primary(shard, statement, failover=bool(lost))
            except dialect.ERRORS as error:
                trouble = dialect.trouble(error)
                if trouble is None:
                    raise
                if trouble is Trouble.SLOW and node.answered_at > since:
                    raise _too_slow() from error
                if trouble is not Trouble.BUSY:
                    nodes.failed(node)
                # The primary twice: its first connection may be one that a restart has cut.
                hopeless = node is nodes.primary and not nodes.takes_writes
                if hopeless or len(lost) == REPLICA_TRIES or node in lost:
                    raise Unavailable("The database cannot answer now; try again.", code="database_down") from error
                lost.append(node)

    async def _ask_primary(self, shard: Shard, statement: Executable, *, failover: bool) -> Sequence[Row[Any]]:
        nodes = shard.replicas
        able = any(replica.healthy for replica in nodes.replicas)
        reason = "failover" if failover else "position" if able else "no_replica"
        DATABASE_FALLBACKS.labels(str(shard.number), reason).inc()
        if nodes.primary.answers and not nodes.primary.claims:
            raise Unavailable("The database has no primary right now; try again.", code="database_down")
        # The cap keeps an outage of the replicas from turning into one of the primary.
        try:
            async with asyncio.timeout(PRIMARY_WAIT):
                await shard.primary_reads.acquire()
        except TimeoutError as error:
            raise Unavailable("Too many reads wait for the primary; try again.", code="read_capacity") from error
        try:
            return await self._send(shard, nodes.primary, statement)
        finally:
            shard.primary_reads.release()

    async def _send(self, shard: Shard, node: Node, statement: Executable) -> Sequence[Row[Any]]:
        name = shard.replicas.name_of(node)
        node.in_flight += 1
        outcome = "error"
        try:
            with context.current().timed("db", name):
                async with node.engine.connect() as connection:
                    driver_connection = (await connection.get_raw_connection()).driver_connection
                    node.in_use.add(driver_connection)
                    try:
                        rows = (await connection.execute(statement)).all()
                    finally:
                        node.in_use.discard(driver_connection)
            outcome = "ok"
        except PoolTimeout as error:
            raise _all_in_use() from error
        finally:
            node.in_flight -= 1
            DATABASE_STATEMENTS.labels(str(shard.number), name, outcome).inc()
        return rows


class Writer:
    """One transaction on a primary. Do not build one, and do not commit: `async with database.writer(...)` does."""

    def __init__(self, connection: AsyncConnection, shard: int, places: ShardMap, *, url: str, at_once: bool) -> None:
        self._connection = connection
        self._places = places
        self._url = url
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
        statement = dialect.insert_together(self._url, first, others)
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
        return _own(self._places, self.shard, owner)

    async def _execute(self, statement: Executable, parameters: Sequence[Mapping[str, Any]] | None = None) -> Any:
        with context.current().timed("db", "primary"):
            result = await self._connection.execute(statement, parameters)
        DATABASE_STATEMENTS.labels(str(self.shard), "primary", "ok").inc()
        return result


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
        self.map = LiveMap(len(settings.shards), self._load_map, self._load_older_map)
        self.shards = tuple(
            Shard(
                number=number,
                replicas=ReplicaSet(number, address, settings),
                primary_reads=asyncio.Semaphore(settings.primary_read_cap),
            )
            for number, address in enumerate(settings.shards)
        )

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
            for pool in (shard.replicas.primary.writes, *(node.engine for node in shard.replicas.nodes))
        ]
        await asyncio.gather(*(_fill(pool, self._settings.connections) for pool in pools))

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
    async def writer(self, profile_id: UUID | None = None, *, at_once: bool = False) -> AsyncIterator[Writer]:
        """Open a transaction on the profile's shard, or on the catalog without one, and commit it at the end.

        An exception inside the block rolls everything back. Once the block is left without one, every later read for
        the profile sees what was written, on every instance; without a profile that holds for the caller's reads.

        Args:
            profile_id: whose shard.
            at_once: the block writes with one `insert_once` and otherwise only reads: where the engine can, that one
                statement is the transaction, which saves the round trips of BEGIN and COMMIT.

        Raises:
            Unavailable: if the primary cannot be reached, is lost before the commit is known, or has others to serve
                first, or if the profile is being moved to another shard at this moment.
            TimedOut: if a statement took too long.
        """
        places = ALONE if profile_id is None else await self.map.for_writing(logical_shard(profile_id))
        shard = self._shard(places, profile_id)
        reading = profile_id or context.current().profile_id
        if self._positions is None or reading is None:
            async with self._transaction(shard, places, at_once=at_once) as writer:
                yield writer
            return
        mark = await self._positions.mark(reading, shard.number)
        opened: Writer | None = None
        try:
            async with self._transaction(shard, places, at_once=at_once) as opened:
                yield opened
        finally:
            await self._positions.settle(mark, opened.position if opened else 0)

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
            (Reader(partial(self._there, shard, places)), _own(places, shard.number, owner)) for shard in self.shards
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
        async with self._transaction(self.shards[shard], await self.map.now()) as writer:
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

    async def _load_map(self) -> ShardMap:
        """Ask the catalog's primary where everything is; without a row it is where the settings put it."""
        silent = Unavailable("The map of shards cannot be read; try again.", code="database_down")
        primary = self.shards[CATALOG_SHARD].replicas.primary
        try:
            async with asyncio.timeout(self._settings.connect_timeout), primary.engine.connect() as connection:
                return self._map_from((await connection.execute(select(shard_map))).first())
        except PoolTimeout as error:
            raise silent from error
        except dialect.ERRORS as error:
            raise silent from error

    async def _load_older_map(self) -> ShardMap:
        return self._map_from(await self.reader().first(select(shard_map)))

    def _map_from(self, row: Row[Any] | None) -> ShardMap:
        if row is None:
            return ShardMap.of_settings([shard.held for shard in self._settings.shards])
        return ShardMap.from_json(row.epoch, row.body)

    @asynccontextmanager
    async def _transaction(self, shard: Shard, places: ShardMap, *, at_once: bool = False) -> AsyncIterator[Writer]:
        node, since = shard.replicas.primary, monotonic()
        async with AsyncExitStack() as stack:
            try:
                connection = await self._connect(node, stack)
                at_once = at_once and dialect.inserts_together(node.url)
                if at_once:  # each statement commits by itself then; to say so asks nobody
                    await connection.execution_options(isolation_level="AUTOCOMMIT")
                writer = Writer(connection, shard.number, places, url=node.url, at_once=at_once)
                async with connection.begin():
                    yield writer
                    writer.position = NEWEST
                writer.committed()
                writer.position = await self._position(connection)
            except dialect.ERRORS as error:
                if dialect.is_fenced(error):
                    self.map.doubt()
                    raise Unavailable("This data is being moved; try again.", code="shard_moving") from error
                _refuse(error, alive=node.answered_at > since)
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
                raise _all_in_use() from error
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


async def _fill(pool: AsyncEngine, size: int) -> None:
    """Have a pool open `size` connections, or none where the node is down, whose watcher says so."""

    async def connect() -> AsyncConnection:
        return await pool.connect()

    opened = await asyncio.gather(*(connect() for _ in range(size)), return_exceptions=True)
    for connection in opened:
        if isinstance(connection, AsyncConnection):
            await connection.close()


def _own(places: ShardMap, shard: int, owner: Column[Any]) -> ColumnElement[bool]:
    if places.move is None:
        return true()
    logical = dialect.logical_shard_of(owner)
    return or_(false(), *(logical.between(place.first, place.last) for place in places.held_by(shard)))


def _refuse(error: Exception, *, alive: bool) -> NoReturn:
    """Turn what befell a transaction into an error for the caller, or raise it again if its statement is wrong.

    Args:
        error: what was raised.
        alive: whether the primary has answered its watcher since the transaction began.
    """
    match dialect.trouble(error):
        case None:
            raise error
        case Trouble.BUSY:
            message = "Somebody else changes the same thing right now; try again."
            raise Unavailable(message, code="database_busy") from error
        case Trouble.SLOW if alive:
            raise _too_slow() from error
        case _:
            raise Unavailable("The database takes no writes right now; try again.", code="database_down") from error


def _all_in_use() -> Unavailable:
    return Unavailable("All connections to the database are in use; try again.", code="database_busy")


def _too_slow() -> TimedOut:
    return TimedOut("The database took too long; look before you repeat a change.", code="database_timeout")
