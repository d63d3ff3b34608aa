"""What every request passes on its way in and every answer on its way out: pure ASGI, in one ordered list, `layers`.

Whoever stops a request raises an error of `core/errors.py`; the outermost layer writes it as a problem. So an answer
carries the request id, the security headers, the rate limit's and all others, whoever made it.
"""

import asyncio
from collections.abc import Callable, MutableMapping
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api import metrics, problems
from app.api.direct import Direct
from app.api.exchange import (
    SAFE,
    Exchange,
    bearer_of,
    begin,
    client_address,
    cookie_of,
    exchange_of,
    limit_subject,
    out_of_time,
    resources_of,
    session_cookie,
    timing_of,
)
from app.api.hotpath import found_of
from app.api.limits import Exceeded, Limits, judge, limits_of
from app.api.security import CONTENT_POLICY, VARY, fixed_headers
from app.api.turnstile import Turnstile
from app.core import context
from app.core.errors import Forbidden, Invalid, ServiceError, TooLarge, Unauthenticated
from app.core.settings import Settings
from app.core.signing import BadSignature
from app.core.telemetry import logger, request_finished
from app.domain.profiles.avatars import LARGEST
from app.domain.sessions.admission import Admission
from app.domain.sessions.rules import Session
from app.scaling.deadlines import Deadlines
from app.scaling.gate import Gate
from app.scaling.storage import LINK_PATH
from app.wiring import Resources

log = logger(__name__)

CLIENT_GONE = 499  # NGINX's number for an answer that nobody waited for; it appears in logs and metrics only
# For machines and for reading about the API: neither limited nor signed in, so that they answer when nothing else does.
_EXEMPT = ("/health", "/metrics", "/docs", "/openapi.json")


def layers(settings: Settings, gate: Gate) -> list[Middleware]:
    """Return the middleware in order, the outermost first; around them all is the hot path, `HotPath`.

    Args:
        settings: of the service.
        gate: bounds what goes on at a time, here and on the hot path.
    """
    return [
        # First, because it writes what all others raise, and times, logs and counts them.
        Middleware(RequestEdge, settings=settings),
        # Before anything that costs something: a body that is too long is refused unread.
        Middleware(BodyLimit, limit=settings.service.body_limit, upload_limit=LARGEST),
        # Around all that asks a dependency, the session's look-up included.
        Middleware(Deadline),
        # Before anything that asks a dependency, and cheap itself: past its capacity the instance refuses here.
        Middleware(Turnstile, gate=gate),
        # Because it asks Redis: by now the request is small and has its time.
        Middleware(Callers, settings=settings),
        # Last, because all that stands before it is true of every request, whoever answers it.
        Middleware(Direct),
    ]


class RequestEdge:
    """Begins the exchange, and finishes whatever answer there is: headers, metrics, one line in the log."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings.service
        self._fixed = fixed_headers(settings.service)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request from its first byte to its line in the log."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = perf_counter()
        method = metrics.method_of(scope)
        headers = Headers(scope=scope)
        found = found_of(scope)
        work = (found.work if found else None) or context.Work(
            request_id=context.request_id_from(headers.get("x-request-id")),
            deadline=asyncio.get_running_loop().time() + self._settings.request_deadline,
        )
        exchange = Exchange(work, client_address(scope, headers, self._settings.trusted_proxies))
        # A HEAD is a GET whose body stays here, so that no route has to know of it. A scope of our own, because the
        # server goes on reading its own.
        scope = {**scope, "method": "GET"} if method == "HEAD" else {**scope}
        begin(scope, exchange)
        outgoing = _Outgoing(send, self._finish(scope, exchange), bodiless=method == "HEAD")
        try:
            with context.working(work):
                await self._serve(scope, receive, outgoing)
        finally:
            # A stream lasts as long as somebody listens: what it took to answer is the time to its first byte.
            ended = outgoing.begun_at if exchange.streamed else perf_counter()
            metrics.record(scope, method, outgoing.status, outgoing.headers, ended - started)
            who: dict[str, str | UUID] = {"request_id": work.request_id}
            if work.profile_id is not None:
                who["profile_id"] = work.profile_id
            what = {"method": method, "route": metrics.template_of(scope), "status": outgoing.status}
            request_finished({**who, **what, "duration_ms": round((perf_counter() - started) * 1000, 2)})

    async def _serve(self, scope: Scope, receive: Receive, outgoing: "_Outgoing") -> None:
        try:
            await self._pass_on(scope, receive, outgoing)
        except ServiceError as error:
            if outgoing.begun:
                raise
            await problems.answer(error)(scope, receive, outgoing)
        except Exceeded as exceeded:
            if outgoing.begun:
                raise
            await problems.answer(exceeded.error)(scope, receive, outgoing)
        except Exception:  # the one place where a bug becomes an answer
            log.exception("unhandled error", route=metrics.template_of(scope))
            if outgoing.begun:  # half an answer: the server has to break off the connection, or it would look whole
                raise
            await problems.unexpected()(scope, receive, outgoing)

    async def _pass_on(self, scope: Scope, receive: Receive, outgoing: "_Outgoing") -> None:
        found = found_of(scope)
        if found is not None:  # what is refused or has failed already takes no place from anybody
            exchange = exchange_of(scope)
            exchange.work.profile_id = found.admission.session.profile_id
            judge(exchange, found.admission.verdict)
            if found.failure is not None:
                raise found.failure
        await self._app(scope, receive, outgoing)

    def _finish(self, scope: Scope, exchange: Exchange) -> "Callable[[Message], Message]":
        def finish(start: Message) -> Message:
            work = exchange.work
            headers: list[tuple[bytes, bytes]] = [*start.get("headers", []), *self._fixed]
            headers.append((b"x-request-id", work.request_id.encode()))
            if work.spans:
                headers.append((b"server-timing", timing_of(work)))
            if exchange.verdict is not None:
                headers += exchange.verdict.headers()
            if exchange.cookie is not None:
                headers.append((b"set-cookie", exchange.cookie.encode()))
            if work.wrote:
                headers.append((b"consistency-token", _consistency(scope, work)))
            _default(headers, *CONTENT_POLICY)
            _default(headers, b"cache-control", b"no-store")
            caching = next(value for name, value in headers if name == b"cache-control")
            if caching.startswith(b"public") and exchange.cookie is not None:
                # A shared cache must not hand one client's cookie to another.
                caching = b"private, no-cache"
                headers = [pair for pair in headers if pair[0] != b"cache-control"]
                headers.append((b"cache-control", caching))
            if not caching.startswith(b"public"):
                _default(headers, *VARY)
            return {**start, "headers": headers}

        return finish


class _Outgoing:
    """The answer on its way out: its start is finished, the body of a HEAD stays behind."""

    def __init__(self, send: Send, finish: Callable[[Message], Message], *, bodiless: bool) -> None:
        self._send = send
        self._finish = finish
        self._bodiless = bodiless
        self.begun = False
        self.begun_at = 0.0
        self.status = CLIENT_GONE
        self.headers: list[tuple[bytes, bytes]] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message = self._finish(message)
            self.begun = True
            self.begun_at = perf_counter()
            self.status = message["status"]
            self.headers = message["headers"]
            await self._send(message)
            if self._bodiless:  # whole at once: a body that stays here may be one that takes minutes
                await self._send({"type": "http.response.body", "body": b""})
        elif not self._bodiless:
            await self._send(message)


class BodyLimit:
    """Refuses a body over `limit` bytes: by what it says of itself, or else as soon as it is longer.

    An upload to a link of ours may have `upload_limit`, and the link says less.
    """

    def __init__(self, app: ASGIApp, limit: int, upload_limit: int) -> None:
        self._app = app
        self._limit = limit
        self._upload_limit = upload_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its body counted."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_upload = scope["method"] == "PUT" and scope["path"].startswith(f"{LINK_PATH}/")
        limit = self._upload_limit if is_upload else self._limit
        declared = metrics.length_of(scope["headers"])
        if declared is None or declared > limit:
            raise TooLarge(f"The body may have {limit} bytes at most.")
        seen = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise TooLarge(f"The body may have {limit} bytes at most.")
            return message

        await self._app(scope, counted, send)


class Deadline:
    """Ends a request that nobody waits for any more, wherever it is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._deadlines = Deadlines()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on until its deadline."""
        exchange = exchange_of(scope) if scope["type"] == "http" else None
        if exchange is None or exchange.work.deadline is None:
            await self._app(scope, receive, send)
            return
        try:
            with self._deadlines.until(exchange.work.deadline) as exchange.block:
                await self._app(scope, receive, send)
        except TimeoutError as error:
            if exchange.block is None or not exchange.block.expired:
                raise
            raise out_of_time() from error


class Callers:
    """Finds out who calls, counts the request against the limit, and refuses what another site made a browser send."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings.service
        self._origin = _origin(settings.service.public_url)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on once its caller is known and within the limit."""
        if scope["type"] == "http" and not scope["path"].startswith(_EXEMPT):
            await self._admit(scope)
        await self._app(scope, receive, send)

    async def _admit(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        ours = _heed_token(scope, headers)
        await self._count(scope, headers)
        # It has been counted, like whatever else is made up.
        if not ours:
            raise Invalid.field(
                "header/Consistency-Token",
                "This Consistency-Token is not one that this service gave out; leave it out.",
                code="invalid_consistency_token",
            )

    async def _count(self, scope: Scope, headers: Headers) -> None:
        """Find out who calls, in this order: asking Redis, counting the address, asking the copy of the session."""
        exchange = exchange_of(scope)
        resources = resources_of(scope)
        limits = limits_of(scope)
        bearer = bearer_of(headers)
        cookie = None if bearer is not None else cookie_of(headers)
        token = bearer if bearer is not None else cookie
        found = found_of(scope)
        if found is not None:
            admission: Admission | None = found.admission
        else:
            admission = await resources.admissions.admit(token) if token else None
        if admission is not None:
            resources.positions.heed(admission.positions)
            self._signed_in(exchange, admission.session)
            judge(exchange, admission.verdict)
            if cookie is not None and scope["method"] not in SAFE:
                self._check_origin(headers)
            return
        session = None
        if token:
            session = await self._ask_the_copy(token, exchange, resources, limits)
        else:
            await limits.count(exchange, resources.limiter, limits.anonymous, limit_subject(exchange.address))
        if session is None:
            if bearer is not None:
                raise Unauthenticated("This token is not valid (any more); sign in again.", code="invalid_token")
            if cookie is not None:
                exchange.cookie = session_cookie("", 0, self._settings)
            return
        self._signed_in(exchange, session)
        await limits.count(exchange, resources.limiter, limits.tier(session.tier), str(session.profile_id))
        if cookie is not None and scope["method"] not in SAFE:
            self._check_origin(headers)

    @staticmethod
    async def _ask_the_copy(token: str, exchange: Exchange, resources: Resources, limits: Limits) -> Session | None:
        """Return the session of a token that Redis does not know.

        It costs a read of the shard, which must not be free for whoever invents tokens: the address pays first, and is
        paid back if the session is real. One that was real here before pays only once it is no more: when Redis is
        lost, everybody behind one address comes this way at once.
        """
        subject = limit_subject(exchange.address)
        was_real = resources.admissions.vouches_for(token)
        if not was_real:
            await limits.count(exchange, resources.limiter, limits.anonymous, subject)
        session = await resources.sessions.find(token)
        if session is not None:
            if not was_real:
                await resources.limiter.give_back(limits.anonymous, subject)
                exchange.verdict = None
            resources.admissions.vouch(token)
        elif was_real:
            resources.admissions.doubt(token)
            await limits.count(exchange, resources.limiter, limits.anonymous, subject)
        return session

    @staticmethod
    def _signed_in(exchange: Exchange, session: Session) -> None:
        exchange.session = session
        exchange.work.profile_id = session.profile_id

    def _check_origin(self, headers: Headers) -> None:
        # A browser adds the cookie to what any page makes it send, but lets no page forge these headers.
        origin, host = headers.get("origin"), headers.get("host")
        if origin is not None:
            genuine = origin == self._origin or (bool(host) and origin in {f"http://{host}", f"https://{host}"})
        else:
            genuine = headers.get("sec-fetch-site") in {"same-origin", "none"}
        if not genuine:
            raise Forbidden(
                "With the cookie, a change must come from this site: send a same-origin Origin, or use the token.",
                code="csrf_rejected",
            )


def _heed_token(scope: Scope, headers: Headers) -> bool:
    """Have the request's reads reach what its Consistency-Token says; return whether there is none but genuine ones."""
    token = headers.get("consistency-token")
    if token is None:
        return True
    try:
        positions = resources_of(scope).tokens.open(token)
    except BadSignature:
        return False
    context.current().bound = True
    for shard, position in positions:
        context.current().reached(shard, position)
    return True


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _default(headers: list[tuple[bytes, bytes]], name: bytes, value: bytes) -> None:
    if all(present != name for present, _ in headers):
        headers.append((name, value))


def _consistency(scope: Scope, work: context.Work) -> bytes:
    """Return the token by which later reads show what was just written; the caller's session knows it already."""
    return resources_of(scope).tokens.sign(sorted(work.positions.items())).encode()
