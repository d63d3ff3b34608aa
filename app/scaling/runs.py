"""Who is at a piece of work right now, and how often somebody died of it.

A broker may hold several copies of one message, and after an outage hands them out at the same moment. Before a copy
begins it takes the work's run, a lease in Redis under the copy's own name: another copy finds it taken, while the same
copy, which the broker delivers again only when its process is gone, takes it over at once and counts as a death.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from app.scaling.pipe import Pipe
from app.scaling.redis_link import RedisDown

# A message that kills its processes is delivered again within milliseconds, and after a killed worker within minutes;
# an hour covers both, and what is older says nothing about the next run.
REMEMBERED_SECONDS = 3600

# {1, deaths before this run} or {0, milliseconds that another copy may still need}.
_BEGIN = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return {0, redis.call('PTTL', KEYS[1])} end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
local begun = redis.call('INCR', KEYS[2])
redis.call('EXPIRE', KEYS[2], ARGV[3])
return {1, begun - 1}
"""
_END = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1], KEYS[2]) end
return 1
"""


class Taken(Exception):  # a state of the world, not a fault
    """Another copy is at it; `seconds` from now it is done or dead."""

    def __init__(self, name: str, seconds: float) -> None:
        super().__init__(f"another copy is at {name}")
        self.seconds = seconds


class Runs:
    """The runs of all processes.

    Args:
        pipe: to the Redis that keeps them. Without it every copy may begin: receipts still keep what is written in our
            database from happening twice, and keys what happens at others.
    """

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._begin = pipe.script(_BEGIN)
        self._end = pipe.script(_END)

    @asynccontextmanager
    async def alone(self, name: str, copy: str, seconds: float) -> AsyncIterator[int]:
        """Take the run of `name` for the block, and yield how many processes died since it was last ended.

        Args:
            name: of the work, the same for all copies.
            copy: who asks; whoever has the run under the same name is dead.
            seconds: after which the block has ended, or somebody has killed its process.

        Raises:
            Taken: at once, if another copy has the run.
        """
        keys = [f"run:{{{name}}}", f"deaths:{{{name}}}"]
        deaths = 0
        with suppress(RedisDown):
            begun, number = await self._pipe.run(self._begin, keys, [copy, int(seconds * 1000), REMEMBERED_SECONDS])
            if not begun:
                raise Taken(name, number / 1000)
            deaths = int(number)
        try:
            yield deaths
        finally:
            # Also when the beginning went unanswered: it may have arrived all the same.
            with suppress(RedisDown):
                await self._pipe.run(self._end, keys, [copy])
