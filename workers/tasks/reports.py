"""Reports that somebody asked for, each made in one piece; a worker that dies leaves a job to begin anew."""

from app.domain.reports.jobs import PROCESSING
from app.wiring import Resources
from workers.task import Delivery, once, task

# A year of a busy shop takes a few seconds; the rest is for a replica and a storage that are slow. Half of the broker's
# visibility timeout, as the longest of all tasks.
REPORT_SECONDS = 150.0


@task("reports.make", seconds=REPORT_SECONDS)
async def make_report(resources: Resources, delivery: Delivery) -> None:
    """Make the report of a job, unless it has ended meanwhile."""
    asked = delivery.message.payload
    job = await resources.jobs.begin(delivery.message.subject_id, asked["kind"], asked["parameters"])
    if job.status == PROCESSING:
        await resources.sales_export.make(job)
    async with once(resources, delivery):
        pass
