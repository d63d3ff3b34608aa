"""What a profile's reads must have reached, on every instance: the positions of what was written for it, in Redis.

    positions:{<profile>}    <shard>                  position of the newest commit there
                             <shard>:<random>         a transaction is under way, until this moment (ms since 1970)
                             <shard>:shown:<random>   the same, of one that changes what the cache shows of the profile

A mark is set before a transaction begins and taken away in the same step that raises the position after its commit.
While it stands only the primary answers the profile: so nobody who has seen a commit on one replica misses it on the
next, whoever wrote it, a request or a worker. A process that dies in between leaves the mark, which then runs out.

A mark of what is shown stands until the cache has the new value as well, and every instance has heard of it before the
transaction begins: so nobody who has read their new profile from the database is then shown the old one by a cache.
"""

import math
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import time
from uuid import UUID

from app.core import context
from app.core.context import NEWEST
from app.core.settings import DatabaseSettings
from app.scaling.cache import PROFILE
from app.scaling.near import Near
from app.scaling.pipe import Pipe
from app.scaling.redis_link import RedisDown

# A transaction is ended by the server after 15 s of idling; the rest is for clocks that differ. On top comes the
# largest lag, after which no replica that still lacks the commit takes reads.
MARK_SECONDS = 20.0
# Where a process died before it told the cache, the last value that lacks the commit is one that was read from a
# replica when the mark ran out; it lives for so long.
STALE_SECONDS = PROFILE.ttl
_SHOWN = b"shown:"

_MARK = """
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return redis.call('EXPIRE', KEYS[1], ARGV[3])
"""
# A new position never replaces a newer one: two transactions of one profile may end in any order.
_SETTLE = """
if tonumber(ARGV[2]) > tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or '0') then
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
end
redis.call('HDEL', KEYS[1], ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[4])
return 1
"""


@dataclass(frozen=True, slots=True)
class Mark:
    """One transaction that is under way for a profile on a shard."""

    profile_id: UUID
    shard: int
    field: str


class Positions:
    """The positions of all profiles. Without Redis nothing is kept: then only a `Consistency-Token` says them.

    Args:
        pipe: to the Redis that keeps them.
        near: keeps in mind whose profile nobody changes, and tells every instance when somebody does.
        settings: the largest lag of a replica that takes reads.
    """

    def __init__(self, pipe: Pipe, near: Near, settings: DatabaseSettings) -> None:
        self._pipe = pipe
        self._near = near
        self._mark_seconds = MARK_SECONDS + settings.replica_max_lag
        # Nothing that is said of a transaction matters for longer: by then no replica that takes reads lacks it, and no
        # cache shows what was before.
        self._ttl = math.ceil(self._mark_seconds) + STALE_SECONDS
        self._mark = pipe.script(_MARK)
        self._settle = pipe.script(_SETTLE)

    def heed(self, answer: Sequence[bytes]) -> None:
        """Have the reads of the work at hand reach what HGETALL of `name_of` says, field and value by turns."""
        work = context.current()
        work.changing = _is_changing(answer)
        now = time() * 1000
        for field, value in zip(answer[::2], answer[1::2], strict=True):
            shard, under_way, _ = field.partition(b":")
            if not under_way:
                work.reached(int(shard), int(value))
            elif int(value) > now:
                work.unsettled.add(int(shard))

    def at_rest(self, profile: str) -> bool:
        """Return whether this process knows, asking nobody, that no cache shows the profile as it was before."""
        return self._near.get(name_of(profile)) is not None

    def changing(self, profile: str, answer: Sequence[bytes], epoch: int) -> bool:
        """Return whether a cache may show the profile as it was before; keep in mind if none does.

        Args:
            profile: its id.
            answer: as `heed` takes it.
            epoch: of `Near`, from before the question.
        """
        changing = _is_changing(answer)
        if not changing:
            self._near.keep(name_of(profile), True, epoch)
        return changing

    async def mark(self, profile_id: UUID, shard: int, *, shown: bool = False) -> Mark:
        """Note that a transaction for the profile begins on the shard.

        Args:
            profile_id: whose.
            shard: where.
            shown: whether it changes what the cache shows of the profile.
        """
        kind = _SHOWN.decode() if shown else ""
        mark = Mark(profile_id, shard, f"{shard}:{kind}{secrets.token_hex(4)}")
        until = int((time() + self._mark_seconds) * 1000)
        name = name_of(profile_id)
        with suppress(RedisDown):
            await self._pipe.run(self._mark, [name], [mark.field, until, self._ttl])
            if shown:
                await self._near.told(name)
        return mark

    async def settle(self, mark: Mark, position: int) -> None:
        """Note that the transaction has ended and that reads must reach `position`, 0 if it wrote nothing.

        Where the position could not be learnt (`NEWEST`) the mark stays until it runs out.
        """
        if position >= NEWEST:
            return
        try:
            await self._pipe.run(
                self._settle, [name_of(mark.profile_id)], [mark.shard, position, mark.field, self._ttl]
            )
        except RedisDown:
            return  # the Consistency-Token of the answer still says it


def name_of(profile_id: UUID | str) -> str:
    """Return the name under which Redis holds the profile's positions."""
    return f"positions:{{{profile_id}}}"


def _is_changing(answer: Sequence[bytes]) -> bool:
    """Return whether a cache may show the profile as it was before a transaction that has begun."""
    now = time() * 1000
    for field, until in zip(answer[::2], answer[1::2], strict=True):
        if _SHOWN in field and int(until) + STALE_SECONDS * 1000 > now:
            return True
    return False
