"""A consumer group on the event stream, as another service would have one; `scaleout consume-events GROUP` runs it.

The consumers of a group share its events; each event is handled at least once, and once unless a consumer dies between
handling it and saying so. What a consumer held when it died goes to another one. An effect that must happen once keeps
the event's id in its own transaction; here the ids that a group has handled are kept in Redis for a day.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from redis.exceptions import ResponseError

from app.core import wire
from app.core.telemetry import logger
from app.scaling.events import ASK_EVERY, SCHEMA, STREAM
from app.scaling.redis_link import RedisDown, RedisLink

log = logger(__name__)

BATCH = 100  # events that one consumer holds; what is handled twice after its death is at most one of them
SEEN_SECONDS = 24 * 3600  # as long as the relay may publish a message again
# One consumer may be killed by chance; five in a row, at the same event, are not.
MOST_DELIVERIES = 5
RECONNECT_SECONDS = 1.0

Entry = tuple[bytes, dict[bytes, bytes]]


class UnknownSchema(ValueError):
    """The stream has events of a schema that this code does not know; it needs an update before it may go on."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event, as `docs/schemas/event.v1.json` describes it."""

    schema: int
    id: str
    event: str
    at: str
    profile_id: str
    subject_id: str
    payload: dict[str, Any]

    @classmethod
    def read(cls, fields: dict[bytes, bytes]) -> "Event":
        """Read an entry of the stream.

        Raises:
            UnknownSchema: if it is of a later schema.
        """
        text = {name.decode(): value.decode() for name, value in fields.items()}
        if int(text["schema"]) > SCHEMA:
            raise UnknownSchema(f"The stream has events of schema {text['schema']}; this knows {SCHEMA}. Update it.")
        known = {name: text[name] for name in ("id", "event", "at", "profile_id", "subject_id")}
        return cls(schema=int(text["schema"]), payload=wire.decode(text["payload"]), **known)

    def to_json(self) -> dict[str, Any]:
        """Return it as one JSON object."""
        return asdict(self)


Handle = Callable[[Event], Awaitable[None]]


class Consumer:
    """One consumer of a group.

    Args:
        link: the Redis that holds the stream.
        group: whose events these are; each group gets all of them.
        name: of this consumer in the group.
        handle: does the work for one event; what it raises ends the consumer, and the event goes to another one.
        claim_after: seconds after which what another consumer holds is taken for abandoned.
    """

    def __init__(self, link: RedisLink, group: str, name: str, handle: Handle, *, claim_after: float = 30.0) -> None:
        self._link = link
        self._group = group
        self._name = name
        self._handle = handle
        self._claim_after = claim_after
        self._claim_at = 0.0

    async def join(self, *, from_start: bool) -> None:
        """Make the group if it is not there yet: from the oldest event that the stream has, or from now on.

        Raises:
            RedisDown: if Redis does not answer.
        """
        async with self._link.calling("events") as client:
            try:
                await client.xgroup_create(STREAM, self._group, id="0" if from_start else "$", mkstream=True)
            except ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise

    async def serve(self, stopping: asyncio.Event) -> None:
        """Handle events until `stopping` is set; a Redis that is down is waited for."""
        while not stopping.is_set():
            try:
                handled = await self.step()
            except RedisDown as error:
                log.warning("consumer waits", group=self._group, reason=str(error))
                await asyncio.sleep(RECONNECT_SECONDS)
            else:
                if not handled:
                    await asyncio.sleep(ASK_EVERY * random.uniform(0.5, 1.5))

    async def step(self) -> int:
        """Handle one batch, first of what others have abandoned, and return how many entries it had.

        Raises:
            RedisDown: if Redis does not answer; what was handled and not confirmed comes again.
        """
        entries = await self._abandoned() or await self._fresh()
        known = await self._seen([fields[b"id"] for _, fields in entries])
        for entry, fields in entries:
            event = Event.read(fields)
            if event.id not in known:
                await self._handle(event)
                known.add(event.id)
            await self._done(entry, event.id)
        return len(entries)

    async def _fresh(self) -> Sequence[Entry]:
        async with self._link.calling("events") as client:
            answer = await client.xreadgroup(self._group, self._name, {STREAM: ">"}, count=BATCH)
        # RESP3, which our connections speak: the streams by name, each a list of pages.
        pages = answer.get(STREAM.encode(), ())
        return [entry for page in pages for entry in page]

    async def _abandoned(self) -> Sequence[Entry]:
        now = asyncio.get_running_loop().time()
        if now < self._claim_at:
            return ()
        idle = int(self._claim_after * 1000)
        async with self._link.calling("events") as client:
            pending = await client.xpending_range(STREAM, self._group, min="-", max="+", count=BATCH, idle=idle)
            if not pending:
                self._claim_at = now + self._claim_after / 2
                return ()
            times = {each["message_id"]: each["times_delivered"] for each in pending}
            claimed = await client.xclaim(STREAM, self._group, self._name, idle, list(times))
        entries: list[Entry] = [entry for entry in claimed if entry[1]]
        for entry in times.keys() - {entry for entry, _ in entries}:
            await self._drop_if_cut(entry)
        return [entry for entry in entries if not await self._is_poison(entry, times[entry[0]])]

    async def _drop_if_cut(self, entry: bytes) -> None:
        """Forget an entry that the stream was cut past; it may also be that another consumer was faster."""
        async with self._link.calling("events") as client:
            if await client.xrange(STREAM, min=entry, max=entry):
                return
        log.error("event lost, start over from the API", group=self._group, entry=entry.decode())
        await self._done(entry, None)

    async def _is_poison(self, entry: Entry, deliveries: int) -> bool:
        if deliveries < MOST_DELIVERIES:
            return False
        log.error("event given up", group=self._group, entry=entry[0].decode(), fields=str(entry[1]))
        await self._done(entry[0], None)
        return True

    async def _seen(self, ids: Sequence[bytes]) -> set[str]:
        if not ids:
            return set()
        async with self._link.calling("events") as client:
            marks = await client.mget([self._mark(each.decode()) for each in ids])
        return {each.decode() for each, mark in zip(ids, marks, strict=True) if mark is not None}

    async def _done(self, entry: bytes, event_id: str | None) -> None:
        async with self._link.calling("events") as client:
            # The mark first: between the two the event comes again and is known.
            if event_id is not None:
                await client.set(self._mark(event_id), 1, ex=SEEN_SECONDS)
            await client.xack(STREAM, self._group, entry)

    def _mark(self, event_id: str) -> str:
        # In one slot for a group, so that one question asks for many.
        return f"consumed:{{{self._group}}}:{event_id}"
