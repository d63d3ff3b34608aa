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

from redis.exceptions import RedisError

from app.core.settings import CacheSettings
from app.core.telemetry import NEAR_UNHEARD, logger
from app.scaling.redis_link import RedisDown, RedisLink

log = logger(__name__)

CHANNEL = "near"
# How long a write waits at most for an instance that hangs. Short enough not to be noticed by a person, and so long
# that three PINGs fit in: one that is late, on a busy machine, costs nothing.
LEASE = 0.3
PING_EVERY = LEASE / 3
# If every push is lost, nothing is served that is older.
MOST_SECONDS = 2.0


class Near:
    """The memory of one process; `start` listens until `stop`.

    Args:
        link: the Redis that pushes.
        settings: how many entries; 0 keeps nothing.
    """

    def __init__(self, link: RedisLink, settings: CacheSettings) -> None:
        self._link = link
        self._most = settings.local_entries
        self._entries: OrderedDict[str, tuple[float, Any]] = OrderedDict()
        self._trusted_until = 0.0
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
        """Delete names from Redis and from the memory of every instance.

        Raises:
            RedisDown: if Redis does not answer; whoever has lost it too uses its memory no more.
        """
        numbered = [self.announcement(name) for name in names]
        try:
            async with self._link.calling("near") as client:
                pipeline = client.pipeline(transaction=False)
                pipeline.delete(*names)
                for _, text in numbered:
                    pipeline.publish(CHANNEL, text)
                _, *listeners = await pipeline.execute()
        except RedisDown:
            for (number, _), name in zip(numbered, names, strict=True):
                await self.unheard(number, name)
            raise
        for (number, _), count in zip(numbered, listeners, strict=True):
            await self.dropped(number, count)

    def announcement(self, name: str) -> tuple[int, bytes]:
        """Return the number and the text of a message for `CHANNEL`, to be published in one step with the change.

        `dropped`, or `unheard` if the publishing failed, must follow.
        """
        self._number += 1
        self._answers[self._number] = asyncio.Semaphore(0)
        return self._number, f"{self._replies} {self._number} {name}".encode()

    async def dropped(self, number: int, listeners: int) -> None:
        """Wait until each of `listeners`, as PUBLISH counted them, has dropped the name or lost the right to use it."""
        answers = self._answers[number]
        try:
            async with asyncio.timeout(LEASE):
                for _ in range(listeners):
                    await answers.acquire()
        except TimeoutError:
            NEAR_UNHEARD.inc()
        finally:
            del self._answers[number]

    async def unheard(self, number: int, name: str) -> None:
        """Wait instead until whoever lost Redis as we did has lost the right to use what it keeps."""
        del self._answers[number]
        self.drop(name)
        await asyncio.sleep(max(0.0, self._trusted_until - monotonic()))

    async def _listen(self) -> None:
        while True:
            try:
                await self._follow()
            except (RedisError, OSError, TimeoutError) as error:
                log.warning("pushes are lost", reason=type(error).__name__)
            self._distrust()
            await asyncio.sleep(PING_EVERY)

    async def _follow(self) -> None:
        async with self._link.client.pubsub() as channel:
            await channel.subscribe(CHANNEL, self._replies)
            asked, answered = monotonic(), True
            await channel.ping(str(asked))
            while True:
                message = await channel.get_message(timeout=PING_EVERY)
                now = monotonic()
                if message is not None:
                    if message["type"] == "pong":
                        # Redis has sent every push from before it read the PING, so nothing from before is missing.
                        self._trusted_until = float(message["data"]) + LEASE if self._most else 0.0
                        answered = True
                    elif message["type"] == "message":
                        self._hear(message["channel"], message["data"])
                if now - asked >= PING_EVERY and answered:
                    asked, answered = now, False
                    await channel.ping(str(asked))
                elif not answered and now - asked > LEASE:
                    raise TimeoutError

    def _hear(self, channel: bytes, data: bytes) -> None:
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
            async with self._link.calling("near") as client:
                await client.publish(replies, number)

    def _told(self, number: int) -> None:
        answers = self._answers.get(number)
        if answers is not None:
            answers.release()

    def _distrust(self) -> None:
        self._trusted_until = 0.0
        self.epoch += 1
        self._entries.clear()
