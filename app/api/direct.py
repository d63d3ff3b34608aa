"""The short way to a route: what FastAPI has found out of its signature, followed without FastAPI's machinery.

For each request FastAPI matches every router, opens three exit stacks and resolves each dependency anew, which costs
more than most handlers do. A route all of whose arguments are read from the scope, the path or a JSON body is called
straight from here, with values that FastAPI's own fields have validated. What they refuse, and every other route, goes
FastAPI's way, so that there is one wording of every error.
"""

import re
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple, cast

from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.bodies import FIXED, JsonRoute, read_json
from app.api.dependencies import READERS

_Endpoint = Callable[..., Awaitable[Response]]


class _Read(NamedTuple):
    """An argument that is read from the scope; without a name only for what it refuses."""

    name: str | None
    read: Callable[[Scope], Any]


@dataclass(frozen=True, slots=True)
class _Call:
    """How a route is called: its function, what is read from the scope, and FastAPI's fields of path and body."""

    route: APIRoute
    endpoint: _Endpoint
    reads: tuple[_Read, ...]
    path: tuple[Any, ...]
    body: Any
    request: str | None


class Table:
    """The routes of an application that can be called straight.

    Args:
        app: with all its routes.
    """

    def __init__(self, app: FastAPI) -> None:
        self._exact: dict[tuple[str, str], _Call] = {}
        self._patterns: dict[str, list[tuple[re.Pattern[str], _Call]]] = defaultdict(list)
        for context in iter_route_contexts(app.routes):
            route = context.original_route
            call = _call_of(route) if isinstance(route, JsonRoute) else None
            if call is None:
                continue
            for method in call.route.methods or ():
                if call.path:
                    self._patterns[method].append((call.route.path_regex, call))
                else:
                    self._exact[method, call.route.path] = call

    def routes(self) -> set[tuple[str, str]]:
        """Return method and template of each route in the table."""
        patterns = {(method, call.route.path) for method, calls in self._patterns.items() for _, call in calls}
        return patterns | set(self._exact)

    def find(self, scope: Scope) -> tuple[_Call, dict[str, str]] | None:
        """Return how to call the route that a request asks for, and the texts of its path's parameters."""
        method, path = scope["method"], scope["path"]
        exact = self._exact.get((method, path))
        if exact is not None:
            return exact, {}
        for pattern, call in self._patterns.get(method, ()):
            found = pattern.match(path)
            if found is not None:
                given = found.groupdict()
                return (call, given) if FIXED.isdisjoint(given.values()) else None
        return None


class Direct:
    """Calls what it can and passes the rest on: the last layer before FastAPI's own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._table: Table | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        found = None
        if scope["type"] == "http" and not scope.get("root_path"):
            if self._table is None:  # the first request: by now the application has all its routes
                self._table = Table(scope["app"])
            found = self._table.find(scope)
        if found is None:
            await self._app(scope, receive, send)
            return
        call, given = found
        scope["route"], scope["path_params"] = call.route, given
        body, value = b"", None
        if call.body is not None:
            body, value = await read_json(scope, receive)
        arguments = _arguments(call, scope, given, value)
        if arguments is None:
            await self._app(scope, receive if call.body is None else _again(body, receive), send)
            return
        if call.request is not None:
            arguments[call.request] = Request(scope, receive)
        response = await call.endpoint(**arguments)
        await response(scope, receive, send)


def _call_of(route: JsonRoute) -> _Call | None:
    """Return how to call a route straight, or None for one that needs more than this room knows."""
    dependant: Dependant = route.dependant
    readers = [(each.name, READERS.get(each.call)) for each in dependant.dependencies if each.call is not None]
    reads = [_Read(name, read) for name, read in readers if read is not None]
    body = next(iter(dependant.body_params), None)
    unknown = (
        *(dependant.query_params, dependant.header_params, dependant.cookie_params, dependant.body_params[1:]),
        *(dependant.response_param_name, dependant.background_tasks_param_name),
        body is not None and not body.field_info.is_required(),
        signature(route.endpoint).return_annotation is not Response,
    )
    if len(reads) < len(dependant.dependencies) or any(unknown):
        return None
    return _Call(
        route=route,
        endpoint=cast("_Endpoint", route.endpoint),
        reads=tuple(reads),
        path=tuple(dependant.path_params),
        body=body,
        request=dependant.request_param_name,
    )


def _arguments(call: _Call, scope: Scope, given: dict[str, str], value: Any) -> dict[str, Any] | None:
    """Return the arguments of a call, or None if FastAPI has to say what is wrong with them.

    Raises:
        ServiceError: what the reading of the scope refuses, before anything else is looked at.
    """
    arguments: dict[str, Any] = {}
    for name, read in call.reads:
        found = read(scope)
        if name is not None:
            arguments[name] = found
    for field in call.path:
        arguments[field.name], refused = field.validate(given[field.alias])
        if refused:
            return None
    if call.body is not None:
        arguments[call.body.name], refused = call.body.validate(value)
        if refused:
            return None
    return arguments


def _again(body: bytes, receive: Receive) -> Receive:
    """Return what gives a body that has been read once more, and then what follows it."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def give() -> Message:
        return waiting.pop() if waiting else await receive()

    return give
