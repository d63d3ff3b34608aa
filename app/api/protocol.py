"""The server's HTTP protocol with four differences: early refusals, one write an answer, one timer, tidy errors.

A request that the door refuses gets no task and no layer, only an answer that is ready and waits a moment. uvicorn
writes head and body one after the other, which are two system calls here, two packets, and two wake-ups for whoever
reads them; and it sets a timer behind each answer, to call it off at the next request. Bytes that are no request (a
control character in a header, a method that does not exist) never reach a middleware; uvicorn by itself answers them
with a line of plain text, and NGINX passes many of them on.
"""

import asyncio
from typing import Any, cast
from urllib.parse import unquote

from starlette.datastructures import Headers
from starlette.types import Scope
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from app.api import problems
from app.api.door import CLOSE, Door
from app.api.security import CONTENT_POLICY
from app.core import context

# Bytes that wait for more of the same answer. To copy so few costs less than a system call; more than that goes out at
# once, so that a stream that never waits for its reader cannot fill the memory.
MOST_GATHERED = 16_384


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
        self._quiet_since = 0.0
        self._gathering: _Gathering
        # The answer that the door holds, and whether the connection ends with it.
        self._refusal: bytes | None = None
        self._refusal_is_last = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Put what gathers an answer in front of the transport."""
        plain = cast("asyncio.Transport", transport)  # uvloop's own is no subclass of it
        super().connection_made(plain)
        self._gathering = _Gathering(plain, self.loop)
        self.transport = cast("asyncio.Transport", self._gathering)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self._refusal = None
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()

    def on_response_complete(self) -> None:
        """Send what is gathered, as the answer is whole; then begin the next request, or wait for one."""
        self._gathering.flush()
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        self._quiet_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._wait_for_the_next(self.timeout_keep_alive)

    def _unset_keepalive_if_required(self) -> None:
        """Note that something has come; the one timer goes on, as a new one for each request costs more."""
        self._quiet_since = self.loop.time()

    def timeout_keep_alive_handler(self) -> None:
        """Hang up if nothing has come for long enough; while a request is answered, its answer sets the timer."""
        self.timeout_keep_alive_task = None
        if self._is_answering():
            return
        left = self._quiet_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._wait_for_the_next(left)
        else:
            super().timeout_keep_alive_handler()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait_for_the_next(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def on_message_begin(self) -> None:
        """Prepare for a request, and make no scope yet: what is refused needs none."""
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        """Begin to serve a request whose head is here; or refuse it before anything is made for it."""
        if self._refusal is not None:
            self.send_refusal()  # of the request before it: answers leave in the order of requests
        if self._door is None or not self._refuses(self._door):
            url, headers, expects = self.url, self.headers, self.expect_100_continue
            super().on_message_begin()
            self.url, self.expect_100_continue = url, expects
            self.headers += headers
            super().on_headers_complete()

    def _refuses(self, door: Door) -> bool:
        """Return whether a request has been refused.

        One that comes before the answer to the last one waits for its turn, and whoever reads no answers is given no
        more of them: both are the gate's to refuse. An upgrade is the server's own affair.
        """
        if self._is_answering() or self.flow.write_paused:
            return False
        if door.has_room() or self.parser.should_upgrade():
            return False
        path, _, query = self.url.partition(b"?")
        scope: Scope = {
            "method": self.parser.get_method().decode("ascii"),
            "path": unquote(path.decode("latin-1")) if b"%" in path else path.decode("latin-1"),
            "query_string": query,
            "headers": self.headers,
            "client": self.client,
        }
        if not door.refuses(scope):
            return False
        keep = self.parser.should_keep_alive() and self.parser.get_http_version() != "1.0"
        self.cycle = _OVER
        self.headers = []  # an idle connection keeps nothing of what it has asked
        self._refusal = door.refusal(scope, self.server_state.default_headers, keep=keep)
        self._refusal_is_last = not keep
        door.hold(self.send_refusal)
        return True

    def send_refusal(self) -> None:
        """Send the refusal that is held, if there is one and somebody still waits for it."""
        answer, self._refusal = self._refusal, None
        if answer is None or self.transport.is_closing():
            return
        self._gathering.write_whole(answer)
        self.server_state.total_requests += 1
        if self._refusal_is_last or CLOSE in self.server_state.default_headers:
            self.transport.close()
        elif self.timeout_keep_alive_task is None:
            self._wait_for_the_next(self.timeout_keep_alive)

    def shutdown(self) -> None:
        """Send what is held, and close the connection once nothing is answered on it any more."""
        self.send_refusal()
        super().shutdown()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  # uvicorn's name; its text would say nothing new
        """Answer bytes that are no request, and hang up."""
        self.send_refusal()
        with context.working(context.Work(request_id=context.new_request_id())) as work:
            answer = problems.unreadable()
        headers = Headers(raw=[*answer.raw_headers, CONTENT_POLICY, *self.server_state.default_headers])
        lines = [f"{name}: {value}" for name, value in headers.items()]
        lines += [f"x-request-id: {work.request_id}", "x-content-type-options: nosniff", "cache-control: no-store"]
        head = "\r\n".join([*lines, "connection: close", "", ""]).encode("latin-1")
        self.transport.write(STATUS_LINE[400] + head + bytes(answer.body))
        self.transport.close()


class _Over:
    """What stands for the exchange of a request that was refused: all that uvicorn asks of one that is answered."""

    response_complete = True
    message_event = asyncio.Event()


_OVER = cast("RequestResponseCycle", _Over())


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

    def write_whole(self, data: bytes) -> None:
        """Send an answer of which nothing is to come any more."""
        self.flush()
        self._transport.write(data)

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
