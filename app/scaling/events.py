"""Events for other services: what happens to orders and profiles also goes to a Redis Stream, for any number of groups.

The stream is a copy for subscribers, bounded, at least once; the outbox stays the truth. An entry has the fields
`schema` (1), `id`, `event`, `subject_id` and `payload` (JSON); readers drop an `id` that they have seen.
"""

from collections.abc import Iterable

from app.core import wire
from app.scaling.outbox import Message
from app.scaling.redis_link import RedisLink

STREAM = "events"
PUBLIC = ("order.", "profile.")  # what other services may follow; the rest is our own upkeep
KEPT = 100_000  # entries, about a day at one a second; a reader that is further behind starts over from the API


class EventStream:
    """The stream, for the relay that writes it.

    Args:
        link: the Redis that holds it.
    """

    def __init__(self, link: RedisLink) -> None:
        self._link = link

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
                pipeline.xadd(
                    STREAM,
                    {
                        "schema": 1,
                        "id": str(message.id),
                        "event": message.event,
                        "subject_id": str(message.subject_id),
                        "payload": wire.encode(message.payload),
                    },
                    maxlen=KEPT,
                    approximate=True,
                )
            await pipeline.execute()
