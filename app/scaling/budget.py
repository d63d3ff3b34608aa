"""The connection budget: what a fleet of processes may open on each server, against what the server allows.

Pools are bounded, so the most that can be open is known before anything is started. What does not fit is refused with
what to change: servers refuse connections past their limit to whoever comes next, which in a roll-out is everybody.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from app.core.settings import DatabaseSettings
from app.scaling import dialect

WATCHERS = 1  # connections of a process to each server on which it asks how the server is
BY_HAND = 1  # commands that somebody runs beside the fleet: a migration, a chore, a look at dead letters


@dataclass(frozen=True, slots=True)
class Fleet:
    """The processes that open connections.

    Attributes:
        instances: of the API.
        surge: instances that start while as many old ones still run, in a roll-out.
        worker_children: processes of all workers together; each has pools of its own.
        relays: outbox relays.
        chores: commands that come and go by a plan, each a process of its own: Kubernetes' CronJobs, a migration.
    """

    instances: int
    surge: int
    worker_children: int
    relays: int
    chores: int = 0

    @property
    def processes(self) -> int:
        """How many processes may be connected at the same time."""
        return self.instances + self.surge + self.worker_children + self.relays + self.chores + BY_HAND


def most_of_a_process(settings: DatabaseSettings) -> int:
    """Return how many connections a process may have to one server: any server may be the primary after a promotion.

    One pool for reads, one for transactions, and the watcher.
    """
    return 2 * settings.connections + WATCHERS


def misfits(server: str, limits: dialect.Limits, fleet: Fleet, settings: DatabaseSettings) -> list[str]:
    """Return a sentence for each thing that does not fit on a server, with what to change.

    Args:
        server: its name, for the sentences.
        limits: what it allows.
        fleet: who connects.
        settings: how large the pools are, and whether a pooler stands before the server.
    """
    found = [
        f"{server}: {name} is off, so one forgotten statement holds its locks for ever; {remedy}."
        for name, remedy in limits.endless
        # Each connection brings this one along, unless a pooler gives it to somebody else next.
        if name != "lock_timeout" or settings.pooler == "transaction"
    ]
    each, needed = most_of_a_process(settings), fleet.processes * most_of_a_process(settings)
    if settings.pooler == "transaction" or needed <= limits.connections:
        return found
    ways = [f"raise max_connections by {needed - limits.connections}"]
    smaller = (limits.connections // fleet.processes - WATCHERS) // 2
    if smaller > 0:
        ways.insert(0, f"set DATABASE_POOL_SIZE={smaller}")
    fitting = fleet.instances - -(-(needed - limits.connections) // each)
    if fitting > 0:
        ways.append(f"run {fitting} instances")
    ways.append("put PgBouncer before it and set DATABASE_POOLER=transaction")
    found.append(
        f"{server}: {fleet.processes} processes with up to {each} connections each need {needed}, "
        f"it allows {limits.connections}; {', or '.join(ways)}."
    )
    return found


async def ask(settings: DatabaseSettings) -> Sequence[tuple[str, dialect.Limits]]:
    """Return what each server of each shard allows, by its name.

    Raises:
        OSError: or another of `dialect.ERRORS`, if one does not answer.
    """
    found = []
    for number, shard in enumerate(settings.shards):
        for position, url in enumerate((shard.primary, *shard.replicas)):
            name = f"shard {number}, {f'replica {position}' if position else 'primary'}"
            connection = await dialect.connect(url, settings, settings.command_timeout, name="check")
            try:
                found.append((name, await dialect.limits(connection)))
            finally:
                dialect.cut(connection)
    return found
