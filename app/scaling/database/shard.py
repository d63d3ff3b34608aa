"""One shard as reads and writes see it, and which of its rows are its own while a range is on its way.

Nothing here asks a server; what is known of the servers is the replica set's.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from prometheus_client import Counter
from sqlalchemy import Column, ColumnElement, false, or_, true

from app.core.telemetry import DATABASE_STATEMENTS, POOL_TIMEOUTS, POOL_WAITS
from app.scaling import dialect
from app.scaling.replicas import ReplicaSet
from app.scaling.sharding import ShardMap
from app.scaling.turns import Turns

CATALOG_SHARD = 0  # holds what belongs to no profile: directory, products, warehouses, stock, jobs

# Seconds a read waits for its turn at the primary: a burst passes in this time, an outage of the replicas does not.
PRIMARY_WAIT = 0.25


@dataclass(frozen=True, slots=True)
class Shard:
    """A primary with its replicas, and how many reads the primary takes at a time."""

    number: int
    replicas: ReplicaSet
    primary_reads: Turns


class Place(NamedTuple):
    """Where a read goes: a shard, and the position up to which its log holds what has moved there."""

    shard: Shard
    arrived: int


# To find a counter by its labels costs as much as to choose a replica; there are a few for each node.
@lru_cache
def statements_of(shard: int, node: str, outcome: str) -> Counter:
    """Return the counter of the statements that were sent to a node of a shard and came to that end."""
    return DATABASE_STATEMENTS.labels(str(shard), node, outcome)


@lru_cache
def waits_of(shard: int, node: str, pool: str) -> Counter:
    """Return the counter of those who found no free connection in a pool of a node: `read` or `write`."""
    return POOL_WAITS.labels(str(shard), node, pool)


@lru_cache
def timeouts_of(shard: int, node: str, pool: str) -> Counter:
    """Return the counter of those who were refused, as none became free in time."""
    return POOL_TIMEOUTS.labels(str(shard), node, pool)


def own(places: ShardMap, shard: int, owner: Column[Any]) -> ColumnElement[bool]:
    """Return the condition that a row, with its profile in `owner`, belongs to a shard.

    While a range is moved its rows are on two shards, and only one of them answers for it.
    """
    if places.move is None:
        return true()
    logical = dialect.logical_shard_of(owner)
    return or_(false(), *(logical.between(place.first, place.last) for place in places.held_by(shard)))
