"""Cached values as Redis holds them: set only if newer, never asked for after Redis was away, loaded by one at a time.

    <kind>:{<key>}:<run>          <version>,<expires, ms since 1970>,<cost of loading, ms>:<JSON bytes as sent>
    <kind>:{<key>}:<run>@<which>  the lease of whoever loads it for callers who must see the same positions

Nothing after the colon says that there is no such thing. `run` is the run of the Redis server that holds the value: a
Redis that comes back, or another one in its place, may have missed a write, so what it still holds is never asked for.
A value that is not there is claimed in the round trip that misses it, and the lease ends in the one that stores it.
"""

import math
import random
from contextlib import suppress
from dataclasses import dataclass
from time import time
from typing import NamedTuple

from app.scaling.pipe import Pipe
from app.scaling.redis_link import RedisDown

NEGATIVE_TTL = 10  # seconds that an unknown id stays unknown: long enough for a scan, short enough to forget a typo
JITTER = 0.1  # share of a TTL, so that what was cached together does not expire together
# How long others wait for the one instance that loads: longer than any load that is well, shorter than a person waits
# when that instance has died.
LEASE_MILLISECONDS = 1000

_CLAIM = """
local held = redis.call('GET', KEYS[1])
if held then return held end
if redis.call('SET', KEYS[2], 1, 'NX', 'PX', ARGV[1]) then return 1 end
return 0
"""
# Keep what is newer, and hand it back, so that the loser of a race answers with the winner's value; else say whether
# there was an older one. Where memory is
# full what is older goes all the same: nobody may find what was there before a write.
_PUT_IF_NEWER = """
if KEYS[2] then redis.call('DEL', KEYS[2]) end
local held = redis.call('GET', KEYS[1])
local replaced = 0
if held then
  local version = tonumber(string.match(held, '^(%d+)'))
  if version > tonumber(ARGV[1]) then return held end
  if version < tonumber(ARGV[1]) then replaced = 1 end
end
local stored = redis.pcall('SET', KEYS[1], ARGV[1] .. ',' .. ARGV[2] .. ':' .. ARGV[3], 'PX', ARGV[4])
if stored.err then
  redis.call('DEL', KEYS[1])
  return stored
end
return replaced
"""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of cached value: its name in keys and metrics, and how long a value lives, in seconds."""

    name: str
    ttl: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A value as cached: the row's version, and the JSON bytes, or None where there is no such thing."""

    version: int
    body: bytes | None


class Held(NamedTuple):
    """An entry as Redis holds it, with the moment (ms since 1970) when it expires and what loading it took (ms)."""

    entry: Entry
    expires: int
    cost: int

    @classmethod
    def parse(cls, raw: bytes) -> "Held":
        """Read what Redis holds."""
        head, _, body = raw.partition(b":")
        version, expires, cost = head.split(b",")
        return cls(Entry(int(version), body or None), int(expires), int(cost))

    def seconds_left(self) -> float:
        """Return for how long Redis still holds it."""
        return self.expires / 1000 - time()

    def due(self) -> bool:
        """Return whether to load it before it expires: the likelier the nearer that is and the longer loading takes.

        XFetch (Vattani, Chierichetti, Lowenstein 2015): of many readers of a value one is likely to be early, and none
        has to wait when it expires.
        """
        return time() * 1000 - self.cost * math.log(1 - random.random()) >= self.expires


class Stored(NamedTuple):
    """What stands after an entry was stored, and whether it stands where an older one was."""

    entry: Entry
    renews: bool


class Values:
    """The values in one Redis. Every method raises `RedisDown` where it does not say otherwise.

    Args:
        pipe: to that Redis.
    """

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._claim = pipe.script(_CLAIM)
        self._put = pipe.script(_PUT_IF_NEWER)

    def names_of(self, kind: Kind, key: str, which: str = "") -> tuple[str, str]:
        """Return the names of a value and of its lease, in one slot; `which` names the positions that callers need."""
        tagged = f"{kind.name}:{{{key}}}"
        name = f"{tagged}:{self._pipe.run_of(tagged)}"
        return name, f"{name}@{which}"

    async def get(self, kind: Kind, key: str) -> bytes | None:
        """Return what is held."""
        name, _ = self.names_of(kind, key)
        held: bytes | None = await self._pipe.ask(name, "GET", name)
        return held

    async def claim(self, kind: Kind, key: str, which: str) -> bytes | bool:
        """Return what is held, or whether it is the caller's to load: True has the lease, False is not alone."""
        held: bytes | int = await self._pipe.run(self._claim, self.names_of(kind, key, which), [LEASE_MILLISECONDS])
        return held if isinstance(held, bytes) else bool(held)

    async def claim_early(self, kind: Kind, key: str) -> bool:
        """Return whether it is the caller's to load a value that is there still; the lease runs out by itself."""
        lease = f"early:{kind.name}:{key}"
        return bool(await self._pipe.ask(lease, "SET", lease, b"1", "NX", "PX", LEASE_MILLISECONDS))

    async def give_up(self, kind: Kind, key: str, which: str) -> None:
        """End a lease without a value; without Redis it runs out."""
        with suppress(RedisDown):
            name, lease = self.names_of(kind, key, which)
            await self._pipe.ask(name, "DEL", lease)

    async def store(self, kind: Kind, key: str, entry: Entry, cost: int = 0, *, leased: str | None = None) -> Stored:
        """Store an entry unless a newer one is there, end the lease, and return what stands afterwards.

        Args:
            kind: of the value.
            key: its key.
            entry: the value.
            cost: what loading it took, in milliseconds.
            leased: the positions of which the caller holds the lease.
        """
        seconds = kind.ttl if entry.body is not None or entry.version else NEGATIVE_TTL
        milliseconds = int(seconds * 1000 * random.uniform(1 - JITTER, 1))
        names = self.names_of(kind, key, leased or "")
        answer: bytes | int = await self._pipe.run(
            self._put,
            names[:1] if leased is None else names,
            [entry.version, f"{int(time() * 1000) + milliseconds},{cost}", entry.body or b"", milliseconds],
        )
        if isinstance(answer, bytes):
            return Stored(Held.parse(answer).entry, renews=False)
        return Stored(entry, renews=bool(answer))
