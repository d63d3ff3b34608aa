"""What a process keeps of Redis in its own memory: bounded, at most 2 s old, dropped by push everywhere on a write.

A write announces the names that it makes obsolete and waits until every instance that listens has dropped them. An
instance that does not say so has lost the right to use what it keeps by the time the wait ends: that right is a lease
of `LEASE` seconds, renewed by PINGs on the connection on which the pushes come, which Redis answers in order.
"""

import asyncio
from collections import OrderedDict
from contextlib import suppress
from secrets import token_hex
from time import monotonic
from typing import Any

from app.core.settings import CacheSettings
from app.core.telemetry import NEAR_UNHEARD, logger
from app.scaling.pipe import Pipe
from app.scaling.redis_link import RedisDown

log = logger(__name__)

CHANNEL = "near"
# How long a write waits at most for an instance that hangs. Short enough not to be noticed by a person, and so long
# that three PINGs fit in: one that is late, on a busy machine, costs nothing.
LEASE = 0.3
PING_EVERY = LEASE / 3
# After that the connection is made anew. Longer than the lease, because a busy machine may be late without harm.
SILENT_SECONDS = 1.0
# If every push is lost, nothing is served that is older.
MOST_SECONDS = 2.0


class Near:
    """The memory of one process; `start` listens until `stop`.

    Args:
        pipe: to the Redis that pushes.
        settings: how many entries; 0 keeps nothing.
    """

    def __init__(self, pipe: Pipe, settings: CacheSettings) -> None:
        self._pipe = pipe
        self._most = settings.local_entries
        self._entries: OrderedDict[str, tuple[float, Any]] = OrderedDict()
        self._trusted_until = 0.0
        self._answered = 0.0
        self._replies = f"{CHANNEL}:{token_hex(8)}"
        self._number = 0
        self._answers: dict[int, asyncio.Semaphore] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self._listening: asyncio.Task[None] | None = None
        self.epoch = 0

    async def start(self) -> None:
        """Begin to listen."""
        self._listening = asyncio.create_task(self._listen())

    async def stop(self) -> None:
        """Listen no more; what is kept is not used any more."""
        self._trusted_until = 0.0
        tasks = {task for task in (self._listening, *self._answering) if task is not None}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def trusted(self) -> bool:
        """Return whether what is kept may be used now: no push can have been missed."""
        return monotonic() < self._trusted_until

    def get(self, name: str) -> Any:
        """Return what is kept under `name`, or None."""
        found = self._entries.get(name)
        if found is None:
            return None
        now = monotonic()
        if now >= self._trusted_until or now >= found[0]:
            return None
        return found[1]

    def keep(self, name: str, value: Any, epoch: int, seconds: float = MOST_SECONDS) -> None:
        """Keep what was asked for when `epoch` was current, unless something has been dropped since.

        A value that was read before a write must not be kept after that write's push has come.
        """
        if epoch != self.epoch or not self.trusted():
            return
        self._entries[name] = (monotonic() + min(seconds, MOST_SECONDS), value)
        self._entries.move_to_end(name)
        if len(self._entries) > self._most:
            self._entries.popitem(last=False)

    def drop(self, name: str) -> None:
        """Forget `name`, and whatever is being read at this moment."""
        self.epoch += 1
        self._entries.pop(name, None)

    async def forget(self, names: list[str]) -> None:
        """Delete names of one slot from Redis and from the memory of every instance.

        Raises:
            RedisDown: if Redis does not answer; whoever has lost it too uses its memory no more.
        """
        try:
            await self._pipe.ask(names[0], "DEL", *names)
            await asyncio.gather(*(self._tell(name) for name in names))
        except RedisDown:
            await self.give_up(names)
            raise

    async def told(self, name: str) -> None:
        """Have every instance drop `name`, whose new value Redis has; return once none can answer with the old one.

        Raises:
            RedisDown: if Redis does not answer; whoever has lost it too uses its memory no more.
        """
        try:
            await self._tell(name)
        except RedisDown:
            await self.give_up([name])
            raise

    async def give_up(self, names: list[str]) -> None:
        """Wait until whoever has lost Redis as we have has lost the right to use what it keeps."""
        for name in names:
            self.drop(name)
        await asyncio.sleep(max(0.0, self._trusted_until - monotonic()))

    async def _tell(self, name: str) -> None:
        """Announce a name and wait until each listener has dropped it or has lost the right to use it."""
        self._number += 1
        number = self._number
        answers = self._answers[number] = asyncio.Semaphore(0)
        try:
            # On the connections' own server PUBLISH counts its listeners, so all of them listen where it is sent.
            listeners = await self._pipe.ask(CHANNEL, "PUBLISH", CHANNEL, f"{self._replies} {number} {name}")
            async with asyncio.timeout(LEASE):
                for _ in range(listeners):
                    await answers.acquire()
        except TimeoutError:
            NEAR_UNHEARD.inc()
        finally:
            del self._answers[number]

    async def _listen(self) -> None:
        while True:
            try:
                await self._follow()
            except RedisDown as error:
                log.warning("pushes are lost", reason=str(error))
            self._distrust()
            await asyncio.sleep(PING_EVERY)

    async def _follow(self) -> None:
        line = await self._pipe.open(CHANNEL)
        self._answered = monotonic()
        try:
            line.listen(self._hear, CHANNEL, self._replies)
            while not line.lost.done():
                line.ping(str(monotonic()))
                await asyncio.wait({line.lost}, timeout=PING_EVERY)
                if monotonic() - self._answered > SILENT_SECONDS:
                    raise RedisDown("no answer to a PING")
        finally:
            line.cut()
        raise RedisDown("connection lost")

    def _hear(self, heard: Any) -> None:
        kind, *about = heard
        if kind == b"pong":
            # Redis has sent every push from before it read the PING, so nothing from before is missing.
            self._answered = monotonic()
            self._trusted_until = float(about[0]) + LEASE if self._most else 0.0
        elif kind == b"message":
            self._pushed(*about)

    def _pushed(self, channel: bytes, data: bytes) -> None:
        if channel == self._replies.encode():
            self._told(int(data))
            return
        replies, number, name = data.decode().split(" ", 2)
        self.drop(name)
        if replies == self._replies:
            self._told(int(number))
        else:
            answering = asyncio.create_task(self._answer(replies, number))
            self._answering.add(answering)
            answering.add_done_callback(self._answering.discard)

    async def _answer(self, replies: str, number: str) -> None:
        with suppress(RedisDown):  # then they wait until the lease is over
            await self._pipe.ask(CHANNEL, "PUBLISH", replies, number)

    def _told(self, number: int) -> None:
        answers = self._answers.get(number)
        if answers is not None:
            answers.release()

    def _distrust(self) -> None:
        self._trusted_until = 0.0
        self.epoch += 1
        self._entries.clear()
