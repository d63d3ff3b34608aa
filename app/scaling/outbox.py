"""The outbox: a message is a row, written in the transaction of what it tells of, and stays the truth until it is done.

A request never publishes. The relay claims rows that are due with `FOR UPDATE SKIP LOCKED`, hands them to the broker
and makes them due again later; a message that the broker or a worker loses is so published again. A task leaves a
receipt in the transaction of its effect; the last receipt of a message marks it done.

    traceparent  of the span in which it was written, if that is recorded
    due_at     from when a relay may publish the row, first or again; NULL once it is done
    tries      how often it was claimed, also while a dependency was waited for
    failures   task -> how often it failed for no reason that it could wait for; NULL if none ever did
    done_at    when the last of its tasks was done
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    JSON,
    Column,
    DateTime,
    Index,
    Integer,
    PrimaryKeyConstraint,
    Row,
    String,
    Table,
    Text,
    Uuid,
    func,
    insert,
    select,
    tuple_,
    update,
)

from app.core import context, tracing
from app.core.ids import new_id
from app.scaling.database import Queries, Writer, metadata
from app.scaling.dialect import Rows, insert_ignore

# Counting a backlog reads its index. Of more than this nobody needs the number, only that it is more.
MOST_COUNTED = 100_000

outbox = Table(
    "outbox",
    metadata,
    Column("profile_id", Uuid, nullable=False),
    Column("id", Uuid, nullable=False),
    Column("event", String(64), nullable=False),
    Column("subject_id", Uuid, nullable=False),
    Column("payload", JSON, nullable=False),
    Column("request_id", String(64), nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("due_at", DateTime(timezone=True)),
    Column("tries", Integer, nullable=False),
    Column("done_at", DateTime(timezone=True)),
    Column("failures", JSON),
    Column("traceparent", String(55)),
    PrimaryKeyConstraint("profile_id", "id"),
    Index("ix_outbox_due_at", "due_at"),  # the relay's question; done rows are NULL there and cost it nothing
    Index("ix_outbox_done_at", "done_at"),  # the purge's question
)

receipts = Table(
    "receipts",
    metadata,
    Column("profile_id", Uuid, nullable=False),
    Column("message_id", Uuid, nullable=False),
    Column("task", String(64), nullable=False),
    Column("done_at", DateTime(timezone=True), nullable=False),
    PrimaryKeyConstraint("profile_id", "message_id", "task"),
    Index("ix_receipts_done_at", "done_at"),  # the purge's question
)

dead_letters = Table(
    "dead_letters",
    metadata,
    Column("profile_id", Uuid, nullable=False),
    Column("id", Uuid, nullable=False),
    Column("message_id", Uuid, nullable=False),
    Column("task", String(64), nullable=False),
    Column("event", String(64), nullable=False),
    Column("error", Text, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("replayed_at", DateTime(timezone=True)),
    PrimaryKeyConstraint("profile_id", "id"),
    Index("ix_dead_letters_id", "id"),  # the list of all, and one by its id
    Index("ix_dead_letters_message", "profile_id", "message_id"),  # whether a message has one, before it is purged
    Index("ix_dead_letters_replayed_at", "replayed_at"),  # the purge's question
)


@dataclass(frozen=True, slots=True)
class Message:
    """One outbox row on its way: what happened (`event`) to what (`subject_id`), for whose profile.

    Attributes:
        tries: how often it was claimed.
        failures: task -> how often it failed unexpectedly.
        due_at: since when it could be claimed; only the relay that claims it knows, it does not travel.
        traceparent: of the span that it continues, if that is recorded.
    """

    profile_id: UUID
    id: UUID
    event: str
    subject_id: UUID
    payload: dict[str, Any]
    request_id: str
    tries: int
    failures: dict[str, int] = field(default_factory=dict)
    due_at: datetime | None = field(default=None, compare=False)
    traceparent: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what travels through the broker."""
        return {
            "profile_id": str(self.profile_id),
            "id": str(self.id),
            "event": self.event,
            "subject_id": str(self.subject_id),
            "payload": self.payload,
            "request_id": self.request_id,
            "tries": self.tries,
            "failures": self.failures,
            "traceparent": self.traceparent,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Message":
        """Read a message back."""
        return cls(
            profile_id=UUID(value["profile_id"]),
            id=UUID(value["id"]),
            event=value["event"],
            subject_id=UUID(value["subject_id"]),
            payload=value["payload"],
            request_id=value["request_id"],
            tries=value["tries"],
            failures=value.get("failures") or {},
            traceparent=value.get("traceparent"),  # a relay of the version before sends none
        )


async def append(
    writer: Writer,
    event: str,
    *,
    profile_id: UUID,
    subject_id: UUID,
    payload: dict[str, Any] | None = None,
    after: timedelta = timedelta(0),
) -> None:
    """Write a message in the caller's transaction; it leaves once that has committed, and only then.

    Args:
        writer: the transaction.
        event: what happened.
        profile_id: whose, which says on which shard.
        subject_id: to what.
        payload: more about it.
        after: how much later it leaves.
    """
    message = message_row(event, profile_id=profile_id, subject_id=subject_id, payload=payload, after=after)
    await writer.run(insert(outbox), message.values)


def message_row(
    event: str,
    *,
    profile_id: UUID,
    subject_id: UUID,
    payload: dict[str, Any] | None = None,
    after: timedelta = timedelta(0),
) -> Rows:
    """Return the row of a message, for who inserts it together with what it tells of; the arguments are `append`'s."""
    now = datetime.now(UTC)
    values = {
        "profile_id": profile_id,
        "id": new_id(profile_id),
        "event": event,
        "subject_id": subject_id,
        "payload": payload or {},
        "request_id": context.current().request_id,
        "created_at": now,
        "due_at": now + after,
        "tries": 0,
    }
    if span := tracing.current():
        values["traceparent"] = span.traceparent
    return Rows(outbox, [values])


async def claim(writer: Writer, *, batch: int, lease: timedelta) -> Sequence[Message]:
    """Take up to `batch` due messages for `lease`; another relay takes other ones, and these again after the lease."""
    now = datetime.now(UTC)
    rows = await writer.all(
        select(outbox)
        .where(outbox.c.due_at <= now, writer.own(outbox.c.profile_id))
        .order_by(outbox.c.due_at)
        .limit(batch)
        .with_for_update(skip_locked=True)
    )
    if not rows:
        return ()
    await writer.run(
        update(outbox)
        .where(_are((row.profile_id, row.id) for row in rows))
        .values(due_at=now + lease, tries=outbox.c.tries + 1)
    )
    return tuple(message_from(row, tries=row.tries + 1) for row in rows)


async def sent(writer: Writer, messages: Iterable[Message], *, again_after: timedelta) -> None:
    """Note that the broker has the messages; those that are not done after `again_after` are published again."""
    keys = [(message.profile_id, message.id) for message in messages]
    if keys:
        await writer.run(
            update(outbox).where(_are(keys), outbox.c.done_at.is_(None)).values(due_at=datetime.now(UTC) + again_after)
        )


async def defer(writer: Writer, message: Message, *, delay: timedelta) -> None:
    """Publish the message again after `delay`; the row keeps it, so that no worker has to hold it meanwhile."""
    await writer.run(
        update(outbox)
        .where(outbox.c.profile_id == message.profile_id, outbox.c.id == message.id, outbox.c.done_at.is_(None))
        .values(due_at=datetime.now(UTC) + delay)
    )


async def fail(writer: Writer, message: Message, task: str, *, delay: timedelta) -> None:
    """Count an unexpected failure of `task`, and publish the message again after `delay`."""
    key = (outbox.c.profile_id == message.profile_id, outbox.c.id == message.id)
    row = await writer.first(select(outbox.c.failures).where(*key).with_for_update())
    if row is not None:
        failures: dict[str, int] = row.failures or {}
        await writer.run(update(outbox).where(*key).values(failures=failures | {task: failures.get(task, 0) + 1}))
    await defer(writer, message, delay=delay)


async def receipted(queries: Queries, messages: Sequence[Message]) -> set[tuple[UUID, str]]:
    """Return (message id, task) for every task of the messages that is done already."""
    rows = await queries.all(
        select(receipts.c.message_id, receipts.c.task).where(
            tuple_(receipts.c.profile_id, receipts.c.message_id).in_(
                [(message.profile_id, message.id) for message in messages]
            )
        )
    )
    return {(row.message_id, row.task) for row in rows}


async def receive(writer: Writer, message: Message, task: str) -> bool:
    """Leave the receipt of `task`; False if it is there already, and then nothing more may be done in its name.

    A second delivery that arrives while the first is still under way waits here for its end.
    """
    return bool(
        await writer.run(
            insert_ignore(receipts).values(
                profile_id=message.profile_id, message_id=message.id, task=task, done_at=datetime.now(UTC)
            )
        )
    )


async def settle(writer: Writer, message: Message, parts: int) -> None:
    """Mark the message done if this was the last of its `parts` tasks.

    The row's lock makes tasks that end at the same moment count one after the other, so that one of them is last.
    """
    key = (outbox.c.profile_id == message.profile_id, outbox.c.id == message.id)
    await writer.all(select(outbox.c.id).where(*key).with_for_update())
    count = await writer.first(
        select(func.count().label("done")).where(
            receipts.c.profile_id == message.profile_id, receipts.c.message_id == message.id
        )
    )
    if count is not None and count.done >= parts:
        await writer.run(update(outbox).where(*key).values(done_at=datetime.now(UTC), due_at=None))


async def finish(writer: Writer, messages: Iterable[Message]) -> None:
    """Mark messages done of which it is known that no task is left to do, in one statement."""
    keys = [(message.profile_id, message.id) for message in messages]
    await writer.run(update(outbox).where(_are(keys)).values(done_at=datetime.now(UTC), due_at=None))


async def bury(writer: Writer, message: Message, task: str, error: str) -> None:
    """Give a task up for good: keep what it was and why as a dead letter."""
    await writer.run(
        insert(dead_letters).values(
            profile_id=message.profile_id,
            id=new_id(message.profile_id),
            message_id=message.id,
            task=task,
            event=message.event,
            error=error,
            tries=message.tries,
            created_at=datetime.now(UTC),
        )
    )


@dataclass(frozen=True, slots=True)
class Backlog:
    """What of a shard's outbox is not done: how many messages, the age of the oldest in seconds, open dead letters."""

    messages: int
    oldest: float
    letters: int


async def backlog(queries: Queries, *, besides: Collection[str] = ()) -> Backlog:
    """Look at what is not done, in one statement; past `MOST_COUNTED` messages the rest is not counted.

    Args:
        queries: on a shard.
        besides: events whose messages are no backlog.
    """
    waiting = (
        select(outbox.c.created_at)
        .where(outbox.c.due_at.is_not(None), outbox.c.event.not_in(besides))
        .limit(MOST_COUNTED)
        .subquery()
    )
    letters = select(func.count()).select_from(dead_letters).where(dead_letters.c.replayed_at.is_(None))
    row = await queries.first(
        select(
            func.count().label("messages"),
            func.min(waiting.c.created_at).label("since"),
            letters.scalar_subquery().label("letters"),
        ).select_from(waiting)
    )
    if row is None or row.since is None:
        return Backlog(0, 0.0, row.letters if row else 0)
    return Backlog(row.messages, max(0.0, (datetime.now(UTC) - row.since).total_seconds()), row.letters)


def message_from(row: Row[Any], *, tries: int) -> Message:
    """Return the message that a row of the outbox holds, on its `tries`-th way."""
    return Message(
        profile_id=row.profile_id,
        id=row.id,
        event=row.event,
        subject_id=row.subject_id,
        payload=row.payload,
        request_id=row.request_id,
        tries=tries,
        failures=row.failures or {},
        due_at=row.due_at,
        traceparent=row.traceparent,
    )


def _are(keys: Iterable[tuple[UUID, UUID]]) -> Any:
    return tuple_(outbox.c.profile_id, outbox.c.id).in_(list(keys))
