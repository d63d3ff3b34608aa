"""Jobs: work that takes longer than a request may, with its progress and a result in the object storage.

Asking writes a message on the asker's shard and then the row in the catalog database; the message holds all that the
work needs, so whichever of the two a crash leaves behind, nothing is lost and nothing waits for ever. The work may die
anywhere: the message comes again and begins it anew under the same key.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Row, delete, func, select, update

from app.core.errors import Conflict, NotFound, RateLimited
from app.core.ids import created_at, new_id
from app.domain.reports.tables import jobs
from app.scaling import outbox
from app.scaling.database import Database
from app.scaling.dialect import insert_ignore
from app.scaling.storage import Storage

PROCESSING, DONE, FAILED, CANCELLED = "processing", "done", "failed", "cancelled"
MOST_OPEN = 20  # of everybody together: an hour of one worker at its slowest
# A report takes seconds. Past this its task was given up, or nobody works; whoever asked is told, and can ask again.
LONGEST = timedelta(hours=1)
KEPT = timedelta(days=7)  # a week to fetch a result


@dataclass(frozen=True, slots=True)
class Job:
    """A job as stored; `progress` in per cent."""

    id: UUID
    kind: str
    parameters: dict[str, Any]
    status: str
    progress: int
    result_key: str | None
    created_at: datetime
    updated_at: datetime


class Jobs:
    """The jobs of the service.

    Args:
        database: its catalog database has them.
        storage: keeps their results.
    """

    def __init__(self, database: Database, storage: Storage) -> None:
        self._database = database
        self._storage = storage

    async def ask(self, profile_id: UUID, kind: str, parameters: dict[str, Any]) -> Job:
        """Accept a job.

        Args:
            profile_id: who asks.
            kind: what for.
            parameters: all that the work needs to know, JSON-ready.

        Raises:
            RateLimited: `too_many_jobs`, while `MOST_OPEN` are under way.
            Unavailable: the database takes no writes.
        """
        row = await self._database.reader(newest=True).first(
            select(func.count().label("open")).where(jobs.c.status == PROCESSING)
        )
        if row is not None and row.open >= MOST_OPEN:
            raise RateLimited(
                f"{MOST_OPEN} jobs are under way; wait for one or cancel it.", code="too_many_jobs", retry_after=10
            )
        job_id = new_id(profile_id)
        async with self._database.writer(profile_id) as writer:
            payload = {"kind": kind, "parameters": parameters}
            await outbox.append(writer, "job.asked", profile_id=profile_id, subject_id=job_id, payload=payload)
        return await self.begin(job_id, kind, parameters)

    async def begin(self, job_id: UUID, kind: str, parameters: dict[str, Any]) -> Job:
        """Return the job, which is made if it is not there yet."""
        async with self._database.writer() as writer:
            await writer.run(
                insert_ignore(jobs).values(
                    id=job_id,
                    kind=kind,
                    parameters=parameters,
                    status=PROCESSING,
                    progress=0,
                    created_at=created_at(job_id),
                    updated_at=datetime.now(UTC),
                )
            )
            row = await writer.first(_by_id(job_id))
        return _found(row)

    async def get(self, job_id: UUID) -> Job:
        """Return a job as the primary has it, so that nobody sees one go backwards.

        Raises:
            NotFound: if there is none, or its result is not kept any more.
        """
        return _found(await self._database.reader(newest=True).first(_by_id(job_id)))

    async def cancel(self, job_id: UUID) -> Job:
        """End a job that is under way; its work stops where it next looks.

        Raises:
            NotFound: if there is none.
            Conflict: `not_cancellable`, if it is done or has failed.
        """
        await self._move(job_id, status=CANCELLED)
        job = await self.get(job_id)
        if job.status != CANCELLED:
            raise Conflict("The job has ended already.", code="not_cancellable")
        return job

    async def advance(self, job_id: UUID, progress: int) -> bool:
        """Note how far the work is, in per cent; False if nobody wants it any more. It never goes backwards."""
        return await self._move(job_id, progress=func.greatest(jobs.c.progress, progress))

    async def finish(self, job_id: UUID, result_key: str) -> bool:
        """Note that the result is stored; False if nobody wants it any more."""
        return await self._move(job_id, status=DONE, progress=100, result_key=result_key)

    async def fail_overdue(self) -> int:
        """Fail what has been under way for longer than any work takes; return how many there were."""
        async with self._database.writer() as writer:
            return await writer.run(
                update(jobs)
                .where(jobs.c.status == PROCESSING, jobs.c.created_at < datetime.now(UTC) - LONGEST)
                .values(status=FAILED, updated_at=datetime.now(UTC))
            )

    async def purge(self, batch: int) -> int:
        """Delete up to `batch` jobs that were kept long enough, results first; return how many there were."""
        async with self._database.writer() as writer:
            rows: Sequence[Row[Any]] = await writer.all(
                select(jobs.c.id, jobs.c.result_key)
                .where(jobs.c.created_at < datetime.now(UTC) - KEPT, jobs.c.status != PROCESSING)
                .order_by(jobs.c.created_at)
                .limit(batch)
            )
        for row in rows:
            if row.result_key is not None:
                await self._storage.delete(row.result_key)
        if rows:
            async with self._database.writer() as writer:
                await writer.run(delete(jobs).where(jobs.c.id.in_([row.id for row in rows])))
        return len(rows)

    async def _move(self, job_id: UUID, **values: Any) -> bool:
        async with self._database.writer() as writer:
            moved = await writer.run(
                update(jobs)
                .where(jobs.c.id == job_id, jobs.c.status == PROCESSING)
                .values(**values, updated_at=datetime.now(UTC))
            )
        return bool(moved)


def _by_id(job_id: UUID) -> Any:
    return select(jobs).where(jobs.c.id == job_id)


def _found(row: Row[Any] | None) -> Job:
    if row is None:
        raise NotFound("There is no such job.")
    return Job(**{column.name: getattr(row, column.name) for column in jobs.columns})
