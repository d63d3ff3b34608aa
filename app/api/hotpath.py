"""The hot path: a GET of what is cached, by a signed-in caller, answered before routing begins.

It decides nothing of its own: sessions and limits are those of `Admissions`, values those of the cache, which loads
what it does not have, tags and caching rules those of `representations`; and a page of a list is found as the long way
found it for the same words. Whatever is out of the ordinary goes the long way, with what has been found out so far, and
gets the same bytes and headers there.
"""

import asyncio
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api import metrics
from app.api.exchange import out_of_time, resources_of, timing_of, token_in
from app.api.representations import CACHING, JSON, has, product_tag_of, profile_tag_of
from app.api.security import CONTENT_POLICY, VARY, fixed_headers
from app.core import context
from app.core.errors import Unavailable
from app.core.settings import Settings
from app.core.telemetry import CACHE_READS, request_finished
from app.domain.sessions.admission import Admission
from app.scaling.cache import PRODUCT, PROFILE, Entry, Kind, Listing, Load
from app.scaling.deadlines import Deadlines
from app.scaling.gate import Gate
from app.scaling.redis_link import RedisDown
from app.wiring import Resources

_PATH = re.compile(r"/api/v1/(profiles|products)/([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})")
# A body is the long way's to refuse, and a position that must be reached is its to heed.
_UNUSUAL = frozenset({b"content-length", b"transfer-encoding", b"consistency-token"})
_HEEDED = frozenset({b"authorization", b"cookie", b"x-request-id", b"if-none-match"})
_FOUND = "scaleout.found"
# Pages that an instance knows how to find: what people really ask for; each is a query string and a statement.
MOST_PAGES = 1000


@dataclass(frozen=True, slots=True, eq=False)
class _Route:
    """One hot route: its template (as the router's have it), its kind of value, who may keep it, and its tag if any."""

    path: str
    kind: Kind
    caching: str | None
    tag: Callable[[Entry], str] | None


_SINGLE = {
    "profiles": _Route("/api/v1/profiles/{profile_id}", PROFILE, "profile", profile_tag_of),
    "products": _Route("/api/v1/products/{product_id}", PRODUCT, "product", product_tag_of),
}


class Pages:
    """How pages are found that this instance has answered the long way, by path and query string; bounded."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, bytes], tuple[_Route, Listing]] = OrderedDict()

    def find(self, scope: Scope) -> tuple[_Route, Listing] | None:
        """Return the route and the page that a request asks for, if it is known."""
        return self._known.get((scope["path"], scope["query_string"]))

    async def answer(self, request: Request, listing: Listing, *, caching: str | None = None) -> Response:
        """Return a page the long way, and have the next request of the same words answered without it.

        Args:
            request: asks for it, and is within all bounds.
            listing: what it asks for; it must depend on nothing of the request but path and query string.
            caching: a key of `CACHING`, or None where nobody may keep it.
        """
        scope = request.scope
        body = await resources_of(scope).cache.page(listing)
        route = _Route(metrics.template_of(scope), listing.kind, caching, None)
        self._known[scope["path"], scope["query_string"]] = route, listing
        self._known.move_to_end((scope["path"], scope["query_string"]))
        if len(self._known) > MOST_PAGES:
            self._known.popitem(last=False)
        return Response(body, headers=None if caching is None else {"Cache-Control": CACHING[caching]}, media_type=JSON)


def pages_of(scope: Scope) -> Pages:
    """Return the pages that are known to the application that serves this request."""
    pages: Pages = scope["app"].state.pages
    return pages


@lru_cache(maxsize=64)
def _counter(kind: str, layer: str) -> Callable[[], None]:
    return CACHE_READS.labels(kind, layer).inc


# What is asked for over and over; a thousand descriptions are a few hundred kilobytes.
@lru_cache(maxsize=1024)
def _described(route: _Route, entry: Entry) -> tuple[str | None, list[tuple[bytes, bytes]], list[tuple[bytes, bytes]]]:
    """Return the tag of a value, the headers of a 304, and those of a 200."""
    caching = CACHING[route.caching] if route.caching else "no-store"
    headers = [(b"cache-control", caching.encode())]
    if not caching.startswith("public"):
        headers.append(VARY)
    tag = route.tag(entry) if route.tag else None
    if tag is not None:
        headers.append((b"etag", tag.encode()))
    length = b"%d" % len(entry.body or b"")
    return tag, headers, [*headers, (b"content-length", length), (b"content-type", JSON.encode())]


class Found(NamedTuple):
    """What has been found out of a request that is passed on.

    Attributes:
        admission: who calls; the request has been counted.
        work: what was done for it, where something was loaded.
        failure: why it cannot be answered, if it cannot.
    """

    admission: Admission
    work: context.Work | None = None
    failure: Exception | None = None


def found_of(scope: Scope) -> Found | None:
    """Return what the hot path has found out of a request that it has passed on."""
    found: Found | None = scope.get(_FOUND)
    return found


class HotPath:
    """Answers what it can and passes the rest on; around FastAPI, because it does without it where it can."""

    def __init__(self, app: ASGIApp, settings: Settings, gate: Gate) -> None:
        self._app = app
        self._gate = gate
        self._deadline = settings.service.request_deadline
        self._deadlines = Deadlines()
        self._fixed = [*fixed_headers(settings.service), CONTENT_POLICY]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        if scope["type"] == "http" and scope["method"] == "GET":
            value = _value_of(scope)
            if value is not None:
                asked = _read(scope["headers"])
                answer = None if asked is None else await self._look(scope, value, asked)
                if answer is not None:
                    await self._send(send, answer)
                    return
        await self._app(scope, receive, send)

    @staticmethod
    def has_at_hand(scope: Scope) -> bool:
        """Return whether value and caller are both in this instance's memory, so that the answer waits for nobody."""
        value = _value_of(scope) if scope["method"] == "GET" else None
        asked = _read(scope["headers"]) if value is not None else None
        if value is None or asked is None:
            return False
        resources = resources_of(scope)
        return (
            resources.cache.kept(value.route.kind, value.key) is not None
            and resources.admissions.known(asked.token) is not None
            and (not _is_own(resources, value, asked) or resources.positions.at_rest(value.key))
        )

    async def _look(self, scope: Scope, value: "_Value", asked: "_Asked") -> "_Answer | None":
        """Return the answer to a request, or None if it has to go the long way."""
        started = perf_counter()
        resources = resources_of(scope)
        route, key, _ = value
        own, changing = _is_own(resources, value, asked), False
        entry = None if own and not resources.positions.at_rest(key) else resources.cache.kept(route.kind, key)
        admission = resources.admissions.at_hand(asked.token) if entry is not None else None
        layer, work = "l1", None
        if admission is None:
            admission, held, changing = await self._ask(resources, value, asked, is_kept=entry is not None, own=own)
            if admission is None:
                return None
            if held is not None:
                layer, entry = "l2", held
            elif entry is None and admission.verdict.allowed:
                layer, work = "miss", self._begin(admission, asked, started)
                try:
                    entry = await self._load(resources, value, admission, work, changing=changing)
                except Exception as failure:  # noqa: BLE001  # the edge raises it again, and writes what comes of it
                    scope["route"] = route
                    scope[_FOUND] = Found(admission, work, failure)
                    return None
        if entry is None or entry.body is None or not admission.verdict.allowed:
            if not admission.verdict.allowed:
                scope["route"] = route
            scope[_FOUND] = Found(admission)
            return None
        if not changing:  # what goes past the cache counts itself
            _counter(route.kind.name, layer)()
        if route.kind is PRODUCT:
            resources.views.count(key)
        return _Answer(route, entry, admission, asked, layer, started, work)

    @staticmethod
    async def _ask(
        resources: Resources, value: "_Value", asked: "_Asked", *, is_kept: bool, own: bool
    ) -> tuple[Admission | None, Entry | None, bool]:
        """Ask Redis who calls, and for a value that is not kept here.

        Returns:
            The caller; the value, where Redis has it and the caller may be shown it; whether they may have seen a newer
            one, so that it has to be loaded.
        """
        route, key, load = value
        epoch = resources.near.epoch
        try:
            names = None if is_kept else resources.cache.names_of(route.kind, key)
        except RedisDown:
            return None, None, False
        admission = await resources.admissions.admit(asked.token, names, own=own)
        if admission is None or not admission.verdict.allowed:
            return admission, None, False
        if own and resources.positions.changing(key, admission.positions, epoch):
            return admission, None, True
        raw = admission.value
        held = resources.cache.found(route.kind, key, raw, epoch, load) if isinstance(raw, bytes) else None
        return admission, held, False

    def _begin(self, admission: Admission, asked: "_Asked", started: float) -> context.Work:
        work = context.Work(
            request_id=context.request_id_from(asked.request_id),
            profile_id=admission.session.profile_id,
        )
        work.spans["cache"] = context.Span("miss", (perf_counter() - started) * 1000)
        return work

    async def _load(
        self, resources: Resources, value: "_Value", admission: Admission, work: context.Work, *, changing: bool
    ) -> Entry:
        """Load what Redis does not have or the caller has seen more of: behind the gate, with the deadline of all."""
        kind, key, load = value.route.kind, value.key, value.load
        deadline = work.deadline = asyncio.get_running_loop().time() + self._deadline
        with context.working(work):
            resources.positions.heed(admission.positions)
            try:
                with self._deadlines.until(deadline):
                    async with self._gate.pass_through(work.profile_id):
                        if changing:
                            return await resources.cache.read_past(kind, key, load)
                        if admission.value is None:
                            return await resources.cache.read(kind, key, load)
                        return await resources.cache.load(kind, key, load, leased=bool(admission.value))
            except TimeoutError as error:
                raise out_of_time() from error
            except Unavailable:
                if admission.value:  # it may have been refused before it could load
                    await resources.cache.give_up(kind, key)
                raise

    async def _send(self, send: Send, answer: "_Answer") -> None:
        route, entry, admission, asked = answer.route, answer.entry, answer.admission, answer.asked
        body, status = entry.body or b"", 200
        tag, unchanged, whole = _described(route, entry)
        if tag is not None and has(asked.if_none_match, tag):
            body, status, whole = b"", 304, unchanged
        if answer.work is None:
            request_id = context.request_id_from(asked.request_id)
            milliseconds = (perf_counter() - answer.started) * 1000
            timing = b'cache;desc="%b";dur=%.1f' % (answer.layer.encode(), milliseconds)
        else:
            request_id, timing = answer.work.request_id, timing_of(answer.work)
        headers = [
            *whole,
            *self._fixed,
            (b"x-request-id", request_id.encode()),
            (b"server-timing", timing),
            *admission.verdict.headers(),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        seconds = perf_counter() - answer.started
        metrics.meters_of(route.path, "GET", status // 100).record(seconds, 0, len(body))
        request_finished(
            {
                "request_id": request_id,
                "profile_id": admission.session.profile_id,
                "method": "GET",
                "route": route.path,
                "status": status,
                "duration_ms": round(seconds * 1000, 2),
            }
        )


class _Value(NamedTuple):
    """What a request asks for: its route, the key of its value, and how that is loaded if its kind does not say it."""

    route: _Route
    key: str
    load: Load | None


class _Asked(NamedTuple):
    """What of a request's headers matters here."""

    token: str
    request_id: str | None
    if_none_match: str | None


class _Answer(NamedTuple):
    """What is answered, to what, since when, which layer of the cache had it, and what was done where none had."""

    route: _Route
    entry: Entry
    admission: Admission
    asked: _Asked
    layer: str
    started: float
    work: context.Work | None


def _value_of(scope: Scope) -> _Value | None:
    """Return what a request asks for, or None if it is none of the hot routes' or not known how to find it."""
    if not scope["query_string"]:
        found = _PATH.fullmatch(scope["path"])
        if found is not None:
            return _Value(_SINGLE[found[1]], found[2], None)
    pages: Pages = scope["app"].state.pages
    page = pages.find(scope)
    if page is None:
        return None
    route, listing = page
    generations = resources_of(scope).cache.generations_kept(listing.families)
    if generations is None:
        return None
    return _Value(route, listing.key_at(generations), listing.load(generations))


def _is_own(resources: Resources, value: _Value, asked: "_Asked") -> bool:
    """Return whether a caller asks for their own profile, of which the database may have told them more."""
    return value.route.kind is PROFILE and resources.admissions.is_of(asked.token, value.key)


def _read(headers: Iterable[tuple[bytes, bytes]]) -> _Asked | None:
    """Return what a request asks for, or None if it is out of the ordinary or a stranger's."""
    heeded: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in _UNUSUAL or (name in heeded and name != b"x-request-id"):
            return None
        if name in _HEEDED:
            heeded.setdefault(name, value)
    token = token_in(heeded)
    if token is None:
        return None
    request_id, tag = heeded.get(b"x-request-id"), heeded.get(b"if-none-match")
    return _Asked(
        token,
        None if request_id is None else request_id.decode("latin-1"),
        None if tag is None else tag.decode("latin-1"),
    )
