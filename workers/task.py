"""The one wrapper of every task: a receipt, one transaction, and a rule for each kind of error.

A task's effects outside (a charge, an object, a mail) come first and are idempotent by a key that follows from the
order; its effects in the database, the receipt and what it tells others are one transaction, `once`. Delivered twice,
it is dropped by its receipt; failed, it is deferred or given up:

    another copy of it is under way       deferred until that one has ended
    a dependency is down, full or slow    deferred, as often as it takes
    a ServiceError that no retry mends    dead letter at once
    anything unexpected                   deferred, after `max_tries` such failures of the task a dead letter
    the process dies of it                delivered again, after `MOST_LOST` such ends a dead letter

Deferring means a later due time on the outbox row. Celery's own retry is not used: a message with an ETA sits in the
memory of a worker, meets the broker's visibility timeout and is then delivered twice; a row survives everything.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from time import perf_counter
from typing import Any

from app.core import context, tracing
from app.core.errors import RateLimited, ServiceError, TimedOut, Unavailable
from app.core.telemetry import DEAD_LETTERS, TASK_SECONDS, TASKS, logger
from app.scaling import outbox
from app.scaling.database import Writer
from app.scaling.outbox import Message
from app.scaling.redis_link import RedisDown
from app.scaling.runs import Taken
from app.wiring import Resources

log = logger(__name__)

# The first try again comes while the customer still watches; after six the waits have reached 30 s, which is as long
# as an order may lie after its provider has come back. Full jitter spreads a backlog over that time.
FIRST_DELAY = 0.5  # seconds
LONGEST_DELAY = 30.0  # seconds

# Calls to dependencies end this much before the task does, so that a slow dependency is seen as one and not as a task
# that hangs.
MARGIN_SECONDS = 1.0

# What says that a dependency is ill rather than that the task is wrong. OSError includes lost connections.
WAITS_FOR = (Unavailable, TimedOut, RateLimited, RedisDown, OSError)

LONGEST_ERROR = 2000  # characters of an error that a dead letter keeps

# One process may be killed by chance, and a second in a bad deploy; that one message meets it five times is no chance.
MOST_LOST = 5

# A task ends itself at its time limit. A child whose loop no longer turns is killed by Celery this much later.
HARD_MARGIN_SECONDS = 10.0


class Outcome(StrEnum):
    """How a run ended, as in the metric `tasks_total`."""

    DONE = "done"
    DROPPED = "dropped"  # its receipt was there already
    DEFERRED = "deferred"  # the row is due again later
    DEAD = "dead"  # given up, a dead letter tells of it
    FAILED = "failed"  # a chore that met a fault of ours; a task is deferred or dead then
    UNDECIDED = "undecided"  # the database is down; the row becomes due again by itself


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message on its way to one of its tasks.

    Attributes:
        task: the task's name.
        message: what happened.
        parts: how many receipts settle the message.
        positions: shard -> position that reads must have reached to see what the message tells of.
        copy: what the broker calls this copy; it keeps its name when it is delivered again. Empty on its way there.
        redelivered: whether the broker has delivered this copy before.
    """

    task: str
    message: Message
    parts: int
    positions: dict[int, int]
    copy: str = ""
    redelivered: bool = False

    @property
    def repeated(self) -> bool:
        """Whether the task may have run for this message before."""
        return self.redelivered or self.message.tries > 1

    def to_json(self) -> dict[str, Any]:
        """Return what travels through the broker; the task's name travels beside it."""
        return {"message": self.message.to_json(), "parts": self.parts, "positions": list(self.positions.items())}

    @classmethod
    def from_json(cls, task: str, value: dict[str, Any], *, copy: str, redelivered: bool) -> "Delivery":
        """Read a delivery back."""
        message = Message.from_json(value["message"])
        return cls(task, message, value["parts"], dict(value["positions"]), copy, redelivered)


Handler = Callable[[Resources, Delivery], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Task:
    """A named handler with a time limit.

    Attributes:
        name: `queue.verb_noun`; the part before the dot is its queue.
        seconds: after which a run is cancelled; below the broker's visibility timeout by far.
        handler: does the work.
    """

    name: str
    seconds: float
    handler: Handler

    @property
    def longest(self) -> float:
        """Seconds after which a run has ended, if need be with its process."""
        return self.seconds + HARD_MARGIN_SECONDS


def task(name: str, *, seconds: float) -> Callable[[Handler], Task]:
    """Make a task of a handler: `@task("orders.reserve_stock", seconds=10)`."""

    def make(handler: Handler) -> Task:
        return Task(name, seconds, handler)

    return make


class AlreadyDone(Exception):  # not a fault: somebody else was faster
    """The receipt of this task is there already; whatever this run did is rolled back."""


class WorkerLost(Exception):
    """Processes died while they ran the task."""


@asynccontextmanager
async def once(resources: Resources, delivery: Delivery) -> AsyncIterator[Writer]:
    """Open the one transaction of a task: receipt first, then the block, and with the last receipt the message is done.

    Raises:
        AlreadyDone: if the receipt was there; the block did not run. `execute` drops the rest.
    """
    async with resources.database.writer(delivery.message.profile_id) as writer:
        if not await outbox.receive(writer, delivery.message, delivery.task):
            raise AlreadyDone(delivery.task)
        yield writer
        await outbox.settle(writer, delivery.message, delivery.parts)


async def execute(task: Task, resources: Resources, delivery: Delivery) -> Outcome:
    """Run the task for one delivery and settle how it ended; nothing that goes wrong in it is raised."""
    message = delivery.message
    start = perf_counter()
    work = context.Work(
        request_id=message.request_id,
        deadline=asyncio.get_running_loop().time() + task.seconds - MARGIN_SECONDS,
        positions=dict(delivery.positions),
    )
    told = {"message_id": str(message.id), "event": message.event}
    span = tracing.resume(message.traceparent, task.name, tracing.Kind.CONSUMER, tries=message.tries, **told)
    with tracing.within(span), context.working(work):
        try:
            outcome = await _run(task, resources, delivery)
        except Unavailable:
            outcome = Outcome.UNDECIDED
        if span is not None:
            span.tell({"scaleout.outcome": outcome.value})
        seconds = perf_counter() - start
        TASKS.labels(task.name, outcome.value).inc()
        TASK_SECONDS.labels(task.name).observe(seconds)
        log.info(
            "task",
            task=task.name,
            outcome=outcome.value,
            message_id=str(message.id),
            subject_id=str(message.subject_id),
            tries=message.tries,
            milliseconds=round(seconds * 1000, 1),
        )
    return outcome


async def _run(task: Task, resources: Resources, delivery: Delivery) -> Outcome:
    """Run the handler and answer what it raised.

    Raises:
        Unavailable: if the answer cannot be written down; the message then comes again by itself.
    """
    try:
        async with resources.runs.alone(f"{delivery.message.id}:{task.name}", delivery.copy, task.longest) as lost:
            # A first delivery does not ask: doubled, it meets its receipt in `once`.
            if delivery.repeated and await _is_done(resources, delivery):
                return Outcome.DROPPED
            if lost >= MOST_LOST:
                return await _bury(resources, delivery, WorkerLost(f"{lost} processes died while they ran it"))
            return await _handle(task, resources, delivery)
    except Taken as taken:
        delay = min(timedelta(seconds=taken.seconds), backoff(delivery.message.tries))
        return await _defer(resources, delivery, delay)


async def _handle(task: Task, resources: Resources, delivery: Delivery) -> Outcome:
    limit = asyncio.timeout(task.seconds)
    try:
        async with limit:
            await task.handler(resources, delivery)
    except AlreadyDone:
        return Outcome.DROPPED
    except Exception as error:  # noqa: BLE001  # the edge of the process: a poison message must not end the worker
        return await _answer(resources, delivery, error, hung=limit.expired())
    return Outcome.DONE


async def _answer(resources: Resources, delivery: Delivery, error: Exception, *, hung: bool) -> Outcome:
    """Decide by the kind of error what becomes of the delivery; `hung` says that it met its own time limit."""
    if isinstance(error, WAITS_FOR) and not hung:
        log.warning("task waits for a dependency", task=delivery.task, reason=_describe(error))
        return await _defer(resources, delivery, backoff(delivery.message.tries))
    # A fault of ours may pass, a deploy mends it, but not for ever.
    permanent = isinstance(error, ServiceError) and not hung
    failures = delivery.message.failures.get(delivery.task, 0) + 1
    if permanent or failures >= resources.settings.workers.max_tries:
        return await _bury(resources, delivery, error)
    log.warning("task failed", task=delivery.task, failures=failures, reason=_describe(error), exc_info=error)
    async with resources.database.writer(delivery.message.profile_id) as writer:
        await outbox.fail(writer, delivery.message, delivery.task, delay=backoff(failures))
    return Outcome.DEFERRED


async def _is_done(resources: Resources, delivery: Delivery) -> bool:
    reader = resources.database.reader(delivery.message.profile_id, newest=True)
    return (delivery.message.id, delivery.task) in await outbox.receipted(reader, [delivery.message])


async def _defer(resources: Resources, delivery: Delivery, delay: timedelta) -> Outcome:
    async with resources.database.writer(delivery.message.profile_id) as writer:
        await outbox.defer(writer, delivery.message, delay=delay)
    return Outcome.DEFERRED


async def _bury(resources: Resources, delivery: Delivery, error: Exception) -> Outcome:
    """Give the task up. Letter, receipt and settling are one, so that the message's other tasks still settle it."""
    message = delivery.message
    async with resources.database.writer(message.profile_id) as writer:
        if not await outbox.receive(writer, message, delivery.task):
            return Outcome.DROPPED
        await outbox.bury(writer, message, delivery.task, _describe(error))
        await outbox.settle(writer, message, delivery.parts)
    DEAD_LETTERS.labels(delivery.task).inc()
    log.error("dead letter", task=delivery.task, message_id=str(message.id), exc_info=error)
    return Outcome.DEAD


def backoff(tries: int) -> timedelta:
    """Return how long a message waits after its `tries`-th try: exponential, with full jitter."""
    longest = min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(tries - 1, 10))
    return timedelta(seconds=random.uniform(0, longest))


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:LONGEST_ERROR]
