"""Cache-aside over Redis that never brings back an old value.

Each cached value carries its row's version and is stored only if newer than what is there; a deletion leaves a
versioned tombstone. So a reader that fills from a lagging replica, or that was paused between reading and filling,
cannot undo a write. One loader per key runs at a time, in a process and over all instances, and what was read stays at
hand for a moment (`near.py`), until a write anywhere drops it. Without Redis every read loads.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from time import monotonic
from typing import TypeVar

from prometheus_client import Counter

from app.core import context
from app.core.context import NEWEST
from app.core.errors import Unavailable
from app.core.telemetry import CACHE_EARLY, CACHE_LOADS, CACHE_READS, STAMPEDES_AVOIDED, logger
from app.scaling.debts import Debts
from app.scaling.near import Near
from app.scaling.pipe import Pipe
from app.scaling.redis_link import RedisDown, RedisFull
from app.scaling.values import LEASE_MILLISECONDS, NEGATIVE_TTL, Entry, Held, Kind, Values

__all__ = ["ABSENT", "LIST", "NEGATIVE_TTL", "PRODUCT", "PROFILE", "SEARCH"]
__all__ += ["Cache", "Entry", "Kind", "Listing", "Load"]

T = TypeVar("T")
log = logger(__name__)

# A load is a few milliseconds; looking more often would cost Redis more than it gains the caller.
LOOK_EVERY = 0.01  # seconds

# A generation only grows: it is the log position of the newest write that the list must show. Where memory is full it
# goes, and with it every page that was read in it.
_RAISE = """
local held = tonumber(redis.call('GET', KEYS[1]) or '0')
if tonumber(ARGV[1]) > held then
  local raised = redis.pcall('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
  if raised.err then
    redis.call('DEL', KEYS[1])
    return raised
  end
end
return 1
"""

PROFILE = Kind("profile", 300)
PRODUCT = Kind("product", 300)
LIST = Kind("list", 60)
SEARCH = Kind("search", 60)

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


class Cache:
    """The cache of one process, shared by all of them through Redis.

    Args:
        pipe: to the Redis that holds the values.
        near: what this process keeps of them.
    """

    def __init__(self, pipe: Pipe, near: Near) -> None:
        self._pipe = pipe
        self._values = Values(pipe)
        self._near = near
        self._raise = pipe.script(_RAISE)
        self._loaders: dict[str, Callable[[str], Load]] = {}
        # What is being loaded; told the value, or None by a loader that went away.
        self._loading: dict[str, asyncio.Future[Entry | None]] = {}
        self._leased: set[str] = set()  # of what is being loaded, what is ours to load
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

    def names_of(self, kind: Kind, key: str) -> tuple[str, str]:
        """Return the names under which Redis holds `key`, and the lease of who loads it for those without positions.

        Raises:
            RedisDown: if it is not known which Redis that is.
        """
        return self._values.names_of(kind, key)

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
        held, name = Held.parse(raw), _local(kind, key)
        # No longer than Redis: whoever loads it once it is gone there tells nobody.
        self._near.keep(name, held.entry, epoch, held.seconds_left())
        if held.due() and name not in self._early:
            renewing = asyncio.create_task(self._renew(kind, key, load or self._loaders[kind.name](key)))
            self._early[name] = renewing
            renewing.add_done_callback(lambda _: self._early.pop(name, None))
        return held.entry

    async def read(self, kind: Kind, key: str, load: Load | None = None) -> Entry:
        """Return the entry of `key`: at hand, from Redis, or else from `load`, where `loads` does not say how.

        Whoever has named a position loads: Redis may not have heard of that write yet, over a network that loses
        connections.
        """
        work = context.current()
        if work.bound:
            return await self.read_past(kind, key, load)
        epoch = self._near.epoch
        with work.timed("cache", "l1") as span:
            near = self.kept(kind, key)
            if near is None:
                held = await self._ask(span, self._values.claim(kind, key, _which()), True)
        CACHE_READS.labels(kind.name, span.description).inc()
        if near is not None:
            return near
        if isinstance(held, bytes):
            return self.found(kind, key, held, epoch, load)
        return await self.load(kind, key, load, leased=held)

    async def read_past(self, kind: Kind, key: str, load: Load | None = None) -> Entry:
        """Load the entry of `key` whatever is cached, for a caller who may have seen something newer."""
        context.current().spans["cache"] = context.Span("bypass")
        CACHE_READS.labels(kind.name, "bypass").inc()
        return await self._load(kind, key, load or self._loaders[kind.name](key))

    async def load(self, kind: Kind, key: str, load: Load | None = None, *, leased: bool) -> Entry:
        """Load what Redis was just found not to have.

        Callers of one process that miss the same key at once, and must see the same position, share one load.

        Args:
            kind: of the value.
            key: its key.
            load: how it is loaded, where `loads` does not say it.
            leased: whether the lease is the caller's; if not, who has it is waited for.
        """
        flight = f"{_local(kind, key)}@{_which()}"
        if leased:
            self._leased.add(flight)
        while (loading := self._loading.get(flight)) is not None:
            loaded = await asyncio.shield(loading)
            if loaded is not None:
                STAMPEDES_AVOIDED.labels(kind.name, "process").inc()
                return loaded
        return await self._load_for_all(kind, key, flight, load or self._loaders[kind.name](key))

    async def give_up(self, kind: Kind, key: str) -> None:
        """Let others load what the work at hand has the lease of."""
        await self._values.give_up(kind, key, _which())

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
        held = await asyncio.gather(
            *(self._ask(span, self._values.get(kind, key), None) for key, span in zip(unknown, spans, strict=True))
        )
        for key, span, raw in zip(unknown, spans, held, strict=True):
            CACHE_READS.labels(kind.name, span.description).inc()
            entry = self.found(kind, key, raw, epoch) if raw is not None else ABSENT
            if entry.body is not None:
                found[key] = entry
        missing = [key for key in unknown if key not in found]
        if missing:
            loaded = await load(missing)
            with suppress(RedisDown):
                await asyncio.gather(*(self._values.store(kind, key, entry) for key, entry in loaded.items()))
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
        storing = self._values.store(kind, key, entry, self._costs.get(kind.name, 0))
        return (await self._told(_local(kind, key), storing)).entry

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
        except RedisDown as error:
            # One that is full has deleted it, and announces.
            await (self._near.told(name) if isinstance(error, RedisFull) else self._near.give_up([name]))
            raise
        await self._near.told(name)
        return told

    async def _raise_to(self, kept: str, position: int) -> None:
        await self._pipe.run(self._raise, [kept], [position, 24 * 3600])

    @staticmethod
    async def _ask(span: context.Span, question: Awaitable[T], alone: T) -> T:
        """Ask Redis and describe on `span` what came of it; without Redis everybody is `alone`."""
        try:
            held = await question
        except RedisDown:
            span.description = "bypass"
            return alone
        span.description = "l2" if isinstance(held, bytes) else "miss"
        return held

    async def _renew(self, kind: Kind, key: str, load: Load) -> None:
        """Load before the value expires, unless somebody else does; whoever found it has been answered."""
        with context.working(context.Work(request_id=context.new_request_id())), suppress(RedisDown):
            if not await self._values.claim_early(kind, key):
                return
            CACHE_EARLY.labels(kind.name).inc()
            try:
                await self._load(kind, key, load)
            except Unavailable as error:
                log.warning("a value is not renewed before it expires", kind=kind.name, reason=error.code)

    async def _load_for_all(self, kind: Kind, key: str, flight: str, load: Load) -> Entry:
        """Load in the caller's own task and tell all who wait for the same; if it goes away, one of them loads."""
        loading = self._loading[flight] = asyncio.get_running_loop().create_future()
        try:
            entry = await self._load_alone(kind, key, flight, load)
        except asyncio.CancelledError:
            loading.set_result(None)
            raise
        except BaseException as error:
            loading.set_exception(error)
            loading.exception()  # seen: nearly always nobody else waits
            raise
        else:
            loading.set_result(entry)
            return entry
        finally:
            del self._loading[flight]
            self._leased.discard(flight)

    async def _load_alone(self, kind: Kind, key: str, flight: str, load: Load) -> Entry:
        """Load, unless another instance is loading the same for callers of the same position: then take its value."""
        which = _which()
        until = monotonic() + LEASE_MILLISECONDS / 1000
        try:
            while flight not in self._leased and monotonic() < until:
                await asyncio.sleep(LOOK_EVERY)
                held = await self._values.claim(kind, key, which)
                if isinstance(held, bytes):
                    STAMPEDES_AVOIDED.labels(kind.name, "instance").inc()
                    return Held.parse(held).entry
                if held:
                    self._leased.add(flight)
        except RedisDown:
            pass  # everybody loads for themselves
        leased = which if flight in self._leased else None
        try:
            return await self._load(kind, key, load, leased=leased)
        except BaseException:
            if leased is not None:
                await self._values.give_up(kind, key, which)
            raise

    async def _load(self, kind: Kind, key: str, load: Load, *, leased: str | None = None) -> Entry:
        _loads_of(kind.name).inc()
        began = monotonic()
        entry = await load()
        cost = self._costs[kind.name] = math.ceil((monotonic() - began) * 1000)
        try:
            stored = await self._values.store(kind, key, entry, cost, leased=leased)
            if stored.renews:
                # Of a write that has not told the cache yet, or never will. Nobody is shown it and then the old one.
                await self._near.told(_local(kind, key))
        except RedisDown:
            return entry
        return stored.entry


def _which() -> str:
    """Return the positions that the work at hand must see as one text, of a single one as `Admissions` writes it."""
    work = context.current()
    settled = ",".join(f"{shard}:{position}" for shard, position in sorted(work.positions.items()))
    return f"{settled}?{sorted(work.unsettled)}" if work.unsettled else settled


@lru_cache
def _loads_of(kind: str) -> Counter:
    return CACHE_LOADS.labels(kind)


def _local(kind: Kind, key: str) -> str:
    # Without the run: a process forgets what it keeps when it loses its Redis.
    return f"{kind.name}:{key}"


def _generation(name: str) -> str:
    # One tag for a family, so that its generations are read together also on a cluster.
    family, colon, rest = name.partition(":")
    return f"generation:{{{family}}}{colon}{rest}"
