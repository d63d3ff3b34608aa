"""`/api/v1/reports` and `/api/v1/jobs`: asking for a report, seeing how far it is, fetching or cancelling it."""

from datetime import UTC, date, datetime
from time import time
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Response
from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from app.api.bodies import JsonRoute
from app.api.dependencies import AdminCaller, ResourcesDep
from app.api.fields import Body
from app.api.problems import responses
from app.api.representations import location, written
from app.core.errors import Invalid
from app.domain.reports.export import LONGEST_DAYS, Period
from app.domain.reports.jobs import DONE, Job
from app.wiring import Resources

PATH = "/api/v1/jobs"
router = APIRouter(
    prefix="/api/v1",
    tags=["Reports"],
    route_class=JsonRoute,
    responses=responses(400, 401, 403, 422, 429, 500, 503, 504),
)


def _day(value: Any) -> Any:
    """Read a date, or a moment, which stands for its day in UTC."""
    try:
        if isinstance(value, str) and len(value) > len("2026-11-21"):
            moment = datetime.fromisoformat(value)
            if moment.tzinfo is not None:
                return moment.astimezone(UTC).date()
        elif isinstance(value, str):
            return date.fromisoformat(value)
    except (ValueError, OverflowError):
        pass
    raise PydanticCustomError("day", "Must be a date like 2026-11-21, or a moment like 2026-11-21T00:00:00Z.")


Day = Annotated[date, BeforeValidator(_day), WithJsonSchema({"type": "string", "format": "date"})]


class ReportAsked(Body):
    """Which report, of which days (in UTC, both included), in which format."""

    kind: Literal["sales"]
    first: Annotated[Day, Field(alias="from", examples=["2026-11-01"])]
    last: Annotated[Day, Field(alias="to", examples=["2026-11-21"])]
    format: Literal["csv", "json"] = "csv"

    def period(self) -> Period:
        """Return the days and the format.

        Raises:
            Invalid: naming `/to`, if it lies before `from` or too far behind it.
        """
        period = Period(self.first, self.last, self.format)
        if period.days < 1:
            raise Invalid.field("/to", "Must not be before `from`.")
        if period.days > LONGEST_DAYS:
            raise Invalid.field("/to", f"A report has at most {LONGEST_DAYS} days; ask for several.")
        return period


class JobView(BaseModel):
    """A job, and where its result is."""

    job_id: UUID
    kind: Literal["sales"]
    status: Literal["processing", "done", "failed", "cancelled"]
    progress: int = Field(description="Per cent; 100 once it is done.", ge=0, le=100)
    result_url: str | None = Field(description="A short-lived address of the result, a fresh one with each answer.")
    parameters: dict[str, str]
    created_at: datetime
    updated_at: datetime


@router.post(
    "/reports",
    status_code=202,
    response_model=JobView,
    operation_id="askForReport",
    summary="Ask for a report (admin)",
    responses=responses(413, 415),
)
async def ask(caller: AdminCaller, body: ReportAsked, resources: ResourcesDep) -> Response:
    """Begin a report; `GET /api/v1/jobs/{id}` says how far it is and where it is in the end, for a week."""
    period = body.period()
    job = await resources.jobs.ask(caller.profile_id, body.kind, period.to_json())
    return written(await _view(resources, job), status=202, headers=location(PATH, job.id))


@router.get(
    "/jobs/{job_id}", response_model=JobView, operation_id="getJob", summary="A job (admin)", responses=responses(404)
)
async def get(job_id: UUID, _admin: AdminCaller, resources: ResourcesDep) -> Response:
    """Return how far a job is, and once it is done an address of its result."""
    return written(await _view(resources, await resources.jobs.get(job_id)))


@router.post(
    "/jobs/{job_id}/cancel",
    response_model=JobView,
    operation_id="cancelJob",
    summary="Cancel a job (admin)",
    responses=responses(404, 409),
)
async def cancel(job_id: UUID, _admin: AdminCaller, resources: ResourcesDep) -> Response:
    """End a job that is under way; asked again it is the same. One that has ended is 409 `not_cancellable`."""
    return written(await _view(resources, await resources.jobs.cancel(job_id)))


async def _view(resources: Resources, job: Job) -> dict[str, Any]:
    link = await resources.storage.link(job.result_key, time()) if job.status == DONE and job.result_key else None
    return {
        "job_id": job.id,
        "kind": job.kind,
        "status": job.status,
        "progress": job.progress,
        "result_url": link,
        "parameters": job.parameters,
        "created_at": job.created_at,
        "updated_at": job.updated_at,
    }
