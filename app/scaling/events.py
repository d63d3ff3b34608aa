"""Events for other services and for customers who watch: what happens to orders and profiles, in a Redis Stream.

The stream is a copy for subscribers, bounded, at least once; the outbox stays the truth. `docs/schemas/event.v1.json`
describes an entry; readers drop an `id` that they have seen. An instance reads the stream once for all who watch
something through it, and only while somebody does.
"""

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from app.core import wire
from app.core.ids import created_at
from app.core.telemetry import logger
from app.scaling.outbox import Message
from app.scaling.redis_link import RedisDown, RedisLink

log = logger(__name__)

STREAM = "events"
SCHEMA = 1  # grows only with a change that a reader of the one before would misread
PUBLIC = ("order.", "profile.")  # what other services may follow; the rest is our own upkeep
KEPT = 100_000  # entries, about a day at one a second; a reader that is further behind starts over from the API

# How often an instance asks for what is new. Not a blocking read: that would leave an answer only the rest of Redis's
# quarter of a second, and a late one would count against the breaker that the cache and the sessions share.
ASK_EVERY = 0.1
MOST_AT_ONCE = 1000  # entries a read; a tenth of a second holds fewer unless something is being caught up on
RECONNECT_SECONDS = 1.0


class Watch:
    """One listener for one subject.

    Attributes:
        version: the newest version of the subject that was told of; 0 before anything was.
    """

    def __init__(self) -> None:
        self.version = 0
        self._told = asyncio.Event()

    def tell(self, version: int = 0) -> None:
        """Wake whoever waits: something happened to the subject, or may have."""
        self.version = max(self.version, version)
        self._told.set()

    async def wait(self, seconds: float) -> None:
        """Return once something has happened since the last wait, at the latest after `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self._told.wait()
        except TimeoutError:
            return
        self._told.clear()


class EventStream:
    """The stream, for the relay that writes it and for instances whose callers watch something.

    Args:
        link: the Redis that holds it.
        draining: set once the process is told to go.

    Attributes:
        live: whether watches are told of what happens. If not, whoever watches has to look by themselves.
    """

    def __init__(self, link: RedisLink, draining: asyncio.Event) -> None:
        self._link = link
        self._draining = draining
        self._watches: dict[UUID, set[Watch]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self.live = False

    async def stop(self) -> None:
        """End what reads for watchers; they are woken no more."""
        working = {task for task in (self._reader, self._ending) if task is not None}
        for task in working:
            task.cancel()
        if working:
            await asyncio.wait(working)

    async def publish(self, messages: Iterable[Message]) -> None:
        """Append the messages, in one round trip.

        Raises:
            RedisDown: if the stream does not take them; publish them again, readers drop doubles by id.
        """
        public = [message for message in messages if message.event.startswith(PUBLIC)]
        if not public:
            return
        async with self._link.calling("events") as client:
            pipeline = client.pipeline(transaction=False)
            for message in public:
                pipeline.xadd(STREAM, entry_of(message), maxlen=KEPT, approximate=True)
            await pipeline.execute()

    @contextmanager
    def watching(self, subject_id: UUID) -> Iterator[Watch]:
        """Yield a watch that is told of every event about the subject inside the block, and when the process drains.

        Look at the subject once inside the block: what happened before the watch began, nobody tells.
        """
        watch = Watch()
        self._watches.setdefault(subject_id, set()).add(watch)
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read(), name="events")
        if self._ending is None:
            self._ending = asyncio.create_task(self._wake_at_the_end(), name="events at the end")
        try:
            yield watch
        finally:
            self._watches[subject_id].discard(watch)
            if not self._watches[subject_id]:
                del self._watches[subject_id]

    def _wake_all(self) -> None:
        for watches in self._watches.values():
            for watch in watches:
                watch.tell()

    async def _wake_at_the_end(self) -> None:
        await self._draining.wait()
        self._wake_all()

    async def _read(self) -> None:
        """Read for as long as somebody watches; it ends between two questions, not in the middle of one."""
        while self._watches:
            try:
                position = await self._newest()
                self.live = True
                # Until now nobody was told of anything.
                self._wake_all()
                while self._watches:
                    position = await self._hear(position)
            except RedisDown as error:
                if self.live:
                    log.warning("watchers look for themselves", reason=str(error))
                    self.live = False
                    self._wake_all()
                await asyncio.sleep(RECONNECT_SECONDS)
        self.live = False

    async def _newest(self) -> bytes:
        async with self._link.calling("events") as client:
            entries = await client.xrevrange(STREAM, count=1)
        return entries[0][0] if entries else b"0"

    async def _hear(self, position: bytes) -> bytes:
        """Tell of what came after `position`, and return up to where that was."""
        async with self._link.calling("events") as client:
            # `(` leaves the entry itself out.
            entries = await client.xrange(STREAM, min=b"(" + position, count=MOST_AT_ONCE)
        for _, fields in entries:
            for watch in self._watches.get(UUID(fields[b"subject_id"].decode()), ()):
                watch.tell(wire.decode(fields[b"payload"]).get("version", 0))
        if len(entries) < MOST_AT_ONCE:
            await asyncio.sleep(ASK_EVERY)
        return entries[-1][0] if entries else position


def entry_of(message: Message) -> dict[str, Any]:
    """Return what the stream holds of a message."""
    return {
        "schema": SCHEMA,
        "id": str(message.id),
        "event": message.event,
        "at": wire.rfc3339(created_at(message.id)),
        "profile_id": str(message.profile_id),
        "subject_id": str(message.subject_id),
        "payload": wire.encode(message.payload),
    }
