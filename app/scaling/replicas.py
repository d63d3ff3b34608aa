"""Which node answers a read: the replicas of a shard, what is known of each, and the choice among them.

Background tasks ask the primary several times a second where its log is, and every replica how far it has replayed, on
connections of their own, so that no request pays for a ping. A replica that fails, hangs or lags takes no reads, and
those that hang on it are sent elsewhere; it comes back by itself, the later the more often it has failed.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from app.core.settings import DatabaseSettings, ShardAddress
from app.core.telemetry import REPLICA_HEALTHY, REPLICA_LAG, logger
from app.scaling import dialect
from app.scaling.lag import Timeline

log = logger(__name__)

# A replica that answers its watcher and fails reads stays out this long after the first failure, twice as long after
# each further one, up to half a minute: a broken one then costs a read of every instance two tries a minute.
FIRST_OUT = 1.0  # seconds
LONGEST_OUT = 30.0  # seconds
# Lag is told exactly up to this many times the largest allowed one; past that it is only known to be too much.
HORIZONS = 2


@dataclass(slots=True, eq=False)
class Node:
    """A server that answers reads.

    Attributes:
        name: as `Server-Timing` shows it.
        engine: its pool.
        in_flight: statements that wait for a connection to it or for its answer.
        in_use: the driver's connections on which a statement waits for its answer.
    """

    name: str
    engine: AsyncEngine
    in_flight: int = 0
    in_use: set[Any] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Replica(Node):
    """A replica with what was last seen of it.

    Attributes:
        position: how far it has replayed, as it last said; after a crash it may be less than before.
        lag: seconds behind the primary.
        healthy: whether it takes reads.
        failures: reads that it has failed, one after the other, since it was last all right.
        out_until: moment (`time.monotonic`) before which it does not come back.
    """

    position: int = 0
    lag: float = 0.0
    healthy: bool = False
    failures: int = 0
    out_until: float = 0.0


Follow = Callable[[asyncio.Event], Awaitable[None]]


class ReplicaSet:
    """The replicas of one shard, watched.

    Args:
        shard: the shard's number, for logs and metrics.
        address: the URLs of its primary and replicas.
        settings: how often to ask and how much lag is too much.
    """

    def __init__(self, shard: int, address: ShardAddress, settings: DatabaseSettings) -> None:
        self._shard = str(shard)
        self._settings = settings
        self._address = address
        self._timeline = Timeline(HORIZONS * settings.replica_max_lag)
        self.replicas = tuple(
            Replica(name=name, engine=dialect.create_engine(url, settings, autocommit=True, name=name))
            for number, url in enumerate(address.replicas, start=1)
            for name in (f"replica-{number}",)
        )
        self._watchers: list[asyncio.Task[None]] = []
        self._primary_seen = True

    def choose(self, position: int, *, besides: Collection[Node] = ()) -> Replica | None:
        """Return a healthy replica that has replayed `position`: the less busy of two picked at random.

        Args:
            position: what the caller must see; 0 for anything.
            besides: nodes that have just failed the caller.
        """
        able = [
            replica
            for replica in self.replicas
            if replica.healthy and replica.position >= position and replica not in besides
        ]
        if len(able) <= 1:
            return able[0] if able else None
        return min(random.sample(able, 2), key=lambda replica: replica.in_flight)

    def failed(self, node: Node) -> None:
        """Take no more reads to `node` for a while, the longer the more often it has failed, then try it again."""
        if not isinstance(node, Replica) or not node.healthy:
            return
        now = monotonic()
        if now - node.out_until > LONGEST_OUT:
            node.failures = 0
        longest = min(LONGEST_OUT, FIRST_OUT * 2**node.failures)
        # Jittered, so that many instances do not come back to it in step.
        node.out_until = now + longest * random.uniform(0.5, 1)
        node.failures = min(node.failures + 1, 10)
        self._mark(node, healthy=False, reason="a read failed")

    async def start(self) -> None:
        """Look at each node once, then keep watching in the background. Without replicas there is nothing to watch."""
        if not self.replicas:
            return
        first_looks = [self._begin("primary", self._follow_primary, self._primary_lost)]
        first_looks += [
            self._begin(replica.name, partial(self._follow, replica, url), partial(self._lost, replica))
            for replica, url in zip(self.replicas, self._address.replicas, strict=True)
        ]
        await asyncio.gather(*(looked.wait() for looked in first_looks))

    async def stop(self) -> None:
        """End the watching and close the pools."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        for replica in self.replicas:
            await replica.engine.dispose()

    def _begin(self, name: str, follow: Follow, lost: Callable[[str], None]) -> asyncio.Event:
        """Watch a node from now on; the event says that it has been looked at once."""
        looked = asyncio.Event()
        watcher = self._watch(follow, lost, looked)
        self._watchers.append(asyncio.create_task(watcher, name=f"watch {name} of shard {self._shard}"))
        return looked

    async def _watch(self, follow: Follow, lost: Callable[[str], None], looked: asyncio.Event) -> None:
        while True:
            try:
                await follow(looked)
            except dialect.ERRORS as error:
                lost(type(error).__name__)
            looked.set()
            # Jittered, so that many instances do not come back to a recovering node in step.
            await asyncio.sleep(self._settings.replica_poll * random.uniform(1, 3))

    async def _follow_primary(self, looked: asyncio.Event) -> None:
        connection = await dialect.connect(self._address.primary, self._settings, name="watcher")
        try:
            position = await dialect.primary_state(connection)
            if position < self._timeline.latest:
                self._timeline.restart(position, monotonic())
            self._primary_seen = True
            while True:
                self._timeline.note(position, monotonic())
                looked.set()
                await asyncio.sleep(self._settings.replica_poll)
                position = await dialect.primary_state(connection)
        finally:
            with suppress(*dialect.ERRORS):
                dialect.cut(connection)

    async def _follow(self, replica: Replica, url: str, looked: asyncio.Event) -> None:
        connection = await dialect.connect(url, self._settings, name="watcher")
        try:
            while True:
                replayed, received = await dialect.replica_state(connection)
                now = monotonic()
                # While the primary cannot be asked, what one replica has received is what the others should have.
                self._timeline.note(received, now)
                replica.position = replayed
                self._judge(replica, self._timeline.behind(replayed, now), now)
                looked.set()
                await asyncio.sleep(self._settings.replica_poll)
        finally:
            with suppress(*dialect.ERRORS):
                dialect.cut(connection)

    def _judge(self, replica: Replica, lag: float, now: float) -> None:
        replica.lag = lag
        REPLICA_LAG.labels(self._shard, replica.name).set(lag)
        if lag > self._settings.replica_max_lag:
            self._mark(replica, healthy=False, reason=f"{lag:.1f} s behind")
        elif now >= replica.out_until:
            self._mark(replica, healthy=True, reason="answers")

    def _lost(self, replica: Replica, reason: str) -> None:
        self._mark(replica, healthy=False, reason=reason)
        # A server that hangs tells nobody. Cut off, the reads that wait for it are sent to another node at once instead
        # of after their own timeout, which has to be longer than the slowest honest answer.
        for driver_connection in tuple(replica.in_use):
            dialect.cut(driver_connection)

    def _primary_lost(self, reason: str) -> None:
        if self._primary_seen:
            log.warning("primary is not seen", shard=self._shard, reason=reason)
        self._primary_seen = False

    def _mark(self, replica: Replica, *, healthy: bool, reason: str) -> None:
        if replica.healthy != healthy:
            log.info("replica joins" if healthy else "replica leaves", node=replica.name, reason=reason)
        replica.healthy = healthy
        REPLICA_HEALTHY.labels(self._shard, replica.name).set(healthy)
