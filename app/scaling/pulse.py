"""What a process tells of itself twice a second, so that one question to Redis shows the whole cluster.

A pulse is a few figures out of the process's own metrics, its state, and the servers as it sees them: bounded, without
anything about a person. Whoever does not tell for `GONE_AFTER` seconds is gone. Without Redis nobody is told, and the
process goes on all the same.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from prometheus_client import REGISTRY

from app.core import wire
from app.core.settings import ServiceSettings
from app.scaling.database import Database
from app.scaling.lifecycle import Lifecycle
from app.scaling.pipe import Pipe
from app.scaling.redis_link import RedisDown

# One hash for all: one key, so that a cluster of Redis has them in one place, too.
PULSES = "pulses"

# Three pulses that do not come are no accident; a person who watches sees the loss within two seconds.
BEAT_SECONDS = 0.5
GONE_AFTER = 1.5
# Who has not told for so long is forgotten. Until then the console shows that it was there.
FORGOTTEN_AFTER = 60

# Figure -> the sample of the registry that it adds up, and the labels by which it is told apart.
FIGURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "requests": ("http_requests_total", ("status",)),
    "durations": ("http_request_duration_highr_seconds_bucket", ("le",)),
    "cache": ("cache_reads_total", ("result",)),
    "statements": ("database_statements_total", ("shard", "node", "outcome")),
    "outbound": ("outbound_calls_total", ("dependency", "outcome")),
    "breakers": ("breaker_open", ("dependency",)),
    "redis_failures": ("redis_failures_total", ()),
    "shed": ("requests_shed_total", ()),
    "limited": ("rate_limited_total", ()),
    "streams": ("event_streams", ()),
    "published": ("outbox_published_total", ()),
    "waiting": ("outbox_messages_waiting", ("shard",)),
    "oldest": ("outbox_oldest_message_seconds", ("shard",)),
    "letters": ("dead_letters_open", ("shard",)),
    "tasks": ("tasks_total", ("outcome",)),
}
_OF_SAMPLE = {sample: (figure, labels) for figure, (sample, labels) in FIGURES.items()}
# Values of a figure: hundreds of tasks or nodes would make a pulse long, and a picture of them nobody could read.
MOST_VALUES = 200

# The clock is that of Redis, which all processes share: theirs may differ.
_TELL = """
local now = redis.call('TIME')
redis.call('HSET', KEYS[1], ARGV[1], string.format('%d%03d ', now[1], math.floor(now[2] / 1000)) .. ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
"""


class Pulse:
    """The pulse of this process.

    Args:
        role: `api`, `relay` or `worker`.
        settings: who the process is.
        pipe: to the Redis that keeps the pulses.
        database: whose servers it tells of.
        lifecycle: whose phase it tells.
    """

    def __init__(
        self, role: str, settings: ServiceSettings, pipe: Pipe, database: Database, lifecycle: Lifecycle
    ) -> None:
        # A worker's processes share a name, and a container's always have the same number.
        self._field = f"{settings.instance}/{os.getpid()}"
        self._who = {
            "name": settings.instance,
            "role": role,
            "region": settings.region,
            "pid": os.getpid(),
            "started": round(time.time(), 3),
        }
        self._pipe = pipe
        self._database = database
        self._lifecycle = lifecycle
        self._tell = pipe.script(_TELL)
        self._late = 0.0

    @asynccontextmanager
    async def beating(self) -> AsyncIterator[None]:
        """Tell inside the block; at its end this process is forgotten at once, as it has not died."""
        beating = asyncio.create_task(self._beat(), name="pulse")
        try:
            yield
        finally:
            beating.cancel()
            await asyncio.wait({beating})
            with suppress(RedisDown):
                await self._pipe.ask(PULSES, "HDEL", PULSES, self._field)

    def view(self) -> dict[str, Any]:
        """Return what there is to tell now: a kilobyte or two as JSON."""
        return {
            **self._who,
            "phase": self._lifecycle.phase.name.lower(),
            "cpu": round(time.process_time(), 3),
            "late": round(self._late, 4),
            "shards": [
                {
                    "shard": shard.number,
                    "takes_writes": shard.replicas.takes_writes,
                    "nodes": [
                        {
                            "name": node.name,
                            "primary": node is shard.replicas.primary,
                            "answers": node.answers,
                            "healthy": node.healthy,
                            "lag": round(node.lag, 3),
                            "in_flight": node.in_flight,
                        }
                        for node in shard.replicas.nodes
                    ],
                }
                for shard in self._database.shards
            ],
            "figures": figures(),
        }

    async def _beat(self) -> None:
        clock = asyncio.get_running_loop().time
        due = clock()
        while True:
            # How late the loop comes back to us is how long anybody waits for their turn.
            self._late = max(0.0, clock() - due)
            with suppress(RedisDown):
                await self._pipe.run(self._tell, [PULSES], [self._field, wire.encode(self.view()), FORGOTTEN_AFTER])
            due = clock() + BEAT_SECONDS
            await asyncio.sleep(BEAT_SECONDS)


def figures() -> dict[str, dict[str, float]]:
    """Return each figure of `FIGURES` as this process has it: the values by their labels, joined with `/`."""
    found: dict[str, dict[str, float]] = {}
    for metric in REGISTRY.restricted_registry(_OF_SAMPLE).collect():
        for sample in metric.samples:
            figure, labels = _OF_SAMPLE[sample.name]
            values = found.setdefault(figure, {})
            label = "/".join(sample.labels[name] for name in labels)
            if label in values or len(values) < MOST_VALUES:
                values[label] = values.get(label, 0) + sample.value
    return found
