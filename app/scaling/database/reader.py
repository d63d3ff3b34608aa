"""Reads: each statement by itself, on the best node that has replayed what the caller must see.

A node that is lost under a statement costs the caller a second one, not an error. The primary answers what no replica
can, and only as many at a time as leave it its writes.
"""

from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from time import monotonic
from typing import Any

from prometheus_client import Counter
from sqlalchemy import Executable, Row
from sqlalchemy.exc import TimeoutError as PoolTimeout

from app.core import context
from app.core.context import NEWEST
from app.core.errors import Unavailable
from app.core.telemetry import DATABASE_FALLBACKS, DATABASE_RETRIES
from app.scaling import dialect
from app.scaling.database.refusals import all_in_use, too_slow
from app.scaling.database.shard import Place, Shard, statements_of, timeouts_of, waits_of
from app.scaling.dialect import Trouble
from app.scaling.lookup import Lookup
from app.scaling.node import Node

# Replicas that one read may lose before it asks the primary: two, because replicas that share a machine or a restart
# die together, sooner than any watcher sees it.
REPLICA_TRIES = 2

_Ask = Callable[[Node], Awaitable[Sequence[Any]]]


class Reader:
    """Statements that change nothing, each on the best node at that moment, each one round trip.

    A statement whose node is lost under it is sent again, to another node. Do not build one: `database.reader`.
    """

    def __init__(self, find: Callable[[], Awaitable[Place]], *, newest: bool = False) -> None:
        self._find = find
        self._newest = newest

    async def all(self, statement: Executable) -> Sequence[Row[Any]]:
        """Return all rows."""
        return await self._run(lambda node: node.all(statement))

    async def first(self, statement: Executable) -> Row[Any] | None:
        """Return the first row, or None."""
        rows = await self.all(statement)
        return rows[0] if rows else None

    async def find(self, lookup: Lookup, **values: Any) -> Any:
        """Return the first row of a lookup with these values, its columns as attributes, or None."""
        rows = await self._run(lambda node: node.find(lookup, values))
        return rows[0] if rows else None

    async def _run(self, ask: _Ask) -> Sequence[Any]:
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
                    return await self._send(shard, replica, ask)
                return await self._ask_primary(shard, ask, failover=bool(lost))
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
                DATABASE_RETRIES.labels(str(shard.number)).inc()

    async def _ask_primary(self, shard: Shard, ask: _Ask, *, failover: bool) -> Sequence[Any]:
        nodes = shard.replicas
        able = any(replica.healthy for replica in nodes.replicas)
        reason = "failover" if failover else "position" if able else "no_replica"
        _fallbacks_of(shard.number, reason).inc()
        if nodes.primary.answers and not nodes.primary.claims:
            raise Unavailable("The database has no primary right now; try again.", code="database_down")
        # The cap keeps an outage of the replicas from turning into one of the primary.
        try:
            await shard.primary_reads.take()
        except TimeoutError as error:
            raise Unavailable("Too many reads wait for the primary; try again.", code="read_capacity") from error
        try:
            return await self._send(shard, nodes.primary, ask)
        finally:
            shard.primary_reads.give()

    async def _send(self, shard: Shard, node: Node, ask: _Ask) -> Sequence[Any]:
        name = shard.replicas.name_of(node)
        node.in_flight += 1
        if node.reads.full:
            waits_of(shard.number, name, "read").inc()
        outcome = "error"
        try:
            with context.current().timed("db", name):
                rows = await ask(node)
            outcome = "ok"
        except PoolTimeout as error:
            timeouts_of(shard.number, name, "read").inc()
            raise all_in_use() from error
        finally:
            node.in_flight -= 1
            statements_of(shard.number, name, outcome).inc()
        return rows


@lru_cache
def _fallbacks_of(shard: int, reason: str) -> Counter:
    return DATABASE_FALLBACKS.labels(str(shard), reason)
