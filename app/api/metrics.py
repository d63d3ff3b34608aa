"""HTTP metrics under the names of prometheus-fastapi-instrumentator, fed by our own edge.

The package's middleware would match every request against all routes a second time to find its template. The router
has found it already, so the edge hands it to the package's own recording function, and only that and `/metrics` are
used.
"""

from collections.abc import Sequence
from time import perf_counter
from typing import Any

from fastapi import FastAPI
from prometheus_fastapi_instrumentator import Instrumentator
from prometheus_fastapi_instrumentator.metrics import Info, default
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from app.core.telemetry import LATENCY_BUCKETS

# Made once for the process: an application that is built twice, as in tests, goes on with the same metrics.
_record: Any = default(latency_highr_buckets=LATENCY_BUCKETS, latency_lowr_buckets=LATENCY_BUCKETS)
# A client may invent methods; a label may not.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNMATCHED = "none"


def template_of(scope: Scope) -> str:
    """Return the template of the route that the router has chosen, or `none`."""
    return getattr(scope.get("route"), "path", None) or UNMATCHED


def method_of(scope: Scope) -> str:
    """Return the method, or `other` for one that we do not know."""
    method: str = scope["method"]
    return method if method in _METHODS else "other"


def record(scope: Scope, method: str, status: int, headers: Sequence[tuple[bytes, bytes]], started: float) -> float:
    """Record a finished request and return its duration in seconds.

    Args:
        scope: as the router has left it.
        method: as the client sent it.
        status: of the answer; 499 if the client went away before there was one.
        headers: of the answer.
        started: `perf_counter()` when the request arrived.
    """
    duration = perf_counter() - started
    response = Response(status_code=status)
    response.raw_headers = [pair for pair in headers if pair[0] == b"content-length"]
    _record(
        Info(
            request=_Sized(scope),
            response=response,
            method=method,
            modified_handler=template_of(scope),
            modified_status=f"{status // 100}xx",
            modified_duration=duration,
        )
    )
    return duration


class _Sized(Request):
    """A request whose content length is a number, which the recording function takes for granted."""

    @property
    def headers(self) -> Headers:
        """Only the content length, and only a sane one."""
        length = next((value for name, value in self.scope["headers"] if name == b"content-length"), b"0")
        return Headers(raw=[(b"content-length", length if length.isdigit() else b"0")])


def expose(app: FastAPI) -> None:
    """Serve `/metrics`. NGINX does not pass it on: it is for Prometheus, which asks the instances themselves."""
    Instrumentator().expose(app, include_in_schema=False)
