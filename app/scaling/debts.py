"""What could not be told to somebody who was away, and is told as soon as they are back: the newest for each name.

Bounded, and only as durable as the process: whoever needs more leaves a message in the outbox as well.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress

from app.core.telemetry import CACHE_OWED
from app.scaling.redis_link import RedisDown

# What a write could not tell Redis is told again this often: with the time for one call well within 2 s of its return.
REPAY_EVERY = 0.25  # seconds
# Values whose write Redis does not know of yet; an instance writes far fewer in the longest outage that one sits out.
MOST_OWED = 10_000

Tell = Callable[[], Awaitable[None]]


class Debts:
    """What one process owes to Redis; `tell` raises RedisDown while it cannot be told."""

    def __init__(self) -> None:
        self._owed: OrderedDict[str, Tell] = OrderedDict()
        self._repaying: asyncio.Task[None] | None = None

    async def stop(self) -> None:
        """Try once more."""
        if self._repaying is not None:
            self._repaying.cancel()
            await asyncio.wait({self._repaying})
        with suppress(RedisDown):
            await self._repay()

    def owe(self, name: str, tell: Tell) -> None:
        """Tell about `name` as soon as that is possible, instead of what is owed of it so far."""
        self._owed[name] = tell
        self._owed.move_to_end(name)
        if len(self._owed) > MOST_OWED:
            self._owed.popitem(last=False)
        CACHE_OWED.set(len(self._owed))
        if self._repaying is None or self._repaying.done():
            self._repaying = asyncio.create_task(self._keep_repaying())

    async def _keep_repaying(self) -> None:
        while self._owed:
            await asyncio.sleep(REPAY_EVERY)
            with suppress(RedisDown):
                await self._repay()

    async def _repay(self) -> None:
        for name, tell in list(self._owed.items()):
            await tell()
            if self._owed.get(name) is tell:  # else a later write owes it anew
                del self._owed[name]
        CACHE_OWED.set(len(self._owed))
