"""HTTP metrics under the names of prometheus-fastapi-instrumentator, fed by our own edge.

The package's middleware would match every request against all routes a second time to find its template, and looks
its labels up anew for each. The router has found the template already, and the metrics of one template, method and
status stay at hand; only the package's `/metrics` is used.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import lru_cache

from fastapi import FastAPI
from prometheus_client import Counter, Gauge, Histogram, Summary
from prometheus_fastapi_instrumentator import Instrumentator
from starlette.types import Scope

from app.core.telemetry import LATENCY_BUCKETS

# Made once for the process: an application that is built twice, as in tests, goes on with the same metrics.
_TOTAL = Counter(
    "http_requests_total", "Total number of requests by method, status and handler.", ["method", "status", "handler"]
)
_IN_SIZE = Summary("http_request_size_bytes", "Content length of incoming requests by handler.", ["handler"])
_OUT_SIZE = Summary("http_response_size_bytes", "Content length of outgoing responses by handler.", ["handler"])
_HIGH = Histogram("http_request_duration_highr_seconds", "Latency of all requests.", buckets=LATENCY_BUCKETS)
_LOW = Histogram(
    "http_request_duration_seconds", "Latency by method and handler.", ["method", "handler"], buckets=LATENCY_BUCKETS
)
_TASKS = Gauge("asyncio_tasks", "Tasks of the event loop that have not ended. One that never stops growing is a leak.")
_IN_FLIGHT = Gauge("http_requests_in_flight", "Requests that are being answered, this one included.")
_WAITING = Gauge("http_requests_waiting", "Requests that wait at the gate for a place.")
# A client may invent methods; a label may not.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNMATCHED = "none"
# Of a length: one with more is past every limit, and with some thousands of them it is no number for Python.
_MOST_DIGITS = 19


class Meters:
    """The metrics of one template, method and class of status."""

    def __init__(self, template: str, method: str, status_class: int) -> None:
        self._total = _TOTAL.labels(method, f"{status_class}xx", template)
        self._in_size = _IN_SIZE.labels(template)
        self._out_size = _OUT_SIZE.labels(template)
        self._low = _LOW.labels(method, template)

    def record(self, seconds: float, received: int, sent: int) -> None:
        """Record one finished request: its duration, and the lengths of the bodies as their headers say them."""
        self._total.inc()
        self._in_size.observe(received)
        self._out_size.observe(sent)
        _HIGH.observe(seconds)
        self._low.observe(seconds)


# Templates, methods and classes are few; the bound only guards against a mistake.
@lru_cache(maxsize=4096)
def meters_of(template: str, method: str, status_class: int) -> Meters:
    """Return the metrics of one template, method and class of status."""
    return Meters(template, method, status_class)


def template_of(scope: Scope) -> str:
    """Return the template of the route that the router has chosen, or `none`."""
    return getattr(scope.get("route"), "path", None) or UNMATCHED


def method_of(scope: Scope) -> str:
    """Return the method, or `other` for one that we do not know."""
    method: str = scope["method"]
    return method if method in _METHODS else "other"


def record(scope: Scope, method: str, status: int, headers: Sequence[tuple[bytes, bytes]], seconds: float) -> None:
    """Record a finished request.

    Args:
        scope: as the router has left it.
        method: as the client sent it.
        status: of the answer; 499 if the client went away before there was one.
        headers: of the answer.
        seconds: that the answer took.
    """
    meters = meters_of(template_of(scope), method, status // 100)
    meters.record(seconds, length_of(scope["headers"]) or 0, length_of(headers) or 0)


def count_refused(method: str, number: int) -> None:
    """Count requests that were refused unseen: they have taken no time, and would make all others look quicker."""
    _TOTAL.labels(method, "5xx", UNMATCHED).inc(number)


def length_of(headers: Sequence[tuple[bytes, bytes]]) -> int | None:
    """Return the bytes that a body has by its own account, 0 if it gives none; None if that is no length."""
    length = next((value for name, value in headers if name == b"content-length"), b"0")
    return int(length) if length.isdigit() and len(length) <= _MOST_DIGITS else None


def count_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Tell of the tasks of `loop`; they are counted when somebody asks."""
    _TASKS.set_function(lambda: len(asyncio.all_tasks(loop)))


def count_requests(in_flight: Callable[[], int]) -> None:
    """Tell of the requests in flight, as the server knows them; they are counted when somebody asks."""
    _IN_FLIGHT.set_function(in_flight)


def count_waiting(waiting: Callable[[], int]) -> None:
    """Tell of the requests that wait at the gate."""
    _WAITING.set_function(waiting)


def expose(app: FastAPI) -> None:
    """Serve `/metrics`. NGINX does not pass it on: it is for Prometheus, which asks the instances themselves."""
    Instrumentator().expose(app, include_in_schema=False)
