"""The capacity model: from a load and from what was measured to machines, processes, pools, connections and memory.

Pure sums, each of which also says in a sentence how it was made, so that a reader can disagree with one of them. What
was measured comes in from `figures`; what is assumed or follows from Terraform stands at the top.
"""

import math
from dataclasses import dataclass

from app.core.settings import DatabaseSettings, RedisSettings, WorkerSettings
from app.scaling import events
from app.scaling.budget import Fleet, misfits, most_of_a_process
from app.scaling.dialect import Limits
from deploy.capacity import ImpossibleError
from deploy.capacity.figures import MICROSECOND, Figures

# Headroom. An Auto Scaling group aims at TARGET; with one machine gone the others may go up to MOST.
TARGET, MOST = 0.6, 0.9
# The benches ask for one small answer, from the core beside. A route past the hot path costs about twice as much (what
# `make bench-overload` asks for), and NGINX, TLS, pages of lists and slower cores come on top.
BESIDES = 3.0

# Assumed. Change them to your own and run it again.
STATEMENTS_OF_A_CORE = 1_000  # a second, by key, at a load that leaves room for a lost server
STATEMENTS_OF_A_WRITE = 3
READ_HOLDS, WRITE_HOLDS = 0.005, 0.02  # seconds for which a connection is taken, when the server is busy
REQUESTS_OF_A_REDIS = 15_000  # a second: about five small commands each, two thirds of what one thread answers
CALLERS_OF_A_REQUEST = 60  # each signed-in person asks once a minute while the session lives
CACHED_SECONDS = 300  # for which a value stays, the longest of the cache's times
VALUE_BYTES = 3_000  # of a cached value with its key: a profile has half a kilobyte, a page of a list ten
CALLER_BYTES = 2_000  # of a session with its index, positions and limits
EVENT_BYTES, MESSAGE_BYTES = 600, 1_500  # of an entry of the stream, of a message of the broker
CLIENTS_OF_A_REDIS = 65_000  # ElastiCache's maxclients
OUTAGE_SECONDS = 3600  # for which the workers may be away
COPIES = 8  # of a waiting message by the end of that: the relay publishes again what nobody has done
MESSAGES_OF_AN_ORDER = 6  # rows of the outbox until its mail is sent

# Terraform's own numbers.
CORES = 2  # of a machine of the groups
FEWEST = 2  # machines of a group
REPLICAS = 2
CONNECTIONS = 1_515  # max_connections of a server, less those that PostgreSQL and RDS keep back
DATABASES = {"db.m7g.large": 2, "db.m7g.xlarge": 4, "db.m7g.2xlarge": 8, "db.m7g.4xlarge": 16}  # cores
SMALL_DATABASE, SMALL_REDIS, SMALL_MACHINE = "db.t4g.medium", "cache.t4g.small", "t4g.small"
MACHINE = "c7g.large"
# Bytes, as AWS documents them for each type.
MEMORY = {SMALL_REDIS: 1.37e9, "cache.m7g.large": 6.38e9, "cache.m7g.xlarge": 12.93e9}


@dataclass(frozen=True, slots=True)
class Demand:
    """A load: requests a second at the peak, and what they are.

    Attributes:
        requests: a second, above 0.
        hit_rate: share of the reads that the cache answers.
        read_share: share of the requests that read.
        order_share: share of the writes that place an order.

    Raises:
        ImpossibleError: one of them cannot be, and which.
    """

    requests: float
    hit_rate: float = 0.7
    read_share: float = 0.9
    order_share: float = 0.1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.requests) and self.requests > 0):
            raise ImpossibleError(f"--rps is {self.requests:g}; it must be a number of requests a second above 0.")
        for name, share in (
            ("hit-rate", self.hit_rate),
            ("read-share", self.read_share),
            ("order-share", self.order_share),
        ):
            if not 0 <= share <= 1:  # also what is no number
                raise ImpossibleError(f"--{name} is {share:g}; it is a share, so it must lie between 0 and 1.")

    @property
    def hits(self) -> float:
        """Reads a second that the cache answers."""
        return self.requests * self.read_share * self.hit_rate

    @property
    def misses(self) -> float:
        """Reads a second that a replica answers."""
        return self.requests * self.read_share * (1 - self.hit_rate)

    @property
    def writes(self) -> float:
        """Writes a second."""
        return self.requests * (1 - self.read_share)

    @property
    def orders(self) -> float:
        """Orders a second."""
        return self.writes * self.order_share


@dataclass(frozen=True, slots=True)
class Installation:
    """What one load needs.

    Attributes:
        requests: a second, at the peak.
        machine: type of the machines.
        api: machines that serve, with an instance for each core.
        workers: machines that work, with a worker for each core and a relay.
        database: class of each primary, which is doubled, and of each replica.
        shards: primaries.
        replicas: of each primary.
        redis: type of each Redis node.
        redis_shards: parts that each of the two Redis is divided into; above 1, a Redis Cluster.
        pool_size: DATABASE_POOL_SIZE of each process.
        fleet: the processes that open connections.
        connections: that all of them may open on one database server.
        allowed: connections that one server allows.
        kept: bytes in the Redis of sessions, limits, events and the broker.
        cached: bytes in the Redis of the cache.
        steps: how all this was reckoned, in sentences.
    """

    requests: float
    machine: str
    api: int
    workers: int
    database: str
    shards: int
    replicas: int
    redis: str
    redis_shards: int
    pool_size: int
    fleet: Fleet
    connections: int
    allowed: int
    kept: float
    cached: float
    steps: tuple[str, ...]

    @property
    def instances(self) -> int:
        """Processes of the API."""
        return self.api * CORES

    @property
    def worker_processes(self) -> int:
        """Workers; each has WORKER_CONCURRENCY children."""
        return self.workers * CORES


def plan(demand: Demand, figures: Figures, *, allowed: int = CONNECTIONS, pooler: bool = False) -> Installation:
    """Return what a load needs.

    Args:
        demand: the load.
        figures: what was measured.
        allowed: connections that each database server allows the service.
        pooler: whether PgBouncer stands before each server.

    Raises:
        ImpossibleError: the connections do not fit, and what to change.
    """
    if allowed < 1:
        raise ImpossibleError(f"--connections is {allowed}; it must be at least 1.")
    mix = (
        f"{demand.requests:,.0f} requests a second are {demand.hits:,.0f} reads from the cache, {demand.misses:,.0f} "
        f"reads from a replica and {demand.writes:,.0f} writes, {demand.orders:,.1f} of them orders."
    )
    api, cores, of_api = _api(demand, figures)
    workers, of_workers = _workers(demand, figures)
    small = cores < CORES * TARGET / 4
    database, shards, replicas, of_databases = _databases(demand, small=small)
    # A quarter more instances in a roll-out, and a chore.
    surge = math.ceil(api / 4) * CORES
    children = workers * CORES * int(WorkerSettings.model_fields["concurrency"].default)
    fleet = Fleet(api * CORES, surge, children, workers, chores=1)
    pool, connections, of_connections = _connections(demand, fleet, allowed, pooler=pooler)
    kept, cached = _memory(demand)
    redis, redis_shards, of_redis = _redis(demand, kept, cached, fleet, small=small)
    return Installation(
        requests=demand.requests,
        machine=SMALL_MACHINE if small else MACHINE,
        api=api,
        workers=workers,
        database=database,
        shards=shards,
        replicas=replicas,
        redis=redis,
        redis_shards=redis_shards,
        pool_size=pool,
        fleet=fleet,
        connections=connections,
        allowed=allowed,
        kept=kept,
        cached=cached,
        steps=(mix, *of_api, *of_workers, *of_databases, *of_connections, *of_redis),
    )


def _machines(cores: float) -> int:
    """Return how many machines carry so much work: at TARGET of all of them, and at MOST when one is gone."""
    return max(FEWEST, math.ceil(cores / (CORES * TARGET)), 1 + math.ceil(cores / (CORES * MOST)))


def _api(demand: Demand, figures: Figures) -> tuple[int, float, list[str]]:
    spent = (
        demand.hits * figures.hit.value + demand.misses * figures.miss.value + demand.writes * figures.write.value
    ) * MICROSECOND
    cores = spent * BESIDES
    machines = _machines(cores)
    return (
        machines,
        cores,
        [
            (
                f"At {figures.hit.value:,.0f}, {figures.miss.value:,.0f} and {figures.write.value:,.0f} us of CPU, "
                f"as measured, they cost {spent:.2f} cores; times {BESIDES:g} for dearer routes, NGINX, TLS and slower "
                f"machines: {cores:.2f} cores."
            ),
            (
                f"Headroom: at most {TARGET:.0%} of all machines' {CORES} cores, at most {MOST:.0%} when one machine "
                f"is gone, never fewer than {FEWEST} machines: {machines} API machines, {machines * CORES} instances."
            ),
        ],
    )


def _workers(demand: Demand, figures: Figures) -> tuple[int, list[str]]:
    needed = demand.orders / figures.worker.value
    machines = _machines(needed)
    messages = demand.orders * MESSAGES_OF_AN_ORDER + demand.writes
    # A relay runs on each of these machines; more than one of them is only ever needed far beyond that.
    relays = math.ceil(messages / (figures.relay.value * TARGET))
    machines = max(machines, relays)
    return machines, [
        (
            f"A worker carries {figures.worker.value:g} orders a second to their end, as measured, so "
            f"{demand.orders:,.1f} take {needed:.2f} workers; with the same headroom {machines} worker "
            f"machines, {machines * CORES} workers."
        ),
        (
            f"A relay publishes {figures.relay.value:,.0f} messages a second, as measured; {messages:,.0f} need "
            f"{relays}, and each worker machine has one: {machines}."
        ),
    ]


def _databases(demand: Demand, *, small: bool) -> tuple[str, int, int, list[str]]:
    written = demand.writes * STATEMENTS_OF_A_WRITE
    largest = max(DATABASES.values()) * STATEMENTS_OF_A_CORE
    shards = max(1, math.ceil(written / largest))
    on_primary, on_replicas = written / shards, demand.misses / shards
    busiest = max(on_primary, min(on_replicas / (REPLICAS - 1), largest))
    name = next(name for name, cores in DATABASES.items() if busiest <= cores * STATEMENTS_OF_A_CORE)
    each = DATABASES[name] * STATEMENTS_OF_A_CORE
    replicas = max(REPLICAS, 1 + math.ceil(on_replicas / each))
    if small and busiest <= STATEMENTS_OF_A_CORE:
        name = SMALL_DATABASE
    reach = "one primary" if shards == 1 else f"{shards} shards"
    return (
        name,
        shards,
        replicas,
        [
            (
                f"The primary writes {written:,.0f} statements a second ({STATEMENTS_OF_A_WRITE} a write) and the "
                f"replicas answer {demand.misses:,.0f}; a core is assumed to do {STATEMENTS_OF_A_CORE:,}. With one "
                f"replica gone the others must still do: {reach} of class {name} with a standby, {replicas} replicas "
                f"each."
            ),
        ],
    )


def _connections(demand: Demand, fleet: Fleet, allowed: int, *, pooler: bool) -> tuple[int, int, list[str]]:
    busy = max(demand.misses * READ_HOLDS, demand.writes * WRITE_HOLDS) / fleet.instances
    fewest = max(2, math.ceil(busy / TARGET))
    usual = max(fewest, _pools(None, pooler=pooler).connections)
    for size in range(usual, fewest - 1, -1):
        settings = _pools(size, pooler=pooler)
        if not misfits("each server", Limits(allowed, ()), fleet, settings):
            break
    else:
        each = most_of_a_process(_pools(fewest, pooler=pooler))
        raise ImpossibleError(
            f"{fleet.processes} processes with pools of {fewest}, the fewest that carry this load, need "
            f"{fleet.processes * each:,} connections on each database server, which allows {allowed:,}; put PgBouncer "
            f"before each (--pooler), or raise max_connections by {fleet.processes * each - allowed:,}."
        )
    each = most_of_a_process(settings)
    connections = fleet.processes * each
    said = [
        (
            f"A process has on average {busy:.2f} connections in use at the peak, so a pool of {fewest} would carry "
            f"it; DATABASE_POOL_SIZE={size} is planned, {usual} would be usual."
        ),
        f"{fleet.processes} processes in a roll-out ({fleet.instances} instances, {fleet.surge} new ones, "
        f"{fleet.worker_children} workers' children, {fleet.relays} relays, {fleet.chores} chore, 1 by hand) x {each} "
        f"(two pools and a watcher) = {connections:,} connections a server, which allows {allowed:,}"
        + ("; PgBouncer lends them out: max_client_conn must be at least the former." if pooler else "."),
    ]
    return size, connections, said


def _pools(size: int | None, *, pooler: bool) -> DatabaseSettings:
    # Each is given, so that nothing of it comes from the environment of whoever asks.
    given = {"cores": 2, "spindles": 1, "pool_size": size, "pooler": "transaction" if pooler else "none"}
    return DatabaseSettings.model_validate(given)


def _memory(demand: Demand) -> tuple[float, float]:
    """Return the bytes of what Redis keeps and of what it caches."""
    callers = demand.requests * CALLERS_OF_A_REQUEST
    waiting = demand.orders * OUTAGE_SECONDS * COPIES
    kept = callers * CALLER_BYTES + events.KEPT * EVENT_BYTES + waiting * MESSAGE_BYTES
    return kept, demand.misses * CACHED_SECONDS * VALUE_BYTES


def _redis(demand: Demand, kept: float, cached: float, fleet: Fleet, *, small: bool) -> tuple[str, int, list[str]]:
    largest = max(MEMORY.values()) * TARGET
    bytes_ = max(kept, cached)
    shards = max(1, math.ceil(bytes_ / largest), math.ceil(demand.requests / REQUESTS_OF_A_REDIS))
    types = [name for name in MEMORY if small or name != SMALL_REDIS]
    name = next(name for name in types if bytes_ / shards <= MEMORY[name] * TARGET)
    parts = "" if shards == 1 else f", each divided into {shards} as a Redis Cluster"
    links = fleet.processes * int(RedisSettings.model_fields["connections"].default)
    if links > CLIENTS_OF_A_REDIS:
        raise ImpossibleError(
            f"{fleet.processes} processes may open {links:,} connections to a Redis, which allows "
            f"{CLIENTS_OF_A_REDIS:,}; set REDIS_CONNECTIONS={CLIENTS_OF_A_REDIS // fleet.processes}, or split the load "
            f"over regions and plan each of them."
        )
    return (
        name,
        shards,
        [
            (
                f"Redis keeps {demand.requests * CALLERS_OF_A_REQUEST:,.0f} sessions (one request a minute each), the "
                f"stream's {events.KEPT:,} events and what an hour without workers leaves in the broker: "
                f"{kept / 1e9:.2f} GB. The cache holds what was loaded in the last {CACHED_SECONDS} s: "
                f"{cached / 1e9:.2f} GB. Filled to {TARGET:.0%}: two Redis of two {name} nodes{parts}."
            ),
            f"All processes together may open {links:,} connections to a Redis, which allows {CLIENTS_OF_A_REDIS:,}.",
        ],
    )
