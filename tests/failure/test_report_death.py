"""kill -9 in the middle of a report: it is made anew by the next worker, under the same job."""

import asyncio
import json
import sys
from datetime import date
from pathlib import Path

import pytest
from apart import apart_from
from books import Processes
from conftest import PATIENCE, until

from app.core.ids import new_id
from app.domain.reports.export import Period
from app.domain.reports.jobs import Job
from deploy.local.cluster import Cluster


def deaths(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("died-*")]


@pytest.mark.sabotage(
    "app/domain/reports/jobs.py",
    "        return await self._move(job_id, progress=func.greatest(jobs.c.progress, progress))",
    "        return await self._move(job_id, status=FAILED, progress=progress)",
)
async def test_a_report_whose_worker_is_killed_is_made_by_the_next(cluster: Cluster, tmp_path: Path) -> None:
    async with apart_from(cluster) as apart:
        jobs = apart.resources.jobs
        job = await jobs.ask(new_id(), "sales", Period(date(2026, 1, 1), date(2026, 3, 31), "csv").to_json())
        (tmp_path / "plan.json").write_text(json.dumps({"jobs.advance after": [str(job.id)]}))
        program = str(Path(__file__).with_name("crashing.py"))
        commands = {kind: [sys.executable, program, kind, str(tmp_path)] for kind in ("worker", "relay")}
        processes = Processes(apart.environment, tmp_path, commands)

        async def made() -> Job | None:
            processes.keep_up()
            found = await jobs.get(job.id)
            return found if found.status == "done" else None

        try:
            found = await until(made, seconds=2 * PATIENCE)
        finally:
            await asyncio.to_thread(processes.end)
        assert deaths(tmp_path) == [f"died-jobs.advance-after-{job.id}"]
        assert (await apart.resources.storage.get(str(found.result_key))).startswith(b"day,product_id")
