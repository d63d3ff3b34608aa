"""`/api/v1/admin`: what only an administrator at an allowed address may see and do to a running service.

Dead letters are listed and replayed here. Shards and breakers are shown as this one instance knows them; the metrics
of all instances say the rest.
"""

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, Field

from app.api.bodies import JsonRoute
from app.api.dependencies import ResourcesDep, TrustedAdmin
from app.api.fields import PageCursor, PageLimit
from app.api.problems import responses
from app.api.representations import written
from app.scaling.sharding import Phase

router = APIRouter(
    prefix="/api/v1/admin",
    tags=["Administration"],
    route_class=JsonRoute,
    responses=responses(400, 401, 403, 422, 429, 500, 503, 504),
)


class DeadLetterView(BaseModel):
    """A task that was given up, and why."""

    id: UUID
    task: str
    event: str
    message_id: UUID
    subject_id: UUID | None = Field(description="What the message is about; unknown once the message is purged.")
    request_id: str | None = Field(description="The request that led to it, for the logs.")
    error: str
    tries: int
    created_at: datetime
    replayed_at: datetime | None


class DeadLetterPage(BaseModel):
    """A page of dead letters, newest first."""

    items: list[DeadLetterView]
    next_cursor: str | None


class NodeView(BaseModel):
    """A database server as this instance sees it; `lag_seconds` behind its primary."""

    name: str
    healthy: bool
    lag_seconds: float
    in_flight: int


class RangeView(BaseModel):
    """The logical shards `first` to `last`, both included."""

    first: int
    last: int


class ShardView(BaseModel):
    """A shard: which of the 1024 logical shards it holds, and its replicas."""

    number: int
    ranges: list[RangeView]
    replicas: list[NodeView]


class MoveView(RangeView):
    """A range that is being moved."""

    source: int
    target: int
    phase: Phase


class ShardsView(BaseModel):
    """All shards, as one instance sees them; the map's epoch grows with every change."""

    instance: str
    epoch: int
    move: MoveView | None
    items: list[ShardView]


class BreakerView(BaseModel):
    """The breaker of one dependency."""

    dependency: str
    state: Literal["closed", "open", "half-open"]


class BreakersView(BaseModel):
    """The breakers of one instance."""

    instance: str
    items: list[BreakerView]


@router.get(
    "/dead-letters", response_model=DeadLetterPage, operation_id="listDeadLetters", summary="Tasks that were given up"
)
async def dead_letters(
    _admin: TrustedAdmin,
    resources: ResourcesDep,
    limit: PageLimit = 20,
    cursor: PageCursor = None,
    *,
    replayed: Annotated[bool, Query(description="Show those that were replayed, too.")] = False,
) -> Response:
    """Return the dead letters of all shards that wait for somebody, newest first."""
    page = await resources.dead_letters.listed(limit, cursor, everything=replayed)
    return written({"items": page.items, "next_cursor": page.next_cursor})


@router.post(
    "/dead-letters/{letter_id}/replay",
    status_code=202,
    response_model=DeadLetterView,
    operation_id="replayDeadLetter",
    summary="Send a task once more",
    responses=responses(404, 409),
)
async def replay(letter_id: UUID, _admin: TrustedAdmin, resources: ResourcesDep) -> Response:
    """Send the task once more, with all its tries; if it is given up again, that is another dead letter."""
    return written((await resources.dead_letters.replay(letter_id)).view(), status=202)


@router.get("/shards", response_model=ShardsView, operation_id="listShards", summary="Shards and replicas")
async def shards(_admin: TrustedAdmin, resources: ResourcesDep) -> Response:
    """Return the shards and what this instance last saw of their replicas."""
    places = resources.database.map.latest
    items = [
        {
            "number": shard.number,
            "ranges": [{"first": place.first, "last": place.last} for place in places.held_by(shard.number)],
            "replicas": [
                {
                    "name": replica.name,
                    "healthy": replica.healthy,
                    "lag_seconds": round(replica.lag, 3),
                    "in_flight": replica.in_flight,
                }
                for replica in shard.replicas.replicas
            ],
        }
        for shard in resources.database.shards
    ]
    move = places.move and {
        "first": places.move.place.first,
        "last": places.move.place.last,
        "source": places.move.place.shard,
        "target": places.move.target,
        "phase": places.move.phase,
    }
    instance = resources.settings.service.instance
    return written({"instance": instance, "epoch": places.epoch, "move": move, "items": items})


@router.get("/breakers", response_model=BreakersView, operation_id="listBreakers", summary="Breakers")
async def breakers(_admin: TrustedAdmin, resources: ResourcesDep) -> Response:
    """Return the breakers of this instance and whether they let calls through."""
    known = (resources.redis.breaker, resources.payments.outbound.breaker, resources.mail.outbound.breaker)
    items = [{"dependency": breaker.name, "state": breaker.state} for breaker in known]
    return written({"instance": resources.settings.service.instance, "items": items})
