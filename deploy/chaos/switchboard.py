"""The switchboard of a local cluster: breaks its processes and mends them, for the buttons of the console.

It runs on 127.0.0.1 beside the cluster and nowhere else, and obeys whoever has the key of this run, which the instances
give to an administrator only. A page of another site can neither read the key nor pass for this cluster's origin or
host. The faults are those of the failure table, as far as a cluster without doors has them; each ends after a minute.
"""

import asyncio
import hmac
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from deploy.chaos.faults import CELLS, PROCESSES, UNCONNECTED, Fault, Kind, Target, broken
from deploy.chaos.stage import Stage
from deploy.local import ClusterError
from deploy.local.cluster import Cluster
from deploy.local.layout import HOST
from deploy.local.sandbox import Refused, application, arguments, listen, log_to_stdout, serve

# Long enough to look at all that follows; short enough that what somebody forgets mends itself.
LONGEST_SECONDS = 60.0
KEY = "SWITCHBOARD_KEY"

VERBS = {Kind.KILLED: "Kill", Kind.STOPPED: "Freeze", Kind.SLOW: "Slow down"}
_DOES = {
    Kind.KILLED: "{target}: killed, and killed again whenever it is started.",
    Kind.STOPPED: "{target}: frozen; it is there, keeps its connections, and answers nobody.",
    Kind.SLOW: "{target}: runs 20 of every 200 ms.",
}


def offered(names: Sequence[str]) -> tuple[Fault, ...]:
    """Return the faults that a cluster of these processes can have without doors: what is done to processes."""
    return tuple(
        fault
        for fault in CELLS
        if fault.target is not Target.STORAGE
        and (fault.kind in {Kind.KILLED, Kind.STOPPED} or (fault.kind is Kind.SLOW and fault.target in UNCONNECTED))
        and set(PROCESSES[fault.target]) <= set(names)
    )


@dataclass(frozen=True)
class _Held:
    """A fault that lasts, and until when (`time.monotonic`)."""

    task: asyncio.Task[None]
    until: float


class Switchboard:
    """The faults of one cluster: at most one of each at a time, each with an end.

    Args:
        stage: the cluster.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._faults = {fault.name: fault for fault in offered([each.name for each in stage.cluster.processes])}
        self._held: dict[str, _Held] = {}

    def routes(self) -> list[Route]:
        """Return the calls; each answers how all faults are."""
        return [
            Route("/faults", self.show, methods=["GET"]),
            Route("/faults", self.mend_all, methods=["DELETE"]),
            Route("/faults/{name}", self.hurt, methods=["PUT"]),
            Route("/faults/{name}", self.mend, methods=["DELETE"]),
        ]

    async def show(self, _request: Request) -> Response:
        """`GET`: `{"items": [{name, target, kind, does, active, seconds_left}]}`."""
        return self._answer()

    async def hurt(self, request: Request) -> Response:
        """`PUT`: break it, or have it broken for another minute."""
        fault = self._named(request)
        await self._end(fault.name)
        self._held[fault.name] = _Held(asyncio.create_task(self._hold(fault)), monotonic() + LONGEST_SECONDS)
        return self._answer()

    async def mend(self, request: Request) -> Response:
        """`DELETE` of one: mend it; one that is not broken is none the worse."""
        await self._end(self._named(request).name)
        return self._answer()

    async def mend_all(self, _request: Request) -> Response:
        """`DELETE` of all."""
        await self.end()
        return self._answer()

    async def end(self) -> None:
        """End every fault, so that nothing stays frozen."""
        for name in tuple(self._held):
            await self._end(name)

    async def _hold(self, fault: Fault) -> None:
        # The cluster is going down: nothing is left to be broken.
        with suppress(ClusterError):
            async with broken(self._stage, fault):
                await asyncio.sleep(LONGEST_SECONDS)

    async def _end(self, name: str) -> None:
        held = self._held.pop(name, None)
        if held is not None:
            held.task.cancel()
            with suppress(asyncio.CancelledError):
                await held.task

    def _named(self, request: Request) -> Fault:
        name = request.path_params["name"]
        if name not in self._faults:
            raise Refused(404, "unknown_fault", f"Use one of: {', '.join(self._faults)}.")
        return self._faults[name]

    def _answer(self) -> Response:
        return JSONResponse({"items": [self._view(fault) for fault in self._faults.values()]})

    def _view(self, fault: Fault) -> dict[str, Any]:
        held = self._held.get(fault.name)
        active = held is not None and not held.task.done()
        target = str(fault.target)
        return {
            "name": fault.name,
            "target": target[0].upper() + target[1:],
            "kind": VERBS[fault.kind],
            "does": _DOES[fault.kind].format(target=target[0].upper() + target[1:]),
            "active": active,
            "seconds_left": round(held.until - monotonic(), 1) if held is not None and active else 0,
        }


class Lock:
    """ASGI middleware: refuses whoever has not the key, and a browser that was sent by a page that is not the console.

    Args:
        key: of this run.
        origins: of this cluster's pages.
    """

    def __init__(self, app: ASGIApp, key: str, origins: Sequence[str]) -> None:
        self._app = app
        self._expected = f"Bearer {key}".encode()
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a call on if it may."""
        if scope["type"] == "http" and scope["path"] != "/health/live":
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            given = headers.get("authorization", "").encode("latin-1")
            if (origin is not None and origin not in self._origins) or not hmac.compare_digest(given, self._expected):
                body = {"error": {"code": "forbidden", "message": "Only this cluster's own console may do this."}}
                await JSONResponse(body, 403)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def origins_of(url: str) -> tuple[str, ...]:
    """Return the origins under which a browser on this machine may have opened the console at `url`."""
    port = urlsplit(url).port
    return (f"http://{HOST}:{port}", f"http://localhost:{port}")


def create_app(switchboard: Switchboard, key: str, url: str) -> Starlette:
    """Return the application: for the pages of the cluster at `url`, and whoever has `key`."""

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        await switchboard.end()

    origins = origins_of(url)
    return application(
        switchboard.routes(),
        # A name that somebody has made to lead here is not ours: the address is the only one that the console uses.
        Middleware(TrustedHostMiddleware, allowed_hosts=[HOST], www_redirect=False),
        Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "PUT", "DELETE"],
            allow_headers=["Authorization"],
        ),
        Middleware(Lock, key=key, origins=origins),
        lifespan=lifespan,
    )


def main() -> None:
    """Run the switchboard until SIGTERM or SIGINT: `python -m deploy.chaos.switchboard --port P --data RUN_FOLDER`."""
    options = arguments("Breaks and mends the processes of the local cluster, for its console.")
    log_to_stdout()
    cluster = Cluster(options.data)
    app = create_app(Switchboard(Stage(cluster, {}, None)), os.environ[KEY], cluster.url)
    serve(app, listen("http", HOST, options.port), HttpToolsProtocol)


if __name__ == "__main__":
    main()
