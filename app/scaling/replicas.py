"""The servers of one shard: which one is the primary, what is known of the others, and which one answers a read.

Background tasks ask every server several times a second what it is and how far its log is, on connections of their own,
so that no request pays for a ping. A server that hangs is cut off from those that wait for it. A replica that fails,
hangs or lags takes no reads; it comes back by itself, the later the more often it has failed. A replica that was
promoted is the primary from the moment it says so.
"""

import asyncio
import random
from collections.abc import Collection
from contextlib import suppress
from time import monotonic

from app.core.settings import DatabaseSettings, ShardAddress
from app.core.telemetry import POOL_IN_USE, POOL_SIZE, REPLICA_HEALTHY, REPLICA_LAG, logger
from app.scaling import dialect
from app.scaling.lag import Timeline
from app.scaling.node import Node

log = logger(__name__)

# A replica that answers its watcher and fails reads stays out this long after the first failure, twice as long after
# each further one, up to half a minute: a broken one then costs a read of every instance two tries a minute.
FIRST_OUT = 1.0  # seconds
LONGEST_OUT = 30.0  # seconds
# Lag is told exactly up to this many times the largest allowed one; past that it is only known to be too much.
HORIZONS = 2


class ReplicaSet:
    """The primary and the replicas of one shard, watched.

    Args:
        shard: the shard's number, for logs and metrics.
        address: the URLs of the servers; the first is taken for the primary until one of them says that it is.
        settings: how often to ask and how much lag is too much.
    """

    def __init__(self, shard: int, address: ShardAddress, settings: DatabaseSettings) -> None:
        self._shard = str(shard)
        self._settings = settings
        self._timeline = Timeline(HORIZONS * settings.replica_max_lag)
        self.nodes = tuple(
            Node.at(url, f"replica-{number}", settings)
            for number, url in enumerate((address.primary, *address.replicas))
        )
        self.primary = self.nodes[0]
        self.replicas = self.nodes[1:]
        # Up to here the log of the primary is also the log of the primaries before it.
        self._shared = 0
        self._watchers: list[asyncio.Task[None]] = []
        self._unseen = set(self.nodes)

    @property
    def takes_writes(self) -> bool:
        """Whether the primary has answered its watcher the last time, and as a primary."""
        return self.primary.answers and self.primary.claims

    def name_of(self, node: Node) -> str:
        """Return the name of a node as `Server-Timing` shows it: of the primary, its part."""
        return "primary" if node is self.primary else node.name

    def choose(self, position: int, *, besides: Collection[Node] = ()) -> Node | None:
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
        if node is self.primary or not node.healthy:
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
        """Look at each node once, then keep watching in the background."""
        looked_at = [asyncio.Event() for _ in self.nodes]
        for node, looked in zip(self.nodes, looked_at, strict=True):
            watching = asyncio.create_task(self._watch(node, looked), name=f"watch {node.name} of shard {self._shard}")
            self._watchers.append(watching)
        await asyncio.gather(*(looked.wait() for looked in looked_at))

    async def stop(self) -> None:
        """End the watching and close the pools."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        for node in self.nodes:
            await node.close()

    async def _watch(self, node: Node, looked: asyncio.Event) -> None:
        while True:
            try:
                await self._follow(node, looked)
            except dialect.ERRORS as error:
                self._lost(node, error)
                self._tell_of_pools(node)
            looked.set()
            # Jittered, so that many instances do not come back to a recovering node in step.
            await asyncio.sleep(self._settings.replica_poll * random.uniform(1, 3))

    async def _follow(self, node: Node, looked: asyncio.Event) -> None:
        connection = await dialect.connect(node.url, self._settings, self._settings.watch_timeout, name="watcher")
        try:
            while True:
                self._learn(node, await dialect.state(connection), monotonic())
                self._tell_of_pools(node)
                looked.set()
                await asyncio.sleep(self._settings.replica_poll)
        finally:
            with suppress(*dialect.ERRORS):
                dialect.cut(connection)

    def _tell_of_pools(self, node: Node) -> None:
        """Tell how full the pools are; counted here, as each statement would pay for it."""
        size, name = self._settings.connections, self.name_of(node)
        used = {"read": min(node.in_flight, size)}
        if node is self.primary:
            used["write"] = node.writes.in_use
        for pool, connections in used.items():
            POOL_SIZE.labels(self._shard, name, pool).set(size)
            POOL_IN_USE.labels(self._shard, name, pool).set(connections)

    def _learn(self, node: Node, state: dialect.State, now: float) -> None:
        returned = not node.answers
        node.claims, node.answers, node.answered_at = state.is_primary, True, now
        # A server never goes back to an older history; it only forgets which it follows while nobody sends it the log.
        node.history = max(node.history, state.history) if state.history else 0
        if not state.is_primary:
            node.position = state.position
        self._unseen.discard(node)
        self._elect(now)
        if node is self.primary:
            if returned:
                log.info("primary is seen", shard=self._shard, node=node.name, takes_writes=node.claims)
            if returned and node.claims and state.position < self._timeline.latest:
                self._timeline.restart(state.position, now)
            elif node.claims:
                self._timeline.note(state.position, now)
        elif state.is_primary:
            self._mark(node, healthy=False, reason="is a primary of an older history")
        else:
            self._judge(node, state.received, now)

    def _elect(self, now: float) -> None:
        """Find out which node is the primary. Of several the newest history is right: the others were given up."""
        if self._unseen:
            return
        claiming = [node for node in self.nodes if node.claims]
        best = max(claiming, key=lambda n: (n.history, n.answers, n is self.primary), default=self.primary)
        if best is self.primary:
            return
        log.warning("primary changes", shard=self._shard, before=self.primary.name, now=best.name)
        # Whoever waits for the one before waits in vain: nothing that it still says counts.
        self._cut(self.primary)
        best.healthy = False
        with suppress(KeyError):  # it may never have been one
            REPLICA_HEALTHY.remove(self._shard, best.name)
            REPLICA_LAG.remove(self._shard, best.name)
            POOL_IN_USE.remove(self._shard, best.name, "read")
        self.primary = best
        self.replicas = tuple(node for node in self.nodes if node is not best)
        self._shared = best.position
        self._timeline.restart(best.position, now)

    def _follows(self, replica: Node) -> bool:
        """Say whether the log that a replica shows is the primary's, as far as it has replayed it.

        One that stayed with a primary of before may have replayed what the present one never had; positions of the two
        logs must not be compared past where they parted.
        """
        if not replica.history or not self.primary.history or replica.history >= self.primary.history:
            return True
        return replica.position <= self._shared

    def _judge(self, replica: Node, received: int, now: float) -> None:
        follows = self._follows(replica)
        # While the primary cannot be asked, what one replica has received is what the others should have.
        if follows:
            self._timeline.note(received, now)
        replica.lag = lag = self._timeline.behind(replica.position, now)
        REPLICA_LAG.labels(self._shard, replica.name).set(lag)
        if not follows:
            self._mark(replica, healthy=False, reason="follows a primary of before")
        elif lag > self._settings.replica_max_lag:
            self._mark(replica, healthy=False, reason=f"{lag:.1f} s behind")
        elif now >= replica.out_until:
            self._mark(replica, healthy=True, reason="answers")

    def _lost(self, node: Node, error: Exception) -> None:
        reason = type(error).__name__
        if node is not self.primary:
            self._mark(node, healthy=False, reason=reason)
        elif node.answers:
            log.warning("primary is not seen", shard=self._shard, node=node.name, reason=reason)
        node.answers = False
        self._unseen.discard(node)
        self._elect(monotonic())
        # A server that hangs tells nobody. Cut off, those who wait for it are sent to another node, or told that there
        # is none, instead of after their own timeout, which has to be longer than the slowest honest answer.
        if isinstance(error, TimeoutError):
            self._cut(node)

    def _cut(self, node: Node) -> None:
        for driver_connection in tuple(node.in_use):
            dialect.cut(driver_connection)

    def _mark(self, replica: Node, *, healthy: bool, reason: str) -> None:
        if replica.healthy != healthy:
            log.info("replica joins" if healthy else "replica leaves", node=replica.name, reason=reason)
        replica.healthy = healthy
        REPLICA_HEALTHY.labels(self._shard, replica.name).set(healthy)
