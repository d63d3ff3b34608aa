"""Jobs without the edge: bounded, cancelled in the middle, failed when overdue, purged with their results."""

from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import pytest
from apart import Apart, apart_from
from sqlalchemy import delete, insert, text, update

from app.core.errors import Conflict, NotFound, RateLimited
from app.core.ids import new_id
from app.domain.reports import export
from app.domain.reports.export import Period
from app.domain.reports.jobs import KEPT, LONGEST, MOST_OPEN, Job
from app.domain.reports.tables import jobs, sales
from app.scaling.outbox import message_from
from deploy.local.cluster import Cluster
from workers.task import Delivery, Outcome, execute
from workers.tasks.reports import make_report
from workers.tasks.upkeep import purge_jobs

YEAR = Period(date(2026, 1, 1), date(2026, 12, 31), "csv")


@pytest.fixture(scope="module")
async def made(cluster: Cluster) -> AsyncIterator[Apart]:
    async with apart_from(cluster) as apart:
        yield apart


@pytest.fixture
async def apart(made: Apart) -> Apart:
    await made.clear()
    async with made.resources.database.writer() as writer:
        for table in (jobs, sales):
            await writer.run(delete(table))
    return made


async def ask(apart: Apart, period: Period = YEAR) -> Job:
    return await apart.resources.jobs.ask(new_id(), "sales", period.to_json())


async def run(apart: Apart, job: Job) -> Outcome:
    """Run the job's task as a worker would."""
    message = message_from(await apart.row(job.id), tries=1)
    delivery = Delivery("reports.make", message, 1, {})
    return await execute(make_report, apart.resources, delivery)


def stored(apart: Apart) -> set[str]:
    """Return the reports in the storage's folder."""
    folder = Path(urlsplit(apart.settings.storage.url).path) / "reports"
    return {path.stem for path in folder.glob("*")}


async def test_a_report_is_made_once_and_a_second_run_changes_nothing(apart: Apart) -> None:
    job = await ask(apart)
    assert await run(apart, job) is Outcome.DONE
    finished = await apart.resources.jobs.get(job.id)
    assert (finished.status, finished.progress) == ("done", 100)
    assert await run(apart, job) is Outcome.DROPPED
    assert str(job.id) in stored(apart)


async def test_the_message_alone_is_enough(apart: Apart) -> None:
    job = await ask(apart)
    async with apart.resources.database.writer() as writer:
        await writer.run(delete(jobs))  # as if whoever asked had died between the two commits
    await run(apart, job)
    assert (await apart.resources.jobs.get(job.id)).status == "done"


@pytest.mark.sabotage("app/domain/reports/export.py", "if not await self._jobs.advance(job.id, progress):", "if False:")
async def test_a_cancelled_job_stops_where_it_is(apart: Apart, monkeypatch: pytest.MonkeyPatch) -> None:
    job = await ask(apart)
    jobs_of, reached = apart.resources.jobs, []
    advance = type(jobs_of).advance

    async def cancelled_at_ten(self: Any, job_id: UUID, progress: int) -> bool:
        reached.append(progress)
        if progress == 10:
            await self.cancel(job_id)
        return await advance(self, job_id, progress)

    monkeypatch.setattr(type(jobs_of), "advance", cancelled_at_ten)
    assert await run(apart, job) is Outcome.DONE
    assert max(reached) == 10
    assert (await jobs_of.get(job.id)).status == "cancelled"
    assert (await jobs_of.cancel(job.id)).status == "cancelled", "asked again it is the same"
    assert str(job.id) not in stored(apart)


async def test_progress_never_goes_backwards(apart: Apart) -> None:
    job = await ask(apart)
    for progress in (40, 10):
        assert await apart.resources.jobs.advance(job.id, progress)
    assert (await apart.resources.jobs.get(job.id)).progress == 40


async def test_a_day_of_many_products_is_read_in_pages(apart: Apart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "PAGE", 7)
    resources, day = apart.resources, date(2026, 3, 1)
    ids = [new_id() for _ in range(20)]
    async with resources.database.writer() as writer:
        for product_id in ids:
            await writer.run(
                text(
                    "INSERT INTO products (id, sku, name, description, category, amount, currency, attributes,"
                    " available, version, revision, created_at, updated_at)"
                    " VALUES (:id, :sku, 'Thing', '', 'x', 1, 'EUR', '{}', 1, 1, 1, now(), now())"
                ).bindparams(id=product_id, sku=str(product_id))
            )
            await writer.run(
                insert(sales).values(
                    order_id=new_id(), product_id=product_id, day=day, quantity=2, amount=10, currency="EUR"
                )
            )
    job = await ask(apart, Period(day, day, "csv"))
    await run(apart, job)
    key = (await resources.jobs.get(job.id)).result_key
    lines = (await resources.storage.get(str(key))).decode().splitlines()
    assert [line.split(",")[1] for line in lines[1:]] == [str(each) for each in sorted(ids)]


@pytest.mark.sabotage("app/domain/reports/jobs.py", "if row is not None and row.open >= MOST_OPEN:", "if False:")
async def test_so_many_jobs_may_be_open_and_no_more(apart: Apart) -> None:
    open_jobs = [await ask(apart) for _ in range(MOST_OPEN)]
    with pytest.raises(RateLimited):
        await ask(apart)
    await apart.resources.jobs.cancel(open_jobs[0].id)
    await ask(apart)


async def test_what_is_overdue_fails_and_what_is_old_goes_with_its_result(apart: Apart) -> None:
    resources = apart.resources
    overdue, old = await ask(apart), await ask(apart)
    await run(apart, old)
    assert str(old.id) in stored(apart)
    async with resources.database.writer() as writer:
        for job, age in ((overdue, LONGEST), (old, KEPT)):
            created_at = datetime.now(UTC) - age - timedelta(seconds=1)
            await writer.run(update(jobs).where(jobs.c.id == job.id).values(created_at=created_at))
    await purge_jobs.work(resources)
    assert (await resources.jobs.get(overdue.id)).status == "failed"
    with pytest.raises(Conflict):
        await resources.jobs.cancel(overdue.id)
    with pytest.raises(NotFound):
        await resources.jobs.get(old.id)
    assert str(old.id) not in stored(apart)
    await run(apart, overdue)
    assert (await resources.jobs.get(overdue.id)).status == "failed", "whoever was told so is not told otherwise"
