"""One API instance: `create_app` puts middleware, routes and error handlers together; the lifespan opens what they use.

An instance keeps nothing that another one lacks. Start it with `scaleout api`, or with any ASGI server:
`uvicorn --factory app.main:create_app` (`scaleout api` also leaves without losing a request: `app/api/serving.py`).
"""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from sqlalchemy import String, column, select, table
from sqlalchemy.exc import ProgrammingError
from starlette.datastructures import State
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api import (
    admin,
    assets,
    catalog,
    console,
    documentation,
    events,
    files,
    health,
    metrics,
    middleware,
    orders,
    problems,
    profiles,
    reports,
    sessions,
)
from app.api.door import Door
from app.api.hotpath import HotPath, Pages
from app.api.limits import Limits
from app.api.traces import Traced
from app.core import tracing
from app.core.errors import Unavailable
from app.core.settings import Settings, load_settings
from app.core.telemetry import configure_logging
from app.scaling.database import Reader
from app.scaling.gate import Gate
from app.scaling.lifecycle import Phase
from app.wiring import Resources, beating, open_resources
from migrations import runner

# Alembic's own table: one row, the newest step.
_STEPS = select(column("version_num", String)).select_from(table("alembic_version"))

ROUTERS = (
    health.router,
    profiles.router,
    assets.router,
    sessions.router,
    catalog.router,
    orders.router,
    events.router,
    reports.router,
    files.router,
    admin.router,
    documentation.router,
    console.router,
)


class _State(State):
    """Starlette's, with plain attributes: its own are each found by a function in Python, ten times a request."""

    def __setattr__(self, key: str, value: Any) -> None:
        object.__setattr__(self, key, value)

    def __delattr__(self, key: str) -> None:
        object.__delattr__(self, key)


class Service(FastAPI):
    """One instance: the hot path answers what it can before anything of FastAPI begins, and passes the rest on."""

    def __init__(self, settings: Settings, gate: Gate, **options: Any) -> None:
        super().__init__(middleware=middleware.layers(settings, gate), **options)
        self.state = _State()
        # Starlette's own call: FastAPI's looks at each request for telemetry that nobody has configured, which costs as
        # much as four of our layers; ours is `Traced`.
        self._hot = HotPath(super(FastAPI, self).__call__, settings, gate)
        self._outermost: ASGIApp = self._hot if settings.traces.endpoint is None else Traced(self._hot, settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the lifespan."""
        scope["app"] = self
        await self._outermost(scope, receive, send)

    def build_middleware_stack(self) -> ASGIApp:
        """Return our layers around the router, without FastAPI's outermost three; Starlette asks for it once.

        Those answer what nobody has caught, look for telemetry and bound bodies: `RequestEdge` and `BodyLimit` do.
        """
        app: ASGIApp = AsyncExitStackMiddleware(self.router)
        app = ExceptionMiddleware(app, handlers=self.exception_handlers)
        for layer in reversed(self.user_middleware):
            app = layer.cls(app, *layer.args, **layer.kwargs)
        return app


def create_app(settings: Settings | None = None) -> FastAPI:
    """Return one API instance.

    Args:
        settings: from the environment unless given.

    Raises:
        SettingsError: naming every setting that is missing or bad.
    """
    chosen = settings or load_settings()
    gate = Gate(chosen.service.requests_at_once, chosen.service.requests_waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        configure_logging(chosen.service, "api")
        metrics.count_tasks(asyncio.get_running_loop())
        with tracing.exporting(chosen, "api"):
            async with open_resources(chosen) as resources:
                app.state.resources = resources
                health.install(app, resources)
                events.install(app, resources)
                census = console.install(app, resources)
                # It listens at once, so that whoever asks its health is told what it waits for.
                starting = asyncio.create_task(_start(resources), name="start")
                try:
                    async with beating(resources, "api"):
                        yield {"lifecycle": resources.lifecycle, "door": Door(app, gate, chosen.service)}
                finally:
                    starting.cancel()
                    resources.lifecycle.enter(Phase.DRAINING)
                    await census.stop()
            resources.lifecycle.enter(Phase.STOPPED)

    metrics.count_waiting(lambda: gate.waiting)
    app = Service(
        chosen,
        gate,
        title="scaleout",
        version="1",
        # `documentation` serves both, without assets from elsewhere.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.limiter = Limits(chosen.rates)
    app.state.pages = Pages()
    problems.install(app)
    for router in ROUTERS:
        app.include_router(router)
    metrics.expose(app)
    documentation.install(app)
    return app


async def _start(resources: Resources) -> None:
    """Become ready: once a database is there, has this code's tables, and the pools hold their connections."""

    async def tables() -> None:
        await _look_at_tables(resources)

    await resources.lifecycle.start({"tables": tables, "connections": resources.database.warm})
    # What is there now stays for good: the collector need not look through all of it again and again, which holds every
    # request up for tens of milliseconds.
    gc.collect()
    gc.freeze()
    # What a request leaves behind nearly always ends with its last reference. To look through it every 700 objects, a
    # few requests, took 2 % of an instance; with 10,000, what waits to be looked through is a few megabytes.
    gc.set_threshold(10_000, *gc.get_threshold()[1:])


async def _look_at_tables(resources: Resources) -> None:
    """Read the newest migration on every shard.

    One shard that answers is enough to serve its profiles; one that is behind this code is a reason to wait, as its
    requests would fail. One ahead of this code is not: migrations only add, and a rollout runs both.

    Raises:
        Unavailable: no shard answers, or one is behind.
    """
    found = await asyncio.gather(*(_newest_step(reader) for reader in resources.database.readers()))
    answers = [step for step in found if not isinstance(step, Unavailable)]
    if not answers:
        raise Unavailable("This instance starts: no database node answers yet.", code="nothing_to_serve")
    behind = next((step for step in answers if runner.is_behind(step)), None)
    if behind is not None:
        raise Unavailable(
            f"This instance starts: it needs the tables of migration {runner.head()} and finds {behind or 'none'}; "
            "run `scaleout migrate`.",
            code="not_migrated",
        )


async def _newest_step(reader: Reader) -> str | Unavailable:
    """Return the newest migration that a shard has had, empty before the first, or why it cannot say."""
    try:
        row = await reader.first(_STEPS)
    except ProgrammingError:  # there is no such table
        return ""
    except Unavailable as error:
        return error
    return row.version_num if row else ""
