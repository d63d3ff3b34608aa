"""The hot path: a cached GET of one profile or product by a signed-in caller, answered before routing begins.

It decides nothing of its own: sessions and limits are those of `Admissions`, values those of the cache, tags and
caching rules those of `representations`. Whatever is not at hand or out of the ordinary goes the long way, with what
has been found out so far, and gets the same bytes and headers there.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter
from typing import NamedTuple

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api import metrics
from app.api.exchange import resources_of
from app.api.representations import CACHING, JSON, has, product_tag_of, profile_tag_of
from app.api.security import CONTENT_POLICY, VARY, fixed_headers
from app.core import context
from app.core.settings import Settings
from app.core.telemetry import CACHE_READS, request_finished
from app.domain.sessions.admission import Admission
from app.scaling.cache import PRODUCT, PROFILE, Entry, Kind
from app.scaling.redis_link import RedisDown

_PATH = re.compile(r"/api/v1/(profiles|products)/([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})")
# A body is the long way's to refuse, and a position that must be reached is its to heed.
_UNUSUAL = frozenset({b"content-length", b"transfer-encoding", b"consistency-token"})
_ADMISSION = "scaleout.admission"


@dataclass(frozen=True, slots=True)
class _Route:
    """One hot route: its name in paths, its template in metrics and logs, its kind of value, its tag, who keeps it."""

    name: str
    template: str
    kind: Kind
    tag: Callable[[Entry], str]
    caching: str


_ROUTES = {
    "profiles": _Route("profiles", "/api/v1/profiles/{profile_id}", PROFILE, profile_tag_of, "profile"),
    "products": _Route("products", "/api/v1/products/{product_id}", PRODUCT, product_tag_of, "product"),
}


_COUNTERS = {
    (route.kind.name, layer): CACHE_READS.labels(route.kind.name, layer)
    for route in _ROUTES.values()
    for layer in ("l1", "l2")
}


# What is asked for over and over; a thousand descriptions are a few hundred kilobytes.
@lru_cache(maxsize=1024)
def _described(name: str, entry: Entry) -> tuple[str, list[tuple[bytes, bytes]], list[tuple[bytes, bytes]]]:
    """Return the tag of a value, the headers of a 304, and those of a 200."""
    route = _ROUTES[name]
    tag = route.tag(entry)
    headers = [(b"etag", tag.encode()), (b"cache-control", CACHING[route.caching].encode())]
    if not CACHING[route.caching].startswith("public"):
        headers.append(VARY)
    length = b"%d" % len(entry.body or b"")
    return tag, headers, [*headers, (b"content-length", length), (b"content-type", JSON.encode())]


def admission_of(scope: Scope) -> Admission | None:
    """Return what the hot path has found out of a request that it could not answer."""
    admission: Admission | None = scope.get(_ADMISSION)
    return admission


class HotPath:
    """Answers what it can and passes the rest on; around FastAPI, because it does without it where it can."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._fixed = [*fixed_headers(settings.service), CONTENT_POLICY]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        if scope["type"] == "http" and scope["method"] == "GET" and not scope["query_string"]:
            found = _PATH.fullmatch(scope["path"])
            if found is not None:
                asked = _read(scope["headers"])
                answer = None if asked is None else await self._look(scope, _ROUTES[found[1]], found[2], asked)
                if answer is not None:
                    await self._send(send, answer)
                    return
        await self._app(scope, receive, send)

    async def _look(self, scope: Scope, route: _Route, key: str, asked: "_Asked") -> "_Answer | None":
        """Return the answer to a request, or None if it has to go the long way."""
        started = perf_counter()
        resources = resources_of(scope)
        entry = resources.cache.kept(route.kind, key)
        admission = resources.admissions.at_hand(asked.token) if entry is not None else None
        layer = "l1"
        if admission is None:
            epoch = resources.near.epoch
            try:
                name = resources.cache.name_of(route.kind, key) if entry is None else None
            except RedisDown:
                return None
            admission = await resources.admissions.admit(asked.token, name)
            if admission is None:
                return None
            if admission.value is not None:
                layer, entry = "l2", resources.cache.found(route.kind, key, admission.value, epoch)
        if entry is None or entry.body is None or not admission.verdict.allowed:
            scope[_ADMISSION] = admission
            return None
        _COUNTERS[route.kind.name, layer].inc()
        if route.kind is PRODUCT:
            resources.views.count(key)
        return _Answer(route, entry, admission, asked, layer, started)

    async def _send(self, send: Send, answer: "_Answer") -> None:
        route, entry, admission, asked = answer.route, answer.entry, answer.admission, answer.asked
        body, status = entry.body or b"", 200
        tag, unchanged, whole = _described(route.name, entry)
        if asked.if_none_match is not None and has(asked.if_none_match, tag):
            body, status, whole = b"", 304, unchanged
        milliseconds = (perf_counter() - answer.started) * 1000
        request_id = context.request_id_from(asked.request_id)
        headers = [
            *whole,
            *self._fixed,
            (b"x-request-id", request_id.encode()),
            (b"server-timing", b'cache;desc="%b";dur=%.1f' % (answer.layer.encode(), milliseconds)),
            *admission.verdict.headers(),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        seconds = perf_counter() - answer.started
        metrics.meters_of(route.template, "GET", status // 100).record(seconds, 0, len(body))
        request_finished(
            {
                "request_id": request_id,
                "profile_id": admission.session.profile_id,
                "method": "GET",
                "route": route.template,
                "status": status,
                "duration_ms": round(seconds * 1000, 2),
            }
        )


class _Asked(NamedTuple):
    """What of a request's headers matters here."""

    token: str
    request_id: str | None
    if_none_match: str | None


class _Answer(NamedTuple):
    """What is answered, to what, since when, and which layer of the cache had it."""

    route: _Route
    entry: Entry
    admission: Admission
    asked: _Asked
    layer: str
    started: float


def _read(headers: Iterable[tuple[bytes, bytes]]) -> _Asked | None:
    """Return what a request asks for, or None if it is out of the ordinary or a stranger's."""
    token = request_id = tag = None
    for name, value in headers:
        if name == b"authorization":
            if token is not None or value[:7].lower() != b"bearer ":
                return None
            token = value[7:].strip().decode("latin-1")
        elif name == b"x-request-id":
            request_id = request_id or value.decode("latin-1")
        elif name == b"if-none-match":
            if tag is not None:
                return None
            tag = value.decode("latin-1")
        elif name in _UNUSUAL:
            return None
    return None if token is None else _Asked(token, request_id, tag)
