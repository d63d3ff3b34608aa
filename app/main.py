"""One API instance: `create_app` puts middleware, routes and error handlers together; the lifespan opens what they use.

An instance keeps nothing that another one lacks. Start it with `scaleout api`, or with any ASGI server:
`uvicorn --factory app.main:create_app`.
"""

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from sqlalchemy import literal, select

from app.api import (
    admin,
    catalog,
    documentation,
    files,
    health,
    metrics,
    middleware,
    orders,
    problems,
    profiles,
    sessions,
)
from app.core.errors import Unavailable
from app.core.settings import Settings, load_settings
from app.core.telemetry import configure_logging, logger
from app.scaling.lifecycle import Phase
from app.wiring import open_resources

log = logger(__name__)

ROUTERS = (
    health.router,
    profiles.router,
    sessions.router,
    catalog.router,
    orders.router,
    files.router,
    admin.router,
    documentation.router,
)


def create_app(settings: Settings | None = None) -> FastAPI:
    """Return one API instance.

    Args:
        settings: from the environment unless given.

    Raises:
        SettingsError: naming every setting that is missing or bad.
    """
    chosen = settings or load_settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        configure_logging(chosen.service, "api")
        async with open_resources(chosen) as resources:
            app.state.resources = resources
            health.install(app, resources)
            # The first read opens a connection, so that the first request does not wait for it. A database that is
            # down is no reason not to start: readiness says so, and what is cached can be served.
            try:
                await resources.database.reader().first(select(literal(1)))
            except Unavailable as error:
                log.warning("started without a database", code=error.code)
            # What is there now stays for good: the collector need not look through all of it again and again, which
            # holds every request up for tens of milliseconds.
            gc.collect()
            gc.freeze()
            resources.lifecycle.enter(Phase.READY)
            try:
                yield
            finally:
                resources.lifecycle.enter(Phase.DRAINING)
        resources.lifecycle.enter(Phase.STOPPED)

    app = FastAPI(
        title="scaleout",
        version="1",
        # `documentation` serves both, without assets from elsewhere.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        middleware=middleware.layers(chosen),
    )
    problems.install(app)
    for router in ROUTERS:
        app.include_router(router)
    metrics.expose(app)
    documentation.install(app)
    return app
