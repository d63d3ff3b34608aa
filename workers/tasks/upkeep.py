"""Chores that nobody waits for: sweeping what was abandoned, deleting what has been kept long enough.

Each is a plain function on `Resources` that may be run at any time and any number of times; `attend` runs it under a
lock, so that it runs once however many schedulers, cron jobs or people start it.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Column, ColumnElement, Table, delete, exists, false, select, tuple_

from app.core import context
from app.core.errors import Unavailable
from app.core.telemetry import TASKS, logger
from app.domain.payments.reconciliation import reconcile
from app.domain.profiles.avatars import UPLOADS
from app.domain.sessions.tables import sessions
from app.scaling.idempotency import idempotency_keys
from app.scaling.locks import LockLost
from app.scaling.outbox import dead_letters, outbox, receipts
from app.scaling.redis_link import RedisDown
from app.wiring import Resources
from workers.task import Delivery, Outcome, once, task

log = logger(__name__)

# Rows that go in one transaction: milliseconds of locks, and few enough for one statement's parameters.
PURGE_BATCH = 1000
# Jobs whose results go in one round, one call of the object storage each.
PURGE_JOBS = 100
# By far longer than a link for an upload lives, and than its task may wait for a storage that is down.
ABANDONED = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Chore:
    """A named piece of upkeep.

    Attributes:
        name: its task and its lock.
        seconds: after which it is cancelled; its next run does the rest, or all of it again.
        work: does it.
    """

    name: str
    seconds: float
    work: Callable[[Resources], Awaitable[None]]


def chore(name: str, *, seconds: float) -> Callable[[Callable[[Resources], Awaitable[None]]], Chore]:
    """Make a chore of a function: `@chore("upkeep.purge", seconds=600)`."""

    def make(work: Callable[[Resources], Awaitable[None]]) -> Chore:
        return Chore(name, seconds, work)

    return make


async def attend(chore: Chore, resources: Resources) -> Outcome:
    """Run the chore: DONE, DROPPED if somebody else is at it, or DEFERRED.

    A dependency that is down, or a lock that is lost, ends it: its next time comes.
    """

    async def work(_fence: int) -> None:
        async with asyncio.timeout(chore.seconds):
            await chore.work(resources)

    with context.working(context.Work(request_id=context.new_request_id())):
        outcome = Outcome.FAILED
        try:
            outcome = Outcome.DONE if await resources.locks.run_alone(chore.name, work) else Outcome.DROPPED
        except (Unavailable, RedisDown, LockLost, TimeoutError) as error:
            outcome = Outcome.DEFERRED
            log.warning("chore waits for its next time", chore=chore.name, reason=f"{type(error).__name__}: {error}")
        finally:
            TASKS.labels(chore.name, outcome.value).inc()
        log.info("chore", chore=chore.name, outcome=outcome.value)
    return outcome


@dataclass(frozen=True, slots=True)
class Kept:
    """How long rows of a table stay after the moment in `since`, those that `besides` picks out excepted."""

    table: Table
    since: Column[Any]
    period: timedelta
    besides: ColumnElement[bool] = false()  # noqa: RUF009  # an expression, immutable


def _not_done(profile_id: Column[Any], message_id: Column[Any]) -> ColumnElement[bool]:
    """Return the condition that a message may still be published, so that its receipts are asked for."""
    return exists().where(outbox.c.profile_id == profile_id, outbox.c.id == message_id, outbox.c.done_at.is_(None))


def _open_letter(profile_id: Column[Any], message_id: Column[Any]) -> ColumnElement[bool]:
    """Return the condition that a message has a dead letter that may still be replayed."""
    return exists().where(
        dead_letters.c.profile_id == profile_id,
        dead_letters.c.message_id == message_id,
        dead_letters.c.replayed_at.is_(None),
    )


KEPT = (
    # A day to look at what was sent. The purge reads it by `done_at`; what is not done has none and stays.
    Kept(outbox, outbox.c.done_at, timedelta(days=1), _open_letter(outbox.c.profile_id, outbox.c.id)),
    # Longer than any copy of a message can still be on its way, in the broker or after it came back from a backup.
    Kept(
        receipts,
        receipts.c.done_at,
        timedelta(days=7),
        _not_done(receipts.c.profile_id, receipts.c.message_id)
        | _open_letter(receipts.c.profile_id, receipts.c.message_id),
    ),
    # Those that were replayed, long enough to see in a month's review what keeps failing. Open ones stay.
    Kept(dead_letters, dead_letters.c.replayed_at, timedelta(days=30)),
    Kept(idempotency_keys, idempotency_keys.c.created_at, timedelta(hours=24)),  # as API clients are told
    Kept(sessions, sessions.c.expires_at, timedelta(0)),
)


@task("upkeep.end_sessions", seconds=10.0)
async def end_sessions(resources: Resources, delivery: Delivery) -> None:
    """End the sessions of an erased profile, should the instance that erased it have died before it did."""
    await resources.sessions.end_all(delivery.message.profile_id)
    async with once(resources, delivery):
        pass


@task("upkeep.forget_sessions", seconds=10.0)
async def forget_sessions(resources: Resources, delivery: Delivery) -> None:
    """Take ended sessions out of a Redis that was down when they ended and may have come back with them."""
    await resources.sessions.forget(delivery.message.profile_id, delivery.message.payload["keys"])
    async with once(resources, delivery):
        pass


@task("upkeep.refresh_profile", seconds=10.0)
async def refresh_profile(resources: Resources, delivery: Delivery) -> None:
    """Tell the cache of a change once more, should the instance that made it have died before it did."""
    await resources.profiles.refresh(delivery.message.profile_id)
    async with once(resources, delivery):
        pass


@task("upkeep.refresh_product", seconds=10.0)
async def refresh_product(resources: Resources, delivery: Delivery) -> None:
    """Tell the cache of a change once more, should the instance that made it have died before it did."""
    await resources.catalog.refresh(delivery.message.subject_id)
    async with once(resources, delivery):
        pass


@chore("upkeep.sweep_directory", seconds=60.0)
async def sweep_directory(resources: Resources) -> None:
    """Settle reservations of e-mail addresses whose sign-up never came to an end."""
    swept = await resources.directory.sweep()
    if swept:
        log.info("swept the e-mail directory", reservations=swept)


@chore("upkeep.flush_views", seconds=30.0)
async def flush_views(resources: Resources) -> None:
    """Add the views of products that Redis has gathered to the database."""
    flushed = await resources.views.flush()
    if flushed:
        log.info("counted views", products=flushed)


@chore("upkeep.reconcile_payments", seconds=1800.0)
async def reconcile_payments(resources: Resources) -> None:
    """Compare our payments with the provider's; what differs is logged as an error and counted by a metric."""
    comparison = await reconcile(resources.database, resources.payments)
    log.info("compared payments", payments=comparison.compared, differences=len(comparison.differences))


@chore("upkeep.purge", seconds=600.0)
async def purge(resources: Resources) -> None:
    """Delete on every shard what has been kept long enough."""
    for shard in resources.database.shards:
        for kept in KEPT:
            deleted = 0
            while count := await _delete(resources, shard.number, kept):
                deleted += count
                if count < PURGE_BATCH:
                    break
            if deleted:
                log.info("purged", shard=shard.number, table=kept.table.name, rows=deleted)


@chore("upkeep.purge_jobs", seconds=600.0)
async def purge_jobs(resources: Resources) -> None:
    """Fail the jobs that nobody will end, and delete those that were kept long enough, with their results."""
    failed = await resources.jobs.fail_overdue()
    if failed:
        log.error("jobs are overdue", jobs=failed)
    while await resources.jobs.purge(PURGE_JOBS) == PURGE_JOBS:
        pass


@chore("upkeep.sweep_uploads", seconds=600.0)
async def sweep_uploads(resources: Resources) -> None:
    """Delete uploads that were never asked for again: sent twice, or while nobody looked."""
    deleted = await resources.storage.delete_below(UPLOADS, datetime.now(UTC) - ABANDONED)
    if deleted:
        log.info("swept uploads", objects=deleted)


async def _delete(resources: Resources, shard: int, kept: Kept) -> int:
    key = kept.table.primary_key.columns
    async with resources.database.writer_of(shard) as writer:
        rows = await writer.all(
            select(*key)
            .where(kept.since < datetime.now(UTC) - kept.period, ~kept.besides, writer.own(kept.table.c.profile_id))
            .order_by(kept.since)
            .limit(PURGE_BATCH)
        )
        if not rows:
            return 0
        return await writer.run(delete(kept.table).where(tuple_(*key).in_([tuple(row) for row in rows])))
