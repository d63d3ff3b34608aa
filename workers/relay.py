"""The relay: carries what has committed from the outbox to the tasks that follow from it, and to the event stream.

It may stop or be killed at any point and any number of relays may run: a row stays due until its tasks have left their
receipts. Order between messages is not promised; tasks check the state that they find.
"""

import asyncio
import random
import signal
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import timedelta
from itertools import groupby
from uuid import UUID

import uvloop

from app.core import context, tracing
from app.core.errors import Unavailable
from app.core.settings import Settings, load_settings
from app.core.telemetry import (
    DEAD_LETTERS_OPEN,
    OUTBOX_OLDEST,
    OUTBOX_PUBLISHED,
    OUTBOX_WAITING,
    QUEUE_LENGTH,
    QUEUE_OLDEST,
    configure_logging,
    logger,
)
from app.core.tracing import Kind
from app.scaling import outbox
from app.scaling.lifecycle import Phase
from app.scaling.outbox import Message
from app.scaling.redis_link import RedisDown
from app.wiring import Resources, beating, open_resources
from workers import metrics
from workers.broker import BrokerDown, Posting, Publisher, create_celery
from workers.task import Delivery

log = logger(__name__)

# Which tasks follow from which event. An event without tasks is done once it is in the event stream.
ROUTES: dict[str, tuple[str, ...]] = {
    "order.placed": ("orders.reserve_stock",),
    "order.reserved": ("orders.authorise_payment",),
    "order.payment_pending": (),
    "order.declined": ("orders.release_stock",),
    "order.confirmed": (
        "orders.capture_payment",
        "invoices.issue",
        "orders.notify_warehouse",
        "reports.record_sale",
    ),
    "order.invoiced": ("emails.confirm_order",),
    "order.rejected": (),
    "order.cancelling": ("orders.undo",),
    "order.cancelled": ("emails.confirm_cancellation",),
    "profile.created": (),
    "profile.updated": ("upkeep.refresh_profile",),
    "profile.erased": ("upkeep.end_sessions", "upkeep.erase_avatar", "upkeep.refresh_profile", "invoices.forget_buyer"),
    "product.changing": ("upkeep.refresh_product",),
    "avatar.expected": ("upkeep.accept_avatar",),
    "job.asked": ("reports.make",),
    "session.ended": ("upkeep.forget_sessions",),
}

# Waits for a person, who may take minutes or never come: were it backlog, anybody could have workers added and somebody
# woken, by announcing pictures and sending none.
AWAITED = frozenset({"avatar.expected"})

# With each try a message without an outcome waits twice as long, up to 4 times `stale_after`: an hour without workers
# costs a quarter of the claims, and what was lost still comes again within minutes.
LONGEST_WAIT = 4

# A broker or a primary that is down is asked again within this many seconds, at first much sooner.
LONGEST_PAUSE = 2.0
FIRST_PAUSE = 0.1

# Prometheus asks every 15 s; what it is told then is at most this old.
MEASURE_SECONDS = 5.0

# A message that comes again was perhaps streamed before; this long that is remembered.
STREAMED_SECONDS = 24 * 3600


class Relay:
    """One relay over all shards.

    Args:
        resources: the database that it reads and the stream that it feeds.
        publisher: hands tasks to the broker.
    """

    def __init__(self, resources: Resources, publisher: Publisher) -> None:
        self._resources = resources
        self._publisher = publisher
        self._settings = resources.settings.workers
        # Publishing blocks. One thread, because a connection to the broker belongs to one thread.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="publish")

    async def serve(self, stopping: asyncio.Event) -> None:
        """Relay every shard until `stopping` is set; a batch that is under way is finished."""
        try:
            async with asyncio.TaskGroup() as group:
                for shard in self._resources.database.shards:
                    group.create_task(self._follow(shard.number, stopping))
                    group.create_task(self._measure(shard.number, stopping))
                group.create_task(self._measure_queues(stopping))
        finally:
            self._thread.submit(self._publisher.close)
            self._thread.shutdown()

    async def _follow(self, shard: int, stopping: asyncio.Event) -> None:
        failures = 0
        while not stopping.is_set():
            try:
                if failures:
                    # A claim counts as a try: nothing is claimed for a broker that does not answer.
                    await asyncio.get_running_loop().run_in_executor(self._thread, self._publisher.connect)
                count = await self.relay(shard)
            except (Unavailable, BrokerDown) as error:
                failures += 1
                if failures == 1:
                    log.warning("relay waits", shard=shard, reason=f"{type(error).__name__}: {error}")
                pause = random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(failures, 10)))
            else:
                if failures:
                    log.info("relay goes on", shard=shard, failures=failures)
                failures = 0
                if self._resources.lifecycle.phase is Phase.STARTING:
                    self._resources.lifecycle.enter(Phase.READY)
                # A full batch means that more is waiting. Jitter keeps several relays from asking in step.
                full = count == self._settings.relay_batch
                pause = 0.0 if full else self._settings.relay_poll * random.uniform(0.5, 1.5)
            with suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), pause)

    async def _measure(self, shard: int, stopping: asyncio.Event) -> None:
        """Tell what waits, for those who decide about the number of workers; every relay tells of all shards."""
        label = str(shard)
        reader = self._resources.database.readers()[shard]
        while not stopping.is_set():
            # Without the database the last number stays: nobody has another one.
            with suppress(Unavailable):
                backlog = await outbox.backlog(reader, besides=AWAITED)
                OUTBOX_WAITING.labels(label).set(backlog.messages)
                OUTBOX_OLDEST.labels(label).set(backlog.oldest)
                DEAD_LETTERS_OPEN.labels(label).set(backlog.letters)
            with suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), MEASURE_SECONDS)

    async def _measure_queues(self, stopping: asyncio.Event) -> None:
        """Tell what waits in the broker: it is there already, and workers have not come to it."""
        while not stopping.is_set():
            with suppress(BrokerDown):
                loop = asyncio.get_running_loop()
                waiting = await loop.run_in_executor(self._thread, self._publisher.waiting)
                for queue, (length, oldest) in waiting.items():
                    QUEUE_LENGTH.labels(queue).set(length)
                    QUEUE_OLDEST.labels(queue).set(oldest)
            with suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), MEASURE_SECONDS)

    async def relay(self, shard: int) -> int:
        """Carry one batch of a shard's due messages; return how many there were.

        Raises:
            Unavailable: if the primary is down.
            BrokerDown: if the broker took nothing; the messages are due again soon.
        """
        with context.working(context.Work(request_id="-")) as work:
            claimed, receipts = await self._claim(shard)
            with ExitStack() as spans:
                messages = [_continued(message, spans) for message in claimed]
                if messages:
                    await self._carry(shard, messages, receipts, work.positions)
        return len(messages)

    async def _carry(
        self, shard: int, messages: Sequence[Message], receipts: set[tuple[UUID, str]], positions: dict[int, int]
    ) -> None:
        """Hand claimed messages to the stream, and to the tasks that have left no receipt yet."""
        streamed = await self._stream(messages)
        finished: list[Message] = []
        unfinished: list[Message] = []
        postings: list[Posting] = []
        for message in messages:
            tasks = ROUTES.get(message.event)
            if tasks is None:
                # A newer version of the service wrote it: its relay will know what to do with it.
                log.error("event without a route", relayed_event=message.event, message_id=str(message.id))
                continue
            # A message that the stream has not taken counts one part more, which no task leaves a receipt for:
            # so it cannot be settled before the stream has it.
            parts = len(tasks) if streamed else len(tasks) + 1
            missing = [task for task in tasks if (message.id, task) not in receipts]
            if missing:
                unfinished.append(message)
            elif streamed:
                finished.append(message)
            for task in missing:
                delivery = Delivery(task, message, parts, positions)
                postings.append(Posting(task, delivery.to_json(), str(message.id), self._handed_at(message)))
        if finished:
            await self._settle(shard, finished)
        if postings:
            await self._publish(shard, unfinished, postings)

    async def _claim(self, shard: int) -> tuple[Sequence[Message], set[tuple[UUID, str]]]:
        """Claim a batch, and say what of it is done already.

        The claim itself sets when the messages are due again if nobody finishes them. To mark them as sent after
        publishing would be a second write for each, and would undo the deferring of a task that was quick to fail.
        """
        async with self._resources.database.writer_of(shard) as writer:
            messages = await outbox.claim(writer, batch=self._settings.relay_batch, lease=self._wait(1))
            repeated = sorted((message for message in messages if message.tries > 1), key=_tries)
            receipts = await outbox.receipted(writer, repeated) if repeated else set()
            for tries, group in groupby(repeated, key=_tries):
                await outbox.sent(writer, group, again_after=self._wait(tries))
        return messages, receipts

    def _wait(self, tries: int) -> timedelta:
        return timedelta(seconds=self._settings.stale_after * min(LONGEST_WAIT, 1 << min(tries - 1, 10)))

    def _handed_at(self, message: Message) -> float | None:
        """Return when a message was handed over the last time; of one that was deferred, too early a moment."""
        if message.tries == 1 or message.due_at is None:
            return None
        return (message.due_at - self._wait(message.tries - 1)).timestamp()

    async def _publish(self, shard: int, messages: list[Message], postings: list[Posting]) -> None:
        try:
            loop = asyncio.get_running_loop()
            handed = await loop.run_in_executor(self._thread, self._publisher.publish, postings)
        except BrokerDown:
            # Without this they would come again too, but only after `stale_after`.
            async with self._resources.database.writer_of(shard) as writer:
                again_after = timedelta(seconds=random.uniform(FIRST_PAUSE, LONGEST_PAUSE))
                await outbox.sent(writer, messages, again_after=again_after)
            raise
        published = {posting.label for posting in handed}
        for message in messages:
            if str(message.id) in published:
                OUTBOX_PUBLISHED.labels(message.event).inc()

    async def _settle(self, shard: int, messages: Iterable[Message]) -> None:
        async with self._resources.database.writer_of(shard) as writer:
            await outbox.finish(writer, messages)

    async def _stream(self, messages: Sequence[Message]) -> bool:
        """Feed the stream with what it does not have; False if it takes nothing now, and tasks go on all the same."""
        try:
            repeated = [message for message in messages if message.tries > 1]
            known = await self._streamed(repeated) if repeated else set()
            await self._resources.events.publish(message for message in messages if message.id not in known)
            if repeated:
                await self._remember(message for message in repeated if message.id not in known)
        except RedisDown:
            return False
        return True

    async def _streamed(self, messages: Sequence[Message]) -> set[UUID]:
        async with self._resources.redis.calling("events") as client:
            marks = await client.mget([_mark(message) for message in messages])
        return {message.id for message, mark in zip(messages, marks, strict=True) if mark is not None}

    async def _remember(self, messages: Iterable[Message]) -> None:
        async with self._resources.redis.calling("events") as client:
            pipeline = client.pipeline(transaction=False)
            for message in messages:
                pipeline.set(_mark(message), 1, ex=STREAMED_SECONDS)
            await pipeline.execute()


def _continued(message: Message, spans: ExitStack) -> Message:
    """Begin the relay's span of a message that is traced, until `spans` ends; what follows from it comes below that."""
    if message.traceparent is None:
        return message
    name = f"relay {message.event}"
    span = tracing.resume(message.traceparent, name, Kind.PRODUCER, message_id=str(message.id), tries=message.tries)
    if span is None:
        return message
    # Not the one at hand: a batch is of many traces.
    spans.push(span.leave)
    return replace(message, traceparent=span.traceparent)


def _tries(message: Message) -> int:
    return message.tries


def _mark(message: Message) -> str:
    return f"streamed:{message.id}"


def run() -> None:
    """Run a relay until SIGTERM or SIGINT.

    Raises:
        SettingsError: naming every bad setting.
    """
    settings = load_settings()
    configure_logging(settings.service, "relay")
    metrics.serve(settings.service.metrics_port)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    with tracing.exporting(settings, "relay"):
        async with open_resources(settings) as resources:

            def stop() -> None:
                if not stopping.is_set():
                    resources.lifecycle.enter(Phase.DRAINING)
                    stopping.set()

            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, stop)
            async with beating(resources, "relay"):
                await Relay(resources, Publisher(create_celery(settings))).serve(stopping)
