"""The server's HTTP protocol, with three differences: refusals before work, one write an answer, problems for rubbish.

A request that the door refuses gets no task and no layer, only an answer that is ready. uvicorn writes head and body
one after the other, which are two system calls here, two packets, and two wake-ups for whoever reads them. Bytes that
are no request (a control character in a header, a method that does not exist) never reach a middleware; uvicorn by
itself answers them with a line of plain text, and NGINX passes many of them on.
"""

import asyncio
from typing import Any, cast

from starlette.datastructures import Headers
from starlette.types import Scope
from uvicorn._types import ASGI3Application
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from app.api import problems
from app.api.door import Door
from app.api.security import CONTENT_POLICY
from app.core import context

# Bytes that wait for more of the same answer. To copy so few costs less than a system call; more than that goes out at
# once, so that a stream that never waits for its reader cannot fill the memory.
MOST_GATHERED = 16_384
CLOSE = (b"connection", b"close")


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol on httptools; named in `scaleout api`."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._door: Door | None = app_state.get("door")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Put what gathers an answer in front of the transport."""
        plain = cast("asyncio.Transport", transport)  # uvloop's own is no subclass of it
        super().connection_made(plain)
        self.transport = cast("asyncio.Transport", _Gathering(plain, self.loop))

    def on_response_complete(self) -> None:
        """Send what is gathered: the answer is whole."""
        cast("_Gathering", self.transport).flush()
        super().on_response_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """Begin to serve a request whose head is parsed, and before which all others are answered; or refuse it."""
        scope = cast("Scope", cycle.scope)
        if self._door is None or not self._door.refuses(scope):
            super()._start_asgi_task(cycle, app)
            return
        more = [*self.server_state.default_headers]
        if not cycle.keep_alive and CLOSE not in more:
            more.append(CLOSE)
        cycle.response_started = cycle.response_complete = True
        self.transport.write(self._door.refusal(scope, b"".join(b"%b: %b\r\n" % pair for pair in more)))
        if CLOSE in more:
            self.transport.close()
        self.on_response_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  # uvicorn's name; its text would say nothing new
        """Answer bytes that are no request, and hang up."""
        with context.working(context.Work(request_id=context.new_request_id())) as work:
            answer = problems.unreadable()
        headers = Headers(raw=[*answer.raw_headers, CONTENT_POLICY, *self.server_state.default_headers])
        lines = [f"{name}: {value}" for name, value in headers.items()]
        lines += [f"x-request-id: {work.request_id}", "x-content-type-options: nosniff", "cache-control: no-store"]
        head = "\r\n".join([*lines, "connection: close", "", ""]).encode("latin-1")
        self.transport.write(STATUS_LINE[400] + head + bytes(answer.body))
        self.transport.close()


class _Gathering:
    """A transport whose writes of one turn of the event loop leave together; all of it that uvicorn uses."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._gathered: list[bytes] = []
        self.is_closing = transport.is_closing
        self.get_extra_info = transport.get_extra_info

    def write(self, data: bytes) -> None:
        """Send this with what else the answer has in this turn, or at once if it is much."""
        if len(data) > MOST_GATHERED or sum(map(len, self._gathered)) > MOST_GATHERED:
            self.flush()
            self._transport.write(data)
            return
        if not self._gathered:
            self._loop.call_soon(self.flush)
        self._gathered.append(data)

    def flush(self) -> None:
        """Send what is gathered."""
        if self._gathered:
            data = b"".join(self._gathered)
            self._gathered.clear()
            self._transport.write(data)

    def close(self) -> None:
        """Hang up behind what is gathered."""
        self.flush()
        self._transport.close()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Hand the connection over."""
        self.flush()
        self._transport.set_protocol(protocol)
