"""Cache-aside over Redis that never brings back an old value.

Each cached value carries its row's version and is stored only if newer than what is there; a deletion leaves a
versioned tombstone. So a reader that fills from a lagging replica, or that was paused between reading and filling,
cannot undo a write. One loader per key runs at a time, in a process and over all instances, and what was read stays at
hand for a moment (`near.py`), until a write anywhere drops it. Without Redis every read loads.

    <kind>:{<key>}:<run>     <version>,<expires, ms since 1970>,<cost of loading, ms>:<JSON bytes as sent>

Nothing after the colon says that there is no such thing. `run` is the run of the Redis server that holds the value: a
Redis that comes back, or another one in its place, may have missed a write, so what it still holds is never asked for.
"""

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic, time
from typing import Any, NamedTuple, TypeVar

from app.core import context
from app.core.context import NEWEST
from app.core.errors import Unavailable
from app.core.telemetry import CACHE_EARLY, CACHE_LOADS, CACHE_READS, logger
from app.scaling.debts import Debts
from app.scaling.near import Near
from app.scaling.pipe import Pipe
from app.scaling.redis_link import RedisDown

T = TypeVar("T")
log = logger(__name__)

NEGATIVE_TTL = 10  # seconds that an unknown id stays unknown: long enough for a scan, short enough to forget a typo
JITTER = 0.1  # share of a TTL, so that what was cached together does not expire together
# How long others wait for the one instance that loads: longer than any load that is well, shorter than a person waits
# when that instance has died.
LEASE_MILLISECONDS = 1000
# A load is a few milliseconds; looking more often would cost Redis more than it gains the caller.
LOOK_EVERY = 0.01  # seconds

# One round trip: keep what is newer, and hand it back, so that the loser of a race answers with the winner's value.
_PUT_IF_NEWER = """
local held = redis.call('GET', KEYS[1])
if held then
  local version = tonumber(string.match(held, '^(%d+)'))
  if version > tonumber(ARGV[1]) then return held end
end
redis.call('SET', KEYS[1], ARGV[1] .. ',' .. ARGV[2] .. ':' .. ARGV[3], 'PX', ARGV[4])
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


ABSENT = Entry(0, None)
Load = Callable[[], Awaitable[Entry]]


@dataclass(frozen=True, slots=True)
class Listing:
    """A page of a list, cached anew for each generation of what it shows.

    Attributes:
        kind: of its entries.
        families: whose generations a write raises that the page must show.
        key: which page of which list.
        load: reads the page, showing at least the generations that it is given.
    """

    kind: Kind
    families: tuple[str, ...]
    key: str
    load: Callable[[Sequence[int]], Load]

    def key_at(self, generations: Sequence[int]) -> str:
        """Return the key of its entry in these generations."""
        return f"{self.key}@{','.join(map(str, generations))}"


class _Held(NamedTuple):
    """An entry as Redis holds it, with the moment (ms since 1970) when it expires and what loading it took (ms)."""

    entry: Entry
    expires: int
    cost: int

    @classmethod
    def parse(cls, raw: bytes) -> "_Held":
        head, _, body = raw.partition(b":")
        version, expires, cost = head.split(b",")
        return cls(Entry(int(version), body or None), int(expires), int(cost))

    def due(self) -> bool:
        """Return whether to load it before it expires: the likelier the nearer that is and the longer loading takes.

        XFetch (Vattani, Chierichetti, Lowenstein 2015): of many readers of a value one is likely to be early, and none
        has to wait when it expires.
        """
        return time() * 1000 - self.cost * math.log(1 - random.random()) >= self.expires


class Cache:
    """The cache of one process, shared by all of them through Redis.

    Args:
        pipe: to the Redis that holds the values.
        near: what this process keeps of them.
    """

    def __init__(self, pipe: Pipe, near: Near) -> None:
        self._pipe = pipe
        self._near = near
        self._put = pipe.script(_PUT_IF_NEWER)
        self._raise = pipe.script(_RAISE)
        self._loaders: dict[str, Callable[[str], Load]] = {}
        self._loading: dict[str, asyncio.Task[Entry]] = {}
        self._early: dict[str, asyncio.Task[None]] = {}
        self._costs: dict[str, int] = {}
        self._debts = Debts()

    async def stop(self) -> None:
        """End what runs in the background; what is owed to Redis is tried once more."""
        for task in list(self._early.values()):
            task.cancel()
            await asyncio.wait({task})
        await self._debts.stop()

    def loads(self, kind: Kind, load: Callable[[str], Load]) -> None:
        """Say how a value of `kind` is loaded by its key, for whoever finds one that is about to expire."""
        self._loaders[kind.name] = load

    def name_of(self, kind: Kind, key: str) -> str:
        """Return the name under which Redis holds `key`.

        Raises:
            RedisDown: if it is not known which Redis that is.
        """
        tagged = f"{kind.name}:{{{key}}}"
        return f"{tagged}:{self._pipe.run_of(tagged)}"

    def kept(self, kind: Kind, key: str) -> Entry | None:
        """Return the entry of `key` if this process has it at hand."""
        entry: Entry | None = self._near.get(_local(kind, key))
        return entry

    def found(self, kind: Kind, key: str, raw: bytes, epoch: int, load: Load | None = None) -> Entry:
        """Read and keep what was asked of Redis when `epoch` of `Near` was current; renew it if it is about to expire.

        Args:
            kind: of the value.
            key: its key.
            raw: as Redis holds it.
            epoch: of `Near`, from before the question.
            load: how it is loaded, where `loads` does not say it.
        """
        held, name = _Held.parse(raw), _local(kind, key)
        self._near.keep(name, held.entry, epoch)
        if held.due() and name not in self._early:
            renewing = asyncio.create_task(self._renew(kind, key, load or self._loaders[kind.name](key)))
            self._early[name] = renewing
            renewing.add_done_callback(lambda _: self._early.pop(name, None))
        return held.entry

    async def read(self, kind: Kind, key: str, load: Load) -> Entry:
        """Return the entry of `key`: at hand, from Redis, or else from `load`.

        Callers of one process that miss the same key at once, and must see the same position, share one load. Whoever
        has named a position loads: Redis may not have heard of that write yet, over a network that loses connections.
        """
        work = context.current()
        if work.bound:
            work.spans["cache"] = context.Span("bypass")
            CACHE_READS.labels(kind.name, "bypass").inc()
            return await self._load(kind, key, load)
        epoch = self._near.epoch
        with work.timed("cache", "l1") as span:
            near = self.kept(kind, key)
            if near is None:
                raw = await self._ask(kind, key, span)
        CACHE_READS.labels(kind.name, span.description).inc()
        if near is not None:
            return near
        if raw is not None:
            return self.found(kind, key, raw, epoch, load)
        flight = f"{_local(kind, key)}@{sorted(work.positions.items())}{sorted(work.unsettled)}"
        task = self._loading.get(flight)
        if task is None:
            task = asyncio.create_task(self._load_alone(kind, key, f"loading:{flight}", load))
            self._loading[flight] = task
            task.add_done_callback(lambda _: self._loading.pop(flight, None))
        return await asyncio.shield(task)

    async def several(
        self, kind: Kind, keys: Sequence[str], load: Callable[[Sequence[str]], Awaitable[dict[str, Entry]]]
    ) -> dict[str, Entry]:
        """Return the entries that exist among `keys`: at hand, from Redis in one round trip, or else all from one load.

        What is not known to exist is always loaded, for callers who act on it.
        """
        found = {key: near for key in keys if (near := self.kept(kind, key)) is not None and near.body is not None}
        CACHE_READS.labels(kind.name, "l1").inc(len(found))
        unknown = [key for key in keys if key not in found]
        if not unknown:
            return found
        epoch = self._near.epoch
        spans = [context.Span("") for _ in unknown]
        held = await asyncio.gather(*(self._ask(kind, key, span) for key, span in zip(unknown, spans, strict=True)))
        for key, span, raw in zip(unknown, spans, held, strict=True):
            CACHE_READS.labels(kind.name, span.description).inc()
            entry = self.found(kind, key, raw, epoch) if raw is not None else ABSENT
            if entry.body is not None:
                found[key] = entry
        missing = [key for key in unknown if key not in found]
        if missing:
            loaded = await load(missing)
            with suppress(RedisDown):
                await asyncio.gather(*(self._store(kind, key, entry) for key, entry in loaded.items()))
            found |= loaded
        return found

    async def put(self, kind: Kind, key: str, entry: Entry) -> Entry:
        """Write `entry` through, unless a newer one is there; return what stands afterwards.

        Once this returns no instance answers with what was there before. What Redis cannot be told now it is told as
        soon as it answers.
        """
        try:
            return await self.deliver(kind, key, entry)
        except RedisDown:

            async def again() -> None:
                await self.deliver(kind, key, entry)

            self._debts.owe(_local(kind, key), again)
            return entry

    async def deliver(self, kind: Kind, key: str, entry: Entry) -> Entry:
        """Write `entry` through as `put` does.

        Raises:
            RedisDown: if it is not known that Redis has it and every instance has heard of it.
        """
        # Also the loser of a race tells: their caller must not see less than they wrote.
        return await self._told(_local(kind, key), self._store(kind, key, entry))

    async def page(self, listing: Listing) -> bytes:
        """Return a page as it must be shown now."""
        generations = await self.generations(listing.families)
        entry = await self.read(listing.kind, listing.key_at(generations), listing.load(generations))
        return entry.body or b""

    async def generations(self, names: Sequence[str]) -> Sequence[int]:
        """Return the generation of each of one family of lists: the position that they must show, at least."""
        kept = self.generations_kept(names)
        if kept is not None:
            return kept
        epoch, found = self._near.epoch, [_generation(name) for name in names]
        try:
            values = [int(value or 0) for value in await self._pipe.ask(found[0], "MGET", *found)]
        except RedisDown:
            return [0] * len(names)
        for name, value in zip(found, values, strict=True):
            self._near.keep(name, value, epoch)
        return values

    def generations_kept(self, names: Sequence[str]) -> Sequence[int] | None:
        """Return the generations if this process has all of them at hand."""
        kept = [self._near.get(_generation(name)) for name in names]
        return None if None in kept else kept

    async def raise_generation(self, name: str, position: int) -> None:
        """Make every cached list of the family obsolete that was read before `position`.

        Once this returns no instance answers with one.
        """
        if position >= NEWEST:
            # Not known: it would send every list to the primary for a day. Lists live for at most LIST.ttl seconds.
            return
        kept = _generation(name)

        async def tell() -> None:
            await self._told(kept, self._raise_to(kept, position))

        try:
            await tell()
        except RedisDown:
            self._debts.owe(kept, tell)

    async def _told(self, name: str, telling: Awaitable[T]) -> T:
        """Tell Redis, then every instance that what it keeps under `name` is obsolete."""
        try:
            told = await telling
        except RedisDown:
            await self._near.give_up([name])
            raise
        await self._near.told(name)
        return told

    async def _raise_to(self, kept: str, position: int) -> None:
        await self._pipe.run(self._raise, [kept], [position, 24 * 3600])

    async def _ask(self, kind: Kind, key: str, span: context.Span) -> Any:
        span.description = "miss"
        try:
            name = self.name_of(kind, key)
            raw: Any = await self._pipe.ask(name, "GET", name)
        except RedisDown:
            span.description = "bypass"
            return None
        if raw is not None:
            span.description = "l2"
        return raw

    async def _renew(self, kind: Kind, key: str, load: Load) -> None:
        """Load before the value expires, unless somebody else does; whoever found it has been answered."""
        with context.working(context.Work(request_id=context.new_request_id())), suppress(RedisDown):
            lease = f"early:{_local(kind, key)}"
            if not await self._pipe.ask(lease, "SET", lease, b"1", "NX", "PX", LEASE_MILLISECONDS):
                return
            CACHE_EARLY.labels(kind.name).inc()
            try:
                await self._load(kind, key, load)
            except Unavailable as error:
                log.warning("a value is not renewed before it expires", kind=kind.name, reason=error.code)

    async def _load_alone(self, kind: Kind, key: str, lease: str, load: Load) -> Entry:
        """Load, unless another instance is loading the same for callers of the same position: then take its value."""
        until = monotonic() + LEASE_MILLISECONDS / 1000
        try:
            while monotonic() < until:
                if await self._pipe.ask(lease, "SET", lease, b"1", "NX", "PX", LEASE_MILLISECONDS):
                    break
                await asyncio.sleep(LOOK_EVERY)
                name = self.name_of(kind, key)
                raw = await self._pipe.ask(name, "GET", name)
                if raw is not None:
                    return _Held.parse(raw).entry
        except RedisDown:
            pass  # everybody loads for themselves
        try:
            return await self._load(kind, key, load)
        finally:
            with suppress(RedisDown):  # then it runs out
                await self._pipe.ask(lease, "DEL", lease)

    async def _load(self, kind: Kind, key: str, load: Load) -> Entry:
        CACHE_LOADS.labels(kind.name).inc()
        began = monotonic()
        entry = await load()
        self._costs[kind.name] = math.ceil((monotonic() - began) * 1000)
        try:
            return await self._store(kind, key, entry)
        except RedisDown:
            return entry

    async def _store(self, kind: Kind, key: str, entry: Entry) -> Entry:
        seconds = kind.ttl if entry.body is not None or entry.version else NEGATIVE_TTL
        milliseconds = int(seconds * 1000 * random.uniform(1 - JITTER, 1))
        expires = int(time() * 1000) + milliseconds
        newer = await self._pipe.run(
            self._put,
            [self.name_of(kind, key)],
            [entry.version, f"{expires},{self._costs.get(kind.name, 0)}", entry.body or b"", milliseconds],
        )
        return _Held.parse(newer).entry if newer else entry


def _local(kind: Kind, key: str) -> str:
    # Without the run: a process forgets what it keeps when it loses its Redis.
    return f"{kind.name}:{key}"


def _generation(name: str) -> str:
    # One tag for a family, so that its generations are read together also on a cluster.
    family, colon, rest = name.partition(":")
    return f"generation:{{{family}}}{colon}{rest}"
