"""Reads: each statement by itself, on the best node that has replayed what the caller must see.

A node that is lost under a statement costs the caller a second one, not an error. The primary answers what no replica
can, and only as many at a time as leave it its writes.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import Any

from sqlalchemy import Executable, Row
from sqlalchemy.exc import TimeoutError as PoolTimeout

from app.core import context
from app.core.context import NEWEST
from app.core.errors import Unavailable
from app.core.telemetry import DATABASE_FALLBACKS, DATABASE_STATEMENTS
from app.scaling import dialect
from app.scaling.database.refusals import all_in_use, too_slow
from app.scaling.database.shard import Place, Shard
from app.scaling.dialect import Trouble
from app.scaling.replicas import Node

# Replicas that one read may lose before it asks the primary: two, because replicas that share a machine or a restart
# die together, sooner than any watcher sees it.
REPLICA_TRIES = 2

# Seconds a read waits for its turn at the primary: a burst passes in this time, an outage of the replicas does not.
PRIMARY_WAIT = 0.25


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
                    raise too_slow() from error
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
            raise all_in_use() from error
        finally:
            node.in_flight -= 1
            DATABASE_STATEMENTS.labels(str(shard.number), name, outcome).inc()
        return rows
