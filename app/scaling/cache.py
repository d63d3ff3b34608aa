"""Cache-aside over Redis that never brings back an old value.

Each cached value carries its row's version and is stored only if newer than what is there; a deletion leaves a
versioned tombstone. So a reader that fills from a lagging replica, or that was paused between reading and filling,
cannot undo a write. In a process, one loader per key runs at a time. Without Redis every read loads.

A cached value is `<version>:<JSON bytes as sent>`; nothing after the colon says that there is no such thing.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from redis.commands.core import AsyncScript

from app.core import context
from app.core.telemetry import CACHE_LOADS, CACHE_READS
from app.scaling.dialect import NEWEST
from app.scaling.redis_link import RedisDown, RedisLink

NEGATIVE_TTL = 10  # seconds that an unknown id stays unknown: long enough for a scan, short enough to forget a typo
JITTER = 0.1  # share of a TTL, so that what was cached together does not expire together

# One round trip: keep what is newer, and hand it back, so that the loser of a race answers with the winner's value.
_PUT_IF_NEWER = """
local held = redis.call('GET', KEYS[1])
if held then
  local version = tonumber(string.match(held, '^(%d+):'))
  if version > tonumber(ARGV[1]) then return held end
end
redis.call('SET', KEYS[1], ARGV[1] .. ':' .. ARGV[2], 'PX', ARGV[3])
return false
"""
# A generation only grows: it is the log position of the newest write that the list must show.
_RAISE = """
local held = tonumber(redis.call('GET', KEYS[1]) or '0')
if tonumber(ARGV[1]) > held then redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2]) end
return 1
"""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of cached value: its name in keys and metrics, and how long a value lives, in seconds."""

    name: str
    ttl: int


PROFILE = Kind("profile", 300)
PRODUCT = Kind("product", 300)
LIST = Kind("list", 60)
SEARCH = Kind("search", 60)


@dataclass(frozen=True, slots=True)
class Entry:
    """A value as cached: the row's version, and the JSON bytes, or None where there is no such thing."""

    version: int
    body: bytes | None

    @classmethod
    def parse(cls, raw: bytes) -> "Entry":
        """Read an entry back from Redis."""
        version, _, body = raw.partition(b":")
        return cls(int(version), body or None)


ABSENT = Entry(0, None)


class Cache:
    """The cache of one process, shared by all of them through Redis.

    Args:
        link: the Redis that holds the values.
    """

    def __init__(self, link: RedisLink) -> None:
        self._link = link
        self._put: AsyncScript = link.client.register_script(_PUT_IF_NEWER)
        self._raise: AsyncScript = link.client.register_script(_RAISE)
        self._loading: dict[str, asyncio.Task[Entry]] = {}

    async def read(self, kind: Kind, key: str, load: Callable[[], Awaitable[Entry]]) -> Entry:
        """Return the entry of `key`, from Redis or else from `load`.

        Callers of one process that miss the same key at once, and must see the same position, share one load.
        """
        name = f"{kind.name}:{key}"
        work = context.current()
        with work.timed("cache", "miss") as span:
            try:
                async with self._link.calling("cache"):
                    raw: Any = await self._link.client.get(name)
            except RedisDown:
                raw = None
                span.description = "bypass"
            if raw is not None:
                span.description = "l2"
        CACHE_READS.labels(kind.name, span.description).inc()
        if raw is not None:
            return Entry.parse(raw)
        flight = f"{name}@{sorted(work.positions.items())}"
        task = self._loading.get(flight)
        if task is None:
            task = asyncio.create_task(self._load(kind, name, load))
            self._loading[flight] = task
            task.add_done_callback(lambda _: self._loading.pop(flight, None))
        return await asyncio.shield(task)

    async def put(self, kind: Kind, key: str, entry: Entry) -> Entry:
        """Write `entry` through, unless a newer one is there; return what stands afterwards."""
        return await self._store(kind, f"{kind.name}:{key}", entry)

    async def generations(self, names: list[str]) -> list[int]:
        """Return the generation of each family of lists: the position that they must have been read at, at least."""
        try:
            async with self._link.calling("cache"):
                return [int(value or 0) for value in await self._link.client.mget([f"generation:{n}" for n in names])]
        except RedisDown:
            return [0] * len(names)

    async def raise_generation(self, name: str, position: int) -> None:
        """Make every cached list of the family obsolete that was read before `position`."""
        if position >= NEWEST:
            # Not known: it would send every list to the primary for a day. Lists live for at most LIST.ttl seconds.
            return
        try:
            async with self._link.calling("cache"):
                await self._raise(keys=[f"generation:{name}"], args=[position, 24 * 3600])
        except RedisDown:
            return  # lists live for at most LIST.ttl seconds

    async def _load(self, kind: Kind, name: str, load: Callable[[], Awaitable[Entry]]) -> Entry:
        CACHE_LOADS.labels(kind.name).inc()
        return await self._store(kind, name, await load())

    async def _store(self, kind: Kind, name: str, entry: Entry) -> Entry:
        seconds = kind.ttl if entry.body is not None or entry.version else NEGATIVE_TTL
        milliseconds = int(seconds * 1000 * random.uniform(1 - JITTER, 1))
        try:
            async with self._link.calling("cache"):
                newer = await self._put(keys=[name], args=[entry.version, entry.body or b"", milliseconds])
        except RedisDown:
            return entry
        return Entry.parse(newer) if newer else entry
