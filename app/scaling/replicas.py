"""Which node answers a read: the replicas of a shard, what is known of each, and the choice among them.

A background task asks every replica several times a second how far it has replayed, on a connection of its own, so
that no request pays for a ping. A replica that fails or lags takes no reads until it has answered again.
"""

import asyncio
import random
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncEngine

from app.core.settings import DatabaseSettings
from app.core.telemetry import REPLICA_HEALTHY, REPLICA_LAG, logger
from app.scaling import dialect

log = logger(__name__)


@dataclass(slots=True, eq=False)
class Node:
    """A server that answers reads. `in_flight` counts the statements that it is working on for this process."""

    name: str
    engine: AsyncEngine
    in_flight: int = 0


@dataclass(slots=True, eq=False)
class Replica(Node):
    """A replica with what was last seen of it.

    Attributes:
        position: how far it has replayed; it never goes back while the process lives.
        lag: seconds behind the primary.
        healthy: whether it takes reads.
    """

    position: int = 0
    lag: float = 0.0
    healthy: bool = False


class ReplicaSet:
    """The replicas of one shard, watched.

    Args:
        shard: the shard's number, for logs and metrics.
        urls: one URL for each replica.
        settings: how often to ask and how much lag is too much.
    """

    def __init__(self, shard: int, urls: Iterable[str], settings: DatabaseSettings) -> None:
        self._shard = str(shard)
        self._settings = settings
        self._urls = tuple(urls)
        self.replicas = tuple(
            Replica(name=name, engine=dialect.create_engine(url, settings, autocommit=True, name=name))
            for number, url in enumerate(self._urls, start=1)
            for name in (f"replica-{number}",)
        )
        self._watchers: list[asyncio.Task[None]] = []

    def choose(self, position: int, *, besides: Node | None = None) -> Replica | None:
        """Return a healthy replica that has replayed `position`: the less busy of two picked at random.

        Args:
            position: what the caller must see; 0 for anything.
            besides: a node that has just failed the caller.
        """
        able = [
            replica
            for replica in self.replicas
            if replica.healthy and replica.position >= position and replica is not besides
        ]
        if len(able) <= 1:
            return able[0] if able else None
        return min(random.sample(able, 2), key=lambda replica: replica.in_flight)

    def failed(self, node: Node) -> None:
        """Take no more reads to `node` until it answers its watcher again."""
        if isinstance(node, Replica) and node.healthy:
            self._mark(node, healthy=False, reason="a read failed")

    async def start(self) -> None:
        """Look at each replica once, then keep watching in the background."""
        first_looks = [asyncio.Event() for _ in self.replicas]
        self._watchers = [
            asyncio.create_task(self._watch(replica, url, looked), name=f"watch {replica.name} of shard {self._shard}")
            for replica, url, looked in zip(self.replicas, self._urls, first_looks, strict=True)
        ]
        await asyncio.gather(*(looked.wait() for looked in first_looks))

    async def stop(self) -> None:
        """End the watching and close the pools."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        for replica in self.replicas:
            await replica.engine.dispose()

    async def _watch(self, replica: Replica, url: str, looked: asyncio.Event) -> None:
        while True:
            try:
                await self._follow(replica, url, looked)
            except (OSError, TimeoutError) as error:
                self._mark(replica, healthy=False, reason=type(error).__name__)
            except dialect.DRIVER_ERRORS as error:
                self._mark(replica, healthy=False, reason=type(error).__name__)
            looked.set()
            # Jittered, so that many instances do not come back to a recovering replica in step.
            await asyncio.sleep(self._settings.replica_poll * random.uniform(1, 3))

    async def _follow(self, replica: Replica, url: str, looked: asyncio.Event) -> None:
        connection = await dialect.connect(url, self._settings, name="watcher")
        # Behind since when, and what it had received by then. The server's own clock of replayed commits would count
        # the time in which nothing was committed as lag.
        waiting_for, since = 0, 0.0
        try:
            while True:
                replayed, received = await dialect.replica_state(connection)
                now = asyncio.get_running_loop().time()
                if replayed >= waiting_for:
                    waiting_for, since = received, now
                lag = now - since if replayed < waiting_for else 0.0
                replica.position = max(replica.position, replayed)
                replica.lag = lag
                REPLICA_LAG.labels(self._shard, replica.name).set(lag)
                behind = lag > self._settings.replica_max_lag
                self._mark(replica, healthy=not behind, reason=f"{lag:.1f} s behind" if behind else "answers")
                looked.set()
                await asyncio.sleep(self._settings.replica_poll)
        finally:
            with suppress(*dialect.DRIVER_ERRORS, OSError):
                connection.terminate()

    def _mark(self, replica: Replica, *, healthy: bool, reason: str) -> None:
        if replica.healthy != healthy:
            log.info("replica joins" if healthy else "replica leaves", node=replica.name, reason=reason)
        replica.healthy = healthy
        REPLICA_HEALTHY.labels(self._shard, replica.name).set(healthy)
