"""Counts behind the write: gathered in the process, then in Redis, then added to the database in batches, each once.

Counting costs its caller nothing but memory: a process hands over what it has counted once in a second, under a number,
so that a handing-over whose answer was lost can be repeated. A batch is set aside in Redis under a number of its own,
which the transaction that adds it writes down: whoever finds a batch again after a flusher died knows whether it has
been added.

    count ─ process ─ ≤ 1 s ─ {name}:waiting ─ take ─ {name}:batch ─ one transaction: number and counts ─ drop
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from itertools import islice
from secrets import token_hex

from sqlalchemy import BigInteger, Column, String, Table, select, update

from app.core.telemetry import TALLIED, TALLY_WAITING
from app.scaling.database import Database, Writer, metadata
from app.scaling.dialect import insert_ignore
from app.scaling.pipe import Pipe
from app.scaling.redis_link import RedisDown

# What a process that is killed loses, at most; one script in that time for all requests of an instance.
GATHER_SECONDS = 1.0
# Keys that a process counts while Redis is away; a count of a further one is dropped, and the metric tells of it.
MOST_GATHERED = 10_000
# Keys handed over or set aside at a time: a script of a millisecond, and a transaction of some more.
MOST_AT_ONCE = 1000
# How long Redis knows what a process has handed over: by far longer than any answer can be waited for.
SENDER_SECONDS = 24 * 3600

# Nothing the second time.
_GATHER = """
if tonumber(redis.call('GET', KEYS[2]) or '0') >= tonumber(ARGV[1]) then return 0 end
for at = 3, #ARGV, 2 do redis.call('HINCRBY', KEYS[1], ARGV[at], ARGV[at + 1]) end
redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[2])
return 1
"""
# The batch that is there, or else a new one, whose number is above all before it, here and in the database.
_TAKE = """
if redis.call('EXISTS', KEYS[2]) == 0 then
  local taken = redis.call('HRANDFIELD', KEYS[1], ARGV[2], 'WITHVALUES')
  if #taken == 0 then return {} end
  for at = 1, #taken, 2 do
    redis.call('HDEL', KEYS[1], taken[at])
    redis.call('HSET', KEYS[2], taken[at], taken[at + 1])
  end
  redis.call('SET', KEYS[3], math.max(tonumber(redis.call('GET', KEYS[3]) or '0'), tonumber(ARGV[1])) + 1)
end
return {tonumber(redis.call('GET', KEYS[3])), redis.call('HGETALL', KEYS[2])}
"""
# Not a later one, if whoever asks was held up.
_DROP = "if redis.call('GET', KEYS[2]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"

# The newest batch of each tally that has been added.
tally_batches = Table(
    "tally_batches",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("number", BigInteger, nullable=False),
)

Counts = Sequence[tuple[str, int]]
Add = Callable[[Writer, Counts], Awaitable[None]]


class Tally:
    """One family of counts.

    Args:
        name: of the family, in keys, rows and metrics.
        pipe: to the Redis that keeps what is not added yet; it must not evict.
        database: its catalog database has the counts.
        add: adds a batch, sorted by key, to the database in the transaction that it is given.
    """

    def __init__(self, name: str, pipe: Pipe, database: Database, add: Add) -> None:
        self._name = name
        self._pipe = pipe
        self._database = database
        self._add_to_database = add
        self._waiting, self._batch, self._newest = (
            f"tally:{{{name}}}:{part}" for part in ("waiting", "batch", "newest")
        )
        self._sender = f"tally:{{{name}}}:sender:{token_hex(8)}"
        self._gather, self._take, self._drop = (pipe.script(text) for text in (_GATHER, _TAKE, _DROP))
        self._gathered: dict[str, int] = {}
        self._outgoing: list[tuple[str, int]] = []
        self._number = 0
        self._handing: asyncio.Task[None] | None = None

    def count(self, key: str) -> None:
        """Count one more of `key`; Redis has it within a second, or as soon as it is back."""
        gathered = self._gathered.get(key)
        if gathered is None and len(self._gathered) >= MOST_GATHERED:
            TALLIED.labels(self._name, "dropped").inc()
            return
        self._gathered[key] = (gathered or 0) + 1
        if self._handing is None or self._handing.done():
            self._handing = asyncio.create_task(self._keep_handing_over())

    async def stop(self) -> None:
        """Hand over what is gathered, if Redis is there."""
        if self._handing is not None:
            self._handing.cancel()
            await asyncio.wait({self._handing})
        with suppress(RedisDown):
            await self._hand_over()

    async def flush(self) -> int:
        """Add what Redis holds to the database; return of how many keys.

        Raises:
            RedisDown, Unavailable: what has not been added yet stays for the next time.
        """
        flushed = 0
        while True:
            row = await self._database.reader(newest=True).first(
                select(tally_batches.c.number).where(tally_batches.c.name == self._name)
            )
            known = 0 if row is None else int(row.number)
            taken = await self._pipe.run(self._take, [self._waiting, self._batch, self._newest], [known, MOST_AT_ONCE])
            if not taken:
                return flushed
            number, held = taken
            counts = sorted((key.decode(), int(count)) for key, count in zip(held[::2], held[1::2], strict=True))
            flushed += await self._settle(number, counts)
            await self.drop(number)

    async def drop(self, number: int) -> None:
        """Forget the batch, which has been added.

        Raises:
            RedisDown: then whoever flushes next finds it, and that it has been added.
        """
        await self._pipe.run(self._drop, [self._batch, self._newest], [number])

    async def _settle(self, number: int, counts: Counts) -> int:
        async with self._database.writer() as writer:
            await writer.run(insert_ignore(tally_batches).values(name=self._name, number=0))
            fresh = await writer.run(
                update(tally_batches)
                .where(tally_batches.c.name == self._name, tally_batches.c.number < number)
                .values(number=number)
            )
            if not fresh:
                return 0
            await self._add_to_database(writer, counts)
            total = sum(count for _, count in counts)
            writer.then(lambda: TALLIED.labels(self._name, "added").inc(total))
        return len(counts)

    async def _keep_handing_over(self) -> None:
        while self._gathered or self._outgoing:
            await asyncio.sleep(GATHER_SECONDS)
            with suppress(RedisDown):
                await self._hand_over()
            TALLY_WAITING.labels(self._name).set(len(self._gathered) + len(self._outgoing))

    async def _hand_over(self) -> None:
        while self._gathered or self._outgoing:
            if not self._outgoing:
                self._number += 1
                keys = list(islice(self._gathered, MOST_AT_ONCE))
                self._outgoing = [(key, self._gathered.pop(key)) for key in keys]
            # Whatever becomes of the answer, these go out under this number and no other.
            counts = [part for counted in self._outgoing for part in counted]
            await self._pipe.run(self._gather, [self._waiting, self._sender], [self._number, SENDER_SECONDS, *counts])
            TALLIED.labels(self._name, "gathered").inc(sum(count for _, count in self._outgoing))
            self._outgoing = []
