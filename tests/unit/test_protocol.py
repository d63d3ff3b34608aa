"""The server's protocol: a whole answer is one write, and what has to go out early does."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from app.api.protocol import MOST_GATHERED, Protocol

HEAD = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]}
STREAM = {"type": "http.response.start", "status": 200, "headers": []}


class Wire(asyncio.Transport):
    """A transport that notes each write: what leaves together is what no server of this machine can show for sure."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed_after: int | None = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closed_after is not None

    def close(self) -> None:
        self.closed_after = len(self.writes)

    def pause_reading(self) -> None:
        """Nothing is read here."""

    def resume_reading(self) -> None:
        """Nothing is read here."""


async def _serve(wire: Wire, app: Callable[[Scope, Receive, Send], Awaitable[None]], request: bytes) -> Protocol:
    """Have the application answer a request, as far as it can come."""
    config = uvicorn.Config(app, log_config=None, access_log=False)
    config.load()
    protocol = Protocol(config, ServerState(), {})
    protocol.connection_made(wire)
    protocol.data_received(request)
    for _ in range(5):
        await asyncio.sleep(0)
    return protocol


GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"


@pytest.mark.sabotage(
    "app/api/protocol.py", "        self._gathered.append(data)\n", "        self._transport.write(data)\n"
)
@pytest.mark.parametrize("closing", [False, True])
async def test_a_whole_answer_is_one_write(*, closing: bool) -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(HEAD)
        await send({"type": "http.response.body", "body": b"four"})

    request = GET.replace(b"Host", b"Connection: close\r\nHost") if closing else GET
    wire = Wire()
    protocol = await _serve(wire, app, request)
    try:
        (answer,) = wire.writes
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"\r\n\r\nfour")
        assert wire.closed_after == (1 if closing else None)
    finally:
        protocol.connection_lost(None)


@pytest.mark.sabotage("app/api/protocol.py", "            self._loop.call_soon(self.flush)\n", "            pass\n")
async def test_what_a_stream_has_said_is_out_before_it_says_more() -> None:
    more = asyncio.Event()

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(STREAM)
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await more.wait()
        await send({"type": "http.response.body", "body": b"second"})

    wire = Wire()
    protocol = await _serve(wire, app, GET)
    try:
        (begun,) = wire.writes
        assert begun.endswith(b"5\r\nfirst\r\n")
        more.set()
        for _ in range(5):
            await asyncio.sleep(0)
        assert wire.writes[1:] == [b"6\r\nsecond\r\n0\r\n\r\n"]
    finally:
        protocol.connection_lost(None)


@pytest.mark.sabotage(
    "app/api/protocol.py", "if len(data) > MOST_GATHERED or sum(map(len, self._gathered)) > MOST_GATHERED:", "if False:"
)
async def test_a_stream_that_waits_for_nobody_does_not_heap_up() -> None:
    wire, waiting = Wire(), list[int]()

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(STREAM)
        for number in range(20):
            await send({"type": "http.response.body", "body": b"x" * 5000, "more_body": True})
            waiting.append(5000 * (number + 1) - sum(map(len, wire.writes)))
        await send({"type": "http.response.body", "body": b"x" * (MOST_GATHERED + 1)})

    protocol = await _serve(wire, app, GET)
    try:
        assert max(waiting) <= MOST_GATHERED + 5000
        assert b"".join(wire.writes).endswith(b"0\r\n\r\n")
    finally:
        protocol.connection_lost(None)
