"""Between the edge and all that costs something: the gate, and an eye on callers who go away.

A request takes its place once its body is there, so that a slow client holds none, and gives it back with its answer.
When its client hangs up, what only waits or reads is ended; a change that has begun comes to its end, as half of one is
worse. Health and sign-out pass by; a stream, which has bounds of its own, keeps no place.
"""

import asyncio
from collections.abc import Hashable
from contextlib import AsyncExitStack

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.exchange import SAFE, exchange_of, limit_subject, resources_of, token_in
from app.scaling.gate import Gate

# What must be answered when nothing else is: probes, and the end of a session that somebody may have stolen.
_ALWAYS = ("/health", "/metrics")
_SESSIONS = "/api/v1/sessions"


class Turnstile:
    """Passes requests on through the gate, and ends those whose client is gone."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, when its turn comes."""
        if scope["type"] != "http" or passes_by(scope):
            await self._app(scope, receive, send)
            return
        body = await _whole(receive)
        if body is None:
            return
        await _Exchanged(body, receive, send, safe=scope["method"] in SAFE).serve(self._app, scope, self._gate)


class _Exchanged:
    """One request whose body is here: its client is watched while it waits and is served."""

    def __init__(self, body: bytes, receive: Receive, send: Send, *, safe: bool) -> None:
        self._body: bytes | None = body
        self._receive = receive
        self._send = send
        self._may_end = True
        self._safe = safe
        self._gone = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._place = AsyncExitStack()

    async def serve(self, app: ASGIApp, scope: Scope, gate: Gate) -> None:
        """Pass the gate and run the application until it has answered, or until its client is gone."""
        work = asyncio.current_task()
        if work is None:
            raise RuntimeError("a request is served in a task")
        # A change whose turn has come is never ended, so nobody looks after its client unless somebody asks.
        if self._safe or gate.full:
            self._watch(work)
        try:
            async with self._place:
                await self._place.enter_async_context(gate.pass_through(_caller(scope)))
                self._may_end = self._safe
                await app(scope, self.receive, self.send)
        except asyncio.CancelledError:
            if not self._gone.is_set() or work.uncancel() > 0:
                raise
        finally:
            if self._watching is not None:
                self._watching.cancel()
                # Its last frame holds this exchange: what is forgotten here makes no circle for the collector to find.
                self._watching = None

    async def receive(self) -> Message:
        """Give the body, and after it the news that the client is gone."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        self._watch(None)
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Pass a part of the answer on."""
        if message["type"] == "http.response.start":
            if Headers(raw=message.get("headers", [])).get("content-type", "").startswith("text/event-stream"):
                await self._place.aclose()
        elif not message.get("more_body"):
            # The server tells the end of an answer like the end of a client.
            self._may_end = False
        await self._send(message)

    def _watch(self, work: "asyncio.Task[None] | None") -> None:
        """Look after the client from now on, and end `work` with it if it may end."""
        if self._watching is None:
            self._watching = asyncio.create_task(self._look(work), name="client")

    async def _look(self, work: "asyncio.Task[None] | None") -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone.set()
        if work is not None and self._may_end:
            work.cancel()


async def _whole(receive: Receive) -> bytes | None:
    """Return the body, or None if the client is gone; the layers around this one bound its length and its time."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def passes_by(scope: Scope) -> bool:
    """Return whether a request needs no place."""
    path: str = scope["path"]
    return path.startswith(_ALWAYS) or (scope["method"] == "DELETE" and path.startswith(_SESSIONS))


def known_caller(scope: Scope) -> str | None:
    """Return under which name the caller is counted, if the session is at hand.

    What a token says of itself is not asked: whoever invents tokens would stand in as many lines as they like.
    """
    token = token_in(dict(scope["headers"][::-1]))  # the first of each name counts
    return resources_of(scope).admissions.known(token) if token else None


def _caller(scope: Scope) -> Hashable:
    """Return whose line a request stands in: a caller's whose session is at hand, else that of the address."""
    return known_caller(scope) or limit_subject(exchange_of(scope).address)
