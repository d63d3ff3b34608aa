"""Side `routes`: this service with 500 more routes in front of its own, which a cached read must not notice.

uvicorn --factory loadtests.bench.crowded:create_app
"""

from fastapi import APIRouter, FastAPI

from app import main

MORE = 500


def create_app() -> FastAPI:
    """Return an instance that has to look through `MORE` more routes for whatever it routes."""
    app = main.create_app()
    router = APIRouter()

    async def nothing() -> None:
        return

    for number in range(MORE):
        router.add_api_route(f"/api/v1/more/{number}/{{name}}", nothing)
    own = app.router.routes[:]
    app.include_router(router)
    # Theirs first: a route is looked for in order.
    app.router.routes[:] = [*app.router.routes[len(own) :], *own]
    return app
