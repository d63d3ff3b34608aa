"""Moves a range of logical shards to another database while reads and writes go on.

The copy is made behind the map's back: no process looks for the range at its target before the switch. What changes
meanwhile is noted by the source's own triggers and carried over, profile by profile, until so little is left that
writes can wait for it. The point of no return is one statement on the source. Whatever kills the mover, the map says
how far it was, and the next run goes on from there; each step may be repeated. A picture of the phases stands in
`docs/patterns/sharding.md`.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg
from sqlalchemy import BigInteger, Column, DateTime, Delete, Integer, Select, String, Table, Uuid, delete, select
from sqlalchemy.dialects import postgresql

from app.core.errors import Conflict, Unavailable
from app.scaling import dialect
from app.scaling.database import CATALOG_SHARD, Database, metadata, shard_map
from app.scaling.live_map import LEASE
from app.scaling.sharding import Move, Phase, Range, ShardMap

shard_fences = Table(
    "shard_fences",
    metadata,
    Column("logical", Integer, primary_key=True, autoincrement=False),
    Column("state", String(16), nullable=False),
    Column("until", DateTime(timezone=True)),
)
shard_changes = Table(
    "shard_changes",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=True),
    Column("profile_id", Uuid, nullable=False),
)

_POSTGRESQL = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it so

LOCK = 2_200_371_428_574  # the advisory lock of the one mover; the migrations' plus one
CHANGES = 1_000  # rows of the change log in one round: at most so many profiles in memory and in one statement
FEW = 50  # profiles that changed during a round; what is left then is carried over in well under a tenth of a second
# Writes that had looked at the map just before they were held end by themselves in this time, so that none is refused.
GRACE = 0.1  # seconds
HOLD = 0.7  # seconds that a hold may last; with the grace and the switch itself a write waits less than one second
TRIES = 10  # holds that may come to nothing, on a source that is never quiet for half a second
TRY_AGAIN = 2.0  # seconds between them, in which writes go on
WRITERS = 30.0  # seconds in which transactions that began before the watching must end; the server ends them earlier
LOOK = 0.01  # seconds between two looks at what is still running


class HoldLost(Exception):
    """The hold has run out before the range could be handed over; nothing has changed hands."""


@dataclass(frozen=True, slots=True)
class _Ends:
    """Connections to where a range comes from and where it goes to."""

    move: Move
    source: asyncpg.Connection
    target: asyncpg.Connection


class Mover:
    """Moves ranges, one at a time in the whole service.

    Args:
        database: knows the servers.
        patience: seconds after which no read that began before a switch is under way any more.
        say: told one line for each step.
    """

    def __init__(self, database: Database, patience: float, say: Callable[[str], None]) -> None:
        self._database = database
        self._patience = patience
        self._say = say
        self._tables = [table for table in metadata.sorted_tables if "profile_id" in table.primary_key.columns]

    async def move(self, first: int, last: int, target: int) -> int:
        """Move the logical shards `first` to `last`, wherever they are, to `target`; return how many moved.

        A move that was cut off is finished first, whatever was asked for now.

        Raises:
            Conflict: another mover is at work, or there is no such shard.
            Unavailable: a source is never quiet enough; run it again, nothing is lost.
        """
        if not 0 <= target < len(self._database.shards):
            known = len(self._database.shards)
            raise Conflict(f"There is no shard {target}; SHARDS names {known}, counted from 0.", code="no_such_shard")
        try:
            return await self._move(first, last, target)
        except dialect.ERRORS as error:
            raise Unavailable(
                f"A database was lost ({error}). Run the same again, and it goes on where it was.", code="database_down"
            ) from error

    async def _move(self, first: int, last: int, target: int) -> int:
        if any(not shard.replicas.primary.url.startswith("postgresql:") for shard in self._database.shards):
            raise Conflict("Logical shards are moved between PostgreSQL servers only.", code="engine_cannot_move")
        moved = 0
        async with self._connected(CATALOG_SHARD) as catalog:
            if not await catalog.fetchval("SELECT pg_try_advisory_lock($1)", LOCK):
                raise Conflict("Another `scaleout shards move` is at work; wait for its end.", code="mover_at_work")
            places = await self._read(catalog)
            if places.move is not None:
                self._say(f"A move was cut off while it was {places.move.phase}; it is finished first.")
                places = await self._carry_out(catalog, places)
            for part in places.parts(first, last):
                if part.shard != target:
                    announced = places.in_phase(Move(part, target, Phase.ANNOUNCED), Phase.ANNOUNCED)
                    places = await self._carry_out(catalog, await self._publish(catalog, announced))
                    moved += part.last - part.first + 1
        return moved

    async def _carry_out(self, catalog: asyncpg.Connection, places: ShardMap) -> ShardMap:
        """Take the map's move from the phase in which it is to its end."""
        steps = {
            Phase.ANNOUNCED: self._copy,
            Phase.COPIED: self._hold,
            Phase.HOLDING: self._switch,
            Phase.SWITCHED: self._clear,
        }
        tries = 0
        while (move := places.move) is not None:
            self._say(f"{_words(move)}: {move.phase}")
            pause = 0.0
            async with self._connected(move.place.shard) as source, self._connected(move.target) as target:
                try:
                    following = await steps[move.phase](_Ends(move, source, target), places)
                except HoldLost as error:
                    tries += 1
                    if tries == TRIES:
                        raise Unavailable(
                            "The source is never quiet for half a second; run this again later.",
                            code="too_busy",
                        ) from error
                    again = Phase.ANNOUNCED if move.phase is Phase.ANNOUNCED else Phase.COPIED
                    following = places.in_phase(move, again)
                    self._say(f"{_words(move)}: writes go on, another try follows ({error})")
                    pause = TRY_AGAIN
            places = await self._publish(catalog, following)
            await asyncio.sleep(pause)
        return places

    async def _copy(self, ends: _Ends, places: ShardMap) -> ShardMap:
        # From here on no process takes the range for settled: reads and writes of it ask the map first, and what goes
        # over all shards keeps rows apart that are on two.
        await asyncio.sleep(LEASE)
        place = ends.move.place
        await _fence(ends.target, place, "closed")
        async with _unfenced(ends.target):
            for table in self._tables:
                await ends.target.execute(_sql(delete(table).where(_within(table, place))))
        await ends.source.execute("DELETE FROM shard_changes")
        await _fence(ends.source, place, "watched")
        await _wait_for_writers(ends.source, WRITERS)
        for table in self._tables:
            async with _unfenced(ends.target):
                await _pipe(ends, table, select(table).where(_within(table, place)))
        return places.in_phase(ends.move, Phase.COPIED)

    async def _hold(self, ends: _Ends, places: ShardMap) -> ShardMap:
        while await self._catch_up(ends) > FEW:
            pass
        return places.in_phase(ends.move, Phase.HOLDING)

    async def _switch(self, ends: _Ends, places: ShardMap) -> ShardMap:
        # All of it again if a mover died after the handing over: nobody has written at either end since.
        place = ends.move.place
        await asyncio.sleep(GRACE)
        await _fence(ends.source, place, "held", seconds=HOLD)
        await _wait_for_writers(ends.source, HOLD)
        while await self._catch_up(ends):
            pass
        await ends.target.execute("DELETE FROM shard_fences WHERE logical BETWEEN $1 AND $2", place.first, place.last)
        async with ends.source.transaction():
            closed = await ends.source.fetch(
                "UPDATE shard_fences SET state = 'closed', until = NULL WHERE logical BETWEEN $1 AND $2 "
                "AND state = 'held' AND until > clock_timestamp() RETURNING logical",
                place.first,
                place.last,
            )
            if len(closed) != place.last - place.first + 1:
                raise HoldLost("the hold ran out")
        return places.switched(ends.move, await dialect.commit_position(ends.target))

    async def _clear(self, ends: _Ends, places: ShardMap) -> ShardMap:
        # Reads that found their way before the switch may still be at the source.
        await asyncio.sleep(self._patience)
        for table in self._tables:
            async with _unfenced(ends.source):
                await ends.source.execute(_sql(delete(table).where(_within(table, ends.move.place))))
        await ends.source.execute("DELETE FROM shard_changes")
        return places.settled()

    async def _catch_up(self, ends: _Ends) -> int:
        """Carry over the profiles that have changed, as they are now; return how many there were."""
        async with ends.source.transaction(isolation="repeatable_read", readonly=True):
            noted = await ends.source.fetch("SELECT id, profile_id FROM shard_changes ORDER BY id LIMIT $1", CHANGES)
            changed = {row["profile_id"] for row in noted}
            if not changed:
                return 0
            async with _unfenced(ends.target):
                for table in self._tables:
                    await ends.target.execute(_sql(delete(table).where(_of(table, changed))))
                    await _pipe(ends, table, select(table).where(_of(table, changed)))
        await ends.source.execute("DELETE FROM shard_changes WHERE id = ANY($1)", [row["id"] for row in noted])
        return len(changed)

    async def _read(self, catalog: asyncpg.Connection) -> ShardMap:
        row = await catalog.fetchrow(_sql(select(shard_map)))
        if row is None:
            raise Unavailable("There is no map of shards yet; run `scaleout migrate`.", code="not_migrated")
        return ShardMap.from_json(row["epoch"], json.loads(row["body"]))

    async def _publish(self, catalog: asyncpg.Connection, places: ShardMap) -> ShardMap:
        """Write the next map down, unless somebody else has written one since this one was read."""
        written = await catalog.fetchval(
            "UPDATE shard_map SET epoch = $1, body = $2 WHERE epoch = $1 - 1 RETURNING epoch",
            places.epoch,
            json.dumps(places.to_json()),
        )
        if written is None:
            raise Conflict("Somebody else has changed the map of shards; look at it.", code="map_changed")
        return places

    @asynccontextmanager
    async def _connected(self, shard: int) -> AsyncIterator[asyncpg.Connection]:
        """Open a connection to a shard's primary on which a statement may take as long as it takes."""
        connection = await asyncpg.connect(
            self._database.shards[shard].replicas.primary.url,
            server_settings={
                "application_name": "scaleout mover",
                "statement_timeout": "0",
                "idle_in_transaction_session_timeout": "0",
            },
        )
        async with AsyncExitStack() as stack:
            stack.push_async_callback(connection.close)
            yield connection


async def _fence(connection: asyncpg.Connection, place: Range, state: str, *, seconds: float | None = None) -> None:
    await connection.execute(
        "INSERT INTO shard_fences (logical, state, until) "
        "SELECT logical, $3, clock_timestamp() + make_interval(secs => $4) "
        "FROM generate_series($1::int, $2) AS logical "
        "ON CONFLICT (logical) DO UPDATE SET state = excluded.state, until = excluded.until",
        place.first,
        place.last,
        state,
        seconds,
    )


async def _wait_for_writers(connection: asyncpg.Connection, seconds: float) -> None:
    """Wait until every transaction that may have passed the fence as it was before has ended.

    Raises:
        HoldLost: one of them takes longer than that.
    """
    # As text: the driver knows no 64-bit transaction numbers.
    last = int(await connection.fetchval("SELECT pg_snapshot_xmax(pg_current_snapshot())::text"))
    try:
        async with asyncio.timeout(seconds):
            while True:
                oldest = await connection.fetchval("SELECT pg_snapshot_xmin(pg_current_snapshot())::text")
                if int(oldest) >= last:
                    return
                await asyncio.sleep(LOOK)
    except TimeoutError as error:
        raise HoldLost("a transaction goes on and on") from error


@asynccontextmanager
async def _unfenced(connection: asyncpg.Connection) -> AsyncIterator[None]:
    """Open a transaction whose rows the fence lets pass."""
    async with connection.transaction():
        await connection.execute("SET LOCAL scaleout.mover = 'on'")
        yield


async def _pipe(ends: _Ends, table: Table, rows: Select[Any]) -> None:
    """Copy rows of a table from the source into the target's transaction; neither side holds more than a few blocks."""
    blocks: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=16)

    async def read() -> None:
        await ends.source.copy_from_query(_sql(rows), output=blocks.put)
        await blocks.put(None)

    async def written() -> AsyncIterator[bytes]:
        while (block := await blocks.get()) is not None:
            yield block

    columns = [column.name for column in table.columns]
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(read())
            group.create_task(ends.target.copy_to_table(table.name, source=written(), columns=columns))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from errors


def _within(table: Table, place: Range) -> Any:
    return dialect.logical_shard_of(table.c.profile_id).between(place.first, place.last)


def _of(table: Table, owners: Collection[UUID]) -> Any:
    return table.c.profile_id.in_(sorted(owners))


def _sql(statement: Select[Any] | Delete) -> str:
    return str(statement.compile(dialect=_POSTGRESQL, compile_kwargs={"literal_binds": True}))


def _words(move: Move) -> str:
    return f"{move.place.first}-{move.place.last} from shard {move.place.shard} to {move.target}"
