"""Cache-aside over Redis that never brings back an old value.

Each cached value carries its row's version and is stored only if newer than what is there; a deletion leaves a
versioned tombstone. So a reader that fills from a lagging replica, or that was paused between reading and filling,
cannot undo a write. One loader per key runs at a time, in a process and over all instances, and what was read stays at
hand for a moment (`near.py`), until a write anywhere drops it. Without Redis every read loads.

A cached value is `<version>:<JSON bytes as sent>`; nothing after the colon says that there is no such thing.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

from redis.commands.core import AsyncScript

from app.core import context
from app.core.context import NEWEST
from app.core.telemetry import CACHE_LOADS, CACHE_READS
from app.scaling.near import CHANNEL, Near
from app.scaling.redis_link import RedisDown, RedisLink

NEGATIVE_TTL = 10  # seconds that an unknown id stays unknown: long enough for a scan, short enough to forget a typo
JITTER = 0.1  # share of a TTL, so that what was cached together does not expire together
# How long others wait for the one instance that loads: longer than any load that is well, shorter than a person waits
# when that instance has died.
LEASE_MILLISECONDS = 1000
# A load is a few milliseconds; looking more often would cost Redis more than it gains the caller.
LOOK_EVERY = 0.01  # seconds

# One round trip: keep what is newer, and hand it back, so that the loser of a race answers with the winner's value. A
# write also tells every instance, in the same step: also the loser, whose caller must not see less than they wrote.
_PUT_IF_NEWER = """
local listeners = 0
if ARGV[4] then listeners = redis.call('PUBLISH', ARGV[4], ARGV[5]) end
local held = redis.call('GET', KEYS[1])
if held then
  local version = tonumber(string.match(held, '^(%d+):'))
  if version > tonumber(ARGV[1]) then return {held, listeners} end
end
redis.call('SET', KEYS[1], ARGV[1] .. ':' .. ARGV[2], 'PX', ARGV[3])
return {false, listeners}
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
        near: what this process keeps of them.
    """

    def __init__(self, link: RedisLink, near: Near) -> None:
        self._link = link
        self._near = near
        self._put: AsyncScript = link.client.register_script(_PUT_IF_NEWER)
        self._raise: AsyncScript = link.client.register_script(_RAISE)
        self._loading: dict[str, asyncio.Task[Entry]] = {}

    def kept(self, kind: Kind, key: str) -> Entry | None:
        """Return the entry of `key` if this process has it at hand."""
        entry: Entry | None = self._near.get(name_of(kind, key))
        return entry

    def found(self, kind: Kind, key: str, raw: bytes, epoch: int) -> Entry:
        """Read and keep what somebody else asked Redis for, when `epoch` of `Near` was current."""
        entry = Entry.parse(raw)
        self._near.keep(name_of(kind, key), entry, epoch)
        return entry

    async def read(self, kind: Kind, key: str, load: Callable[[], Awaitable[Entry]]) -> Entry:
        """Return the entry of `key`: at hand, from Redis, or else from `load`.

        Callers of one process that miss the same key at once, and must see the same position, share one load.
        """
        name = name_of(kind, key)
        work = context.current()
        epoch = self._near.epoch
        with work.timed("cache", "l1") as span:
            near = self.kept(kind, key)
            if near is None:
                raw = await self._ask(name, span)
        CACHE_READS.labels(kind.name, span.description).inc()
        if near is not None:
            return near
        if raw is not None:
            return self.found(kind, key, raw, epoch)
        flight = f"{name}@{sorted(work.positions.items())}{sorted(work.unsettled)}"
        task = self._loading.get(flight)
        if task is None:
            task = asyncio.create_task(self._load_alone(kind, name, f"loading:{flight}", load))
            self._loading[flight] = task
            task.add_done_callback(lambda _: self._loading.pop(flight, None))
        return await asyncio.shield(task)

    async def put(self, kind: Kind, key: str, entry: Entry) -> Entry:
        """Write `entry` through, unless a newer one is there; return what stands afterwards.

        Once this returns no instance answers with what was there before.
        """
        name = name_of(kind, key)
        number, text = self._near.announcement(name)
        try:
            stands, listeners = await self._store(kind, name, entry, CHANNEL, text)
        except RedisDown:
            await self._near.unheard(number, name)
            return entry
        await self._near.dropped(number, listeners)
        return stands

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

    async def _ask(self, name: str, span: context.Span) -> Any:
        span.description = "miss"
        try:
            async with self._link.calling("cache"):
                raw: Any = await self._link.client.get(name)
        except RedisDown:
            span.description = "bypass"
            return None
        if raw is not None:
            span.description = "l2"
        return raw

    async def _load_alone(self, kind: Kind, name: str, lease: str, load: Callable[[], Awaitable[Entry]]) -> Entry:
        """Load, unless another instance is loading the same for callers of the same position: then take its value."""
        until = monotonic() + LEASE_MILLISECONDS / 1000
        try:
            while monotonic() < until:
                async with self._link.calling("cache") as client:
                    if await client.set(lease, b"1", nx=True, px=LEASE_MILLISECONDS):
                        break
                await asyncio.sleep(LOOK_EVERY)
                async with self._link.calling("cache") as client:
                    raw = await client.get(name)
                if raw is not None:
                    return Entry.parse(raw)
        except RedisDown:
            pass  # everybody loads for themselves
        try:
            return await self._load(kind, name, load)
        finally:
            with suppress(RedisDown):  # then it runs out
                async with self._link.calling("cache") as client:
                    await client.delete(lease)

    async def _load(self, kind: Kind, name: str, load: Callable[[], Awaitable[Entry]]) -> Entry:
        CACHE_LOADS.labels(kind.name).inc()
        entry = await load()
        try:
            stands, _ = await self._store(kind, name, entry)
        except RedisDown:
            return entry
        return stands

    async def _store(self, kind: Kind, name: str, entry: Entry, *announcement: str | bytes) -> tuple[Entry, int]:
        seconds = kind.ttl if entry.body is not None or entry.version else NEGATIVE_TTL
        milliseconds = int(seconds * 1000 * random.uniform(1 - JITTER, 1))
        async with self._link.calling("cache"):
            newer, listeners = await self._put(
                keys=[name], args=[entry.version, entry.body or b"", milliseconds, *announcement]
            )
        return (Entry.parse(newer) if newer else entry), int(listeners)


def name_of(kind: Kind, key: str) -> str:
    """Return the name under which Redis holds `key`."""
    return f"{kind.name}:{key}"
