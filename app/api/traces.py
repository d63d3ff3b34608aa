"""The edge of a trace: which requests are traced, and below whose span. Only an instance with a collector has it.

Whoever calls may name the trace that the request belongs to, and nothing more: whether it is recorded is drawn here, by
`TRACE_SAMPLE`, as a stranger who could ask for it would choose our costs. Callers in `TRACE_TRUST` have drawn already,
and are followed both ways.
"""

import random

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.exchange import client_address, within
from app.core import tracing
from app.core.settings import Settings
from app.core.tracing import Kind, Parent

# Asked every few seconds by machines; their traces would bury all others.
_UNTRACED = ("/health", "/metrics")


class Traced:
    """Passes requests on, those that are sampled with a span around them."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._share = settings.traces.sample
        self._trusted = settings.traces.trust
        self._proxies = settings.service.trusted_proxies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        # In this order: most requests have been decided about once the dice has fallen.
        if scope["type"] == "http" and (self._trusted or random.random() < self._share):
            headers = Headers(scope=scope)
            parent = tracing.parent_of(headers.get("traceparent"))
            if self._is_sampled(scope, headers, parent) and not scope["path"].startswith(_UNTRACED):
                await self._traced(scope, receive, send, parent)
                return
        await self._app(scope, receive, send)

    def _is_sampled(self, scope: Scope, headers: Headers, parent: Parent | None) -> bool:
        if not self._trusted:
            return True
        if parent is not None and within(client_address(scope, headers, self._proxies), self._trusted):
            return parent.sampled
        return random.random() < self._share

    async def _traced(self, scope: Scope, receive: Receive, send: Send, parent: Parent | None) -> None:
        """Serve a request with a span around it, which `telemetry.request_finished` tells what the request was."""
        with tracing.within(tracing.start("request", Kind.SERVER, parent)) as span:

            async def told(message: Message) -> None:
                if span is not None and message.get("status", 0) >= 500:  # noqa: PLR2004 - server errors
                    span.fail(str(message["status"]))
                await send(message)

            await self._app(scope, receive, told)
