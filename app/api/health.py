"""Probes: is the process alive, has it started, may it take requests, and how is each thing that it depends on.

Liveness asks nobody: restarting an instance heals no database. Readiness fails while the process starts or drains, and
while no node of any shard answers. What was found is kept for a second, so that asking costs nothing however often.
"""

import asyncio
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from pydantic import BaseModel
from sqlalchemy import literal, select
from sqlalchemy.exc import SQLAlchemyError

from app.api.problems import responses
from app.api.representations import written
from app.core.errors import NotFound, ServiceError, Unavailable
from app.scaling.lifecycle import Phase
from app.scaling.node import Node
from app.scaling.redis_link import RedisDown
from app.wiring import Resources

router = APIRouter(prefix="/health", tags=["Health"])

# Seconds. A probe that waits longer is given up on by whoever probes; and once a second is enough for anybody.
_PATIENCE = 1.0
_KEPT = 1.0
_FAILURES = (ServiceError, RedisDown, SQLAlchemyError, OSError, TimeoutError)
_DATABASE = "database-"
# What no storage has: to be told so is an answer.
_NO_OBJECT = "health/nothing"


class DependencyView(BaseModel):
    """One dependency; the latency is of a trivial call just now."""

    name: str
    status: Literal["up", "down"]
    latency_ms: float


class HealthView(BaseModel):
    """All of them: `degraded` while one is down, `down` while no database node answers."""

    status: Literal["up", "degraded", "down"]
    dependencies: list[DependencyView]


class StateView(BaseModel):
    """The short answer of a probe that succeeds."""

    status: Literal["alive", "started", "ready"]


class Board:
    """What is known of the dependencies of this process, at most a second old.

    Args:
        resources: what to look at.
    """

    def __init__(self, resources: Resources) -> None:
        self.resources = resources
        self._look: asyncio.Task[list[DependencyView]] | None = None
        self._looked_at = 0.0

    async def dependencies(self) -> list[DependencyView]:
        """Return how each dependency is. Callers at once share one look."""
        now = asyncio.get_running_loop().time()
        if self._look is None or (self._look.done() and now - self._looked_at > _KEPT):
            self._looked_at = now
            self._look = asyncio.create_task(self._look_at_all(), name="health")
        return await asyncio.shield(self._look)

    async def readable(self) -> bool:
        """Return whether any node of any shard answers reads; the replicas' watchers usually know already."""
        shards = self.resources.database.shards
        if any(replica.healthy for shard in shards for replica in shard.replicas.replicas):
            return True
        return _any_database(await self.dependencies())

    async def _look_at_all(self) -> list[DependencyView]:
        return list(await asyncio.gather(*(_look_at(name, check) for name, check in _checks(self.resources).items())))


async def _board(request: Request) -> Board:
    return cast("Board", request.app.state.health)


BoardDep = Annotated[Board, Depends(_board)]


def install(app: FastAPI, resources: Resources) -> None:
    """Give `app` its board, once its resources are open."""
    app.state.health = Board(resources)


@router.get("/live", response_model=StateView, operation_id="isAlive", summary="Is the process alive?")
async def live() -> Response:
    """Answer; that is all there is to know. A process that does not is to be restarted."""
    return written({"status": "alive"})


@router.get(
    "/startup", response_model=StateView, operation_id="isStarted", summary="Has it started?", responses=responses(503)
)
async def startup(board: BoardDep) -> Response:
    """Answer 200 once the process has started, also while it drains."""
    if board.resources.lifecycle.phase is Phase.STARTING:
        raise Unavailable(board.resources.lifecycle.waiting_for or "This instance is starting.", code="starting")
    return written({"status": "started"})


@router.get(
    "/ready",
    response_model=StateView,
    operation_id="isReady",
    summary="May it take requests?",
    responses=responses(503),
)
async def ready(board: BoardDep) -> Response:
    """Answer 200 while this instance can serve something."""
    phase = board.resources.lifecycle.phase
    if phase is not Phase.READY:
        waits = board.resources.lifecycle.waiting_for
        raise Unavailable(waits or f"This instance is {phase.name.lower()}.", code=phase.name.lower())
    if not await board.readable():
        raise Unavailable("No database node answers.", code="nothing_to_serve")
    return written({"status": "ready"})


@router.get("", response_model=HealthView, operation_id="getHealth", summary="How is each dependency?")
async def health(board: BoardDep) -> Response:
    """Return each dependency with the latency of a trivial call; always 200, for it is for people, not for probes."""
    found = await board.dependencies()
    if all(dependency.status == "up" for dependency in found):
        status = "up"
    else:
        status = "degraded" if _any_database(found) else "down"
    dependencies: list[dict[str, Any]] = [dependency.model_dump() for dependency in found]
    return written({"status": status, "dependencies": dependencies})


def _any_database(found: list[DependencyView]) -> bool:
    return any(one.status == "up" for one in found if one.name.startswith(_DATABASE))


def _checks(resources: Resources) -> dict[str, Callable[[], Awaitable[None]]]:
    checks: dict[str, Callable[[], Awaitable[None]]] = {}
    for shard in resources.database.shards:
        for node in shard.replicas.nodes:
            checks[f"{_DATABASE}{shard.number}/{shard.replicas.name_of(node)}"] = _ask_node(node)

    async def redis() -> None:
        async with resources.redis.calling("health") as client:
            await client.ping()

    async def storage() -> None:
        try:
            await resources.storage.get(_NO_OBJECT)
        except NotFound:
            return

    return checks | {"redis": redis, "storage": storage}


def _ask_node(node: Node) -> Callable[[], Awaitable[None]]:
    async def ask() -> None:
        await node.all(select(literal(1)))

    return ask


async def _look_at(name: str, check: Callable[[], Awaitable[None]]) -> DependencyView:
    started = perf_counter()
    status: Literal["up", "down"] = "up"
    try:
        async with asyncio.timeout(_PATIENCE):
            await check()
    except _FAILURES:
        status = "down"
    return DependencyView(name=name, status=status, latency_ms=round((perf_counter() - started) * 1000, 1))
