"""Dead letters: tasks that were given up, over all shards, to be looked at and sent once more when the cause is mended.

A replay takes the task's receipt away and makes the message due; its other tasks keep theirs and are not repeated. As
long as a letter is open, nothing of its message is purged.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, delete, select, update

from app.core.errors import Conflict, NotFound
from app.scaling.database import Database
from app.scaling.outbox import dead_letters, outbox, receipts
from app.scaling.paging import Cursors, Page

SCOPE = "dead letters"


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A task of a message that was given up, and why; `tries` is how often the message had been claimed."""

    id: UUID
    task: str
    event: str
    message_id: UUID
    subject_id: UUID | None
    request_id: str | None
    error: str
    tries: int
    created_at: datetime
    replayed_at: datetime | None

    def view(self) -> dict[str, Any]:
        """Return what an administrator sees, JSON-ready."""
        return asdict(self)


# The message stands beside its letter for as long as the letter is open; of a closed one it may be gone.
_LETTERS = select(dead_letters, outbox.c.subject_id, outbox.c.request_id).join(
    outbox,
    (outbox.c.profile_id == dead_letters.c.profile_id) & (outbox.c.id == dead_letters.c.message_id),
    isouter=True,
)


class DeadLetters:
    """The dead letters of all shards.

    Args:
        database: where they are.
        cursors: makes the cursors of the list.
    """

    def __init__(self, database: Database, cursors: Cursors) -> None:
        self._database = database
        self._cursors = cursors

    async def listed(self, limit: int, cursor: str | None, *, everything: bool = False) -> Page[dict[str, Any]]:
        """Return a page of the letters of all shards, newest first: the open ones, or `everything`."""
        scope = f"{SCOPE} {everything}"
        after = self._cursors.open_id(scope, cursor)
        statement = _LETTERS.order_by(dead_letters.c.id.desc()).limit(limit + 1)
        if after is not None:
            statement = statement.where(dead_letters.c.id < after)
        if not everything:
            statement = statement.where(dead_letters.c.replayed_at.is_(None))
        # One more than a page from each shard: the first of all of them are among these.
        rows = await self._database.gather(statement, dead_letters.c.profile_id)
        letters = sorted(map(_letter, rows), key=_newest_first)
        return self._cursors.page(
            scope, letters[: limit + 1], limit, key=lambda letter: str(letter.id), item=DeadLetter.view
        )

    async def get(self, letter_id: UUID) -> DeadLetter:
        """Return a letter; its id leads to its shard.

        Raises:
            NotFound: if there is none.
        """
        return _letter(await self._row(letter_id))

    async def replay(self, letter_id: UUID) -> DeadLetter:
        """Send the task once more, with all its tries, and close the letter; another failure is another letter.

        Raises:
            NotFound: if there is no such letter.
            Conflict: `already_replayed`, if it is closed.
        """
        now = datetime.now(UTC)
        # Whose it is, without a lock: what is locked must be named by its whole key, or Citus refuses.
        found = await self._row(letter_id)
        letter = (dead_letters.c.profile_id == found.profile_id, dead_letters.c.id == letter_id)
        async with self._database.writer(letter_id) as writer:
            row = await writer.first(select(dead_letters).where(*letter).with_for_update())
            if row is None:
                raise NotFound("There is no such dead letter.")
            if row.replayed_at is not None:
                raise Conflict("This dead letter was replayed already.", code="already_replayed")
            message = (outbox.c.profile_id == row.profile_id, outbox.c.id == row.message_id)
            told = await writer.first(select(outbox.c.failures).where(*message).with_for_update())
            failures = {task: count for task, count in ((told and told.failures) or {}).items() if task != row.task}
            await writer.run(
                delete(receipts).where(
                    receipts.c.profile_id == row.profile_id,
                    receipts.c.message_id == row.message_id,
                    receipts.c.task == row.task,
                )
            )
            await writer.run(update(outbox).where(*message).values(due_at=now, done_at=None, failures=failures))
            await writer.run(update(dead_letters).where(*letter).values(replayed_at=now))
        return replace(_letter(found), replayed_at=now)

    async def replay_all(self, told: Callable[[DeadLetter], None]) -> int:
        """Replay every letter that is open now, tell of each, and return how many there were."""
        count = 0
        cursor: str | None = None
        while True:
            # The cursor moves towards older ones, so a letter that a replay leads to is not met again.
            page = await self.listed(100, cursor)
            for letter in page.items:
                told(await self.replay(letter["id"]))
                count += 1
            cursor = page.next_cursor
            if cursor is None:
                return count

    async def _row(self, letter_id: UUID) -> Row[Any]:
        row = await self._database.reader(letter_id, newest=True).first(_LETTERS.where(dead_letters.c.id == letter_id))
        if row is None:
            raise NotFound("There is no such dead letter.")
        return row


def _newest_first(letter: DeadLetter) -> int:
    return -letter.id.int


def _letter(row: Row[Any]) -> DeadLetter:
    return DeadLetter(
        id=row.id,
        task=row.task,
        event=row.event,
        message_id=row.message_id,
        subject_id=row.subject_id,
        request_id=row.request_id,
        error=row.error,
        tries=row.tries,
        created_at=row.created_at,
        replayed_at=row.replayed_at,
    )
