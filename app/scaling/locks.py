"""One holder at a time over all processes: a Redis lock with a lease that is renewed and a fencing number that grows.

A lock with a lease can be lost while its holder still works (a long pause, a Redis that restarts). So losing it stops
the work, and the fencing number lets what the work writes refuse an older holder.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from redis.exceptions import LockError, RedisError

from app.core.telemetry import logger
from app.scaling.redis_link import RedisDown, RedisLink

log = logger(__name__)

LEASE = 30.0  # seconds that a holder may be silent before another takes over; renewed three times in it


class LockLost(Exception):  # a state of the world, not a fault
    """The lock went to somebody else, or nobody knows to whom; its work was stopped in the middle."""


class Locks:
    """Locks of one process.

    Args:
        link: the Redis that keeps them.
    """

    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def run_alone(self, name: str, work: Callable[[int], Awaitable[None]]) -> bool:
        """Run `work` with its fencing number to its end; False, and nothing ran, if somebody else holds `name`.

        Raises:
            RedisDown: if it cannot be known who holds the lock; then nothing ran.
            LockLost: if the lease could not be renewed; the work was cancelled and has ended.
        """
        lock = self._link.client.lock(f"lock:{name}", timeout=LEASE, blocking=False)
        async with self._link.calling("lock") as client:
            if not await lock.acquire():
                return False
            fence = int(await client.incr(f"fence:{name}"))
        working = asyncio.ensure_future(work(fence))
        renewing = asyncio.create_task(self._renew(name, lock))
        try:
            await asyncio.wait({working, renewing}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)
                raise LockLost(name)
            await working
            return True
        finally:
            working.cancel()
            renewing.cancel()
            # Work that is being cancelled may still write: the lock is held until it has ended.
            await asyncio.gather(working, renewing, return_exceptions=True)
            with suppress(LockError, RedisError, OSError):
                await lock.release()

    async def _renew(self, name: str, lock: object) -> None:
        while True:
            await asyncio.sleep(LEASE / 3)
            try:
                async with self._link.calling("lock"):
                    await lock.reacquire()  # type: ignore[attr-defined]  # redis ships the class without its name
            except (LockError, RedisDown):
                log.warning("lock lost, stopping its work", lock=name)
                return
