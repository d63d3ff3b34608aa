"""The server's protocol: a whole answer is one write, and what has to go out early does."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
import uvicorn
from conftest import PATIENCE, until
from fastapi import FastAPI
from pydantic import SecretStr
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from app.api.door import HELD, Door
from app.api.hotpath import Pages
from app.api.protocol import MOST_GATHERED, Protocol
from app.core.settings import ServiceSettings
from app.scaling.gate import Gate

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


async def _serve(
    wire: Wire, app: Callable[[Scope, Receive, Send], Awaitable[None]], request: bytes, gate: Gate | None = None
) -> Protocol:
    """Have the application answer a request, as far as it can come, behind the door of a gate if there is one."""
    config = uvicorn.Config(app, log_config=None, access_log=False)
    config.load()
    state = {}
    if gate is not None:
        state["door"] = _door(gate)
    protocol = Protocol(config, ServerState(), state)
    protocol.connection_made(wire)
    protocol.data_received(request)
    await _settle()
    return protocol


def _door(gate: Gate) -> Door:
    routes = FastAPI()
    routes.state.pages = Pages()
    return Door(routes, gate, ServiceSettings(secret_key=SecretStr("x" * 32)))


async def _written(wire: Wire, writes: int) -> None:
    """Wait until so much has been written."""

    async def it_is() -> bool:
        return len(wire.writes) >= writes

    assert await until(it_is)


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def _answer(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send(HEAD)
    await send({"type": "http.response.body", "body": b"four"})


GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"


@pytest.mark.sabotage(
    "app/api/protocol.py", "        self._gathered.append(data)\n", "        self._transport.write(data)\n"
)
@pytest.mark.parametrize("closing", [False, True])
async def test_a_whole_answer_is_one_write(*, closing: bool) -> None:
    request = GET.replace(b"Host", b"Connection: close\r\nHost") if closing else GET
    wire = Wire()
    protocol = await _serve(wire, _answer, request)
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
        await _settle()
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


@pytest.mark.sabotage(
    "app/api/protocol.py", "if self._is_answering() or self.flow.write_paused:", "if self.flow.write_paused:"
)
async def test_a_refusal_does_not_overtake_the_answer_before_it() -> None:
    go_on = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await go_on.wait()
        await _answer(scope, receive, send)

    wire = Wire()
    protocol = await _serve(wire, app, GET + GET, Gate(1, 0))
    try:
        assert wire.writes == []
        go_on.set()
        await _settle()
        first, _ = wire.writes
        assert first.startswith(b"HTTP/1.1 200")
    finally:
        protocol.connection_lost(None)


@pytest.mark.parametrize("closing", [False, True])
@pytest.mark.parametrize("first", [b"", b"HEAD / HTTP/1.1\r\n\r\n"])
async def test_a_refusal_is_one_write_and_the_connection_goes_on_if_it_may(*, closing: bool, first: bytes) -> None:
    request = GET.replace(b"Host", b"Connection: close\r\nHost") if closing else GET
    wire = Wire()
    protocol = await _serve(wire, _answer, first + request, Gate(0, 0))
    try:
        await _written(wire, 2 if first else 1)
        answer = wire.writes[-1]
        assert answer.startswith(b"HTTP/1.1 503")
        assert len(wire.writes) == (2 if first else 1)
        assert answer.count(b"\r\nconnection: close\r\n") == closing
        assert wire.closed_after == (len(wire.writes) if closing else None)
    finally:
        protocol.connection_lost(None)


@pytest.mark.sabotage("app/api/protocol.py", "        door.hold(self.send_refusal)\n", "        self.send_refusal()\n")
async def test_a_refusal_is_held_for_a_moment_so_that_who_asks_again_at_once_does_not_ask_all_the_time() -> None:
    wire = Wire()
    made = time.monotonic()
    protocol = await _serve(wire, _answer, GET, Gate(0, 0))
    try:
        assert wire.writes == []
        await _written(wire, 1)
        assert time.monotonic() - made >= HELD
    finally:
        protocol.connection_lost(None)


@pytest.mark.sabotage(
    "app/api/protocol.py", "            self.send_refusal()  # of the request", "            pass  # of the request"
)
async def test_a_refusal_is_out_before_the_answer_to_the_next_request() -> None:
    wire = Wire()
    protocol = await _serve(wire, _answer, GET, gate := Gate(0, 0))
    try:
        gate._free = 1
        protocol.data_received(GET)
        await _settle()
        refusal, answer = wire.writes
        assert refusal.startswith(b"HTTP/1.1 503")
        assert answer.startswith(b"HTTP/1.1 200")
    finally:
        protocol.connection_lost(None)


@pytest.mark.sabotage(
    "app/api/protocol.py", "        self.send_refusal()\n        super().shutdown()", "        super().shutdown()"
)
async def test_who_is_refused_at_the_very_end_is_told_before_the_connection_closes() -> None:
    wire = Wire()
    protocol = await _serve(wire, _answer, GET, Gate(0, 0))
    try:
        protocol.shutdown()
        (refusal,) = wire.writes
        assert refusal.startswith(b"HTTP/1.1 503")
        assert wire.closed_after == 1
    finally:
        protocol.connection_lost(None)


@pytest.mark.sabotage("app/api/protocol.py", "if answer is None or self.transport.is_closing():", "if answer is None:")
async def test_nothing_is_written_for_who_has_hung_up_in_that_moment() -> None:
    wire = Wire()
    protocol = await _serve(wire, _answer, GET, Gate(0, 0))
    try:
        wire.close()

        async def none_is_held() -> bool:
            return protocol._refusal is None

        assert await until(none_is_held)
        assert wire.writes == []
    finally:
        protocol.connection_lost(None)


@pytest.mark.sabotage(
    "app/api/door.py", "        finally:  # whatever became of one", "        except RecursionError:  # of one"
)
async def test_a_refusal_that_cannot_be_sent_keeps_no_other_one_back() -> None:
    door, sent = _door(Gate(0, 0)), asyncio.Event()

    def fails() -> None:
        raise OSError

    asyncio.get_running_loop().set_exception_handler(lambda _loop, _said: None)
    door.hold(fails)
    door.hold(sent.set)
    assert await asyncio.wait_for(sent.wait(), PATIENCE)


@pytest.mark.sabotage("app/api/protocol.py", " or self.flow.write_paused:", ":")
async def test_who_reads_no_answers_is_given_no_more_of_them() -> None:
    wire = Wire()
    protocol = await _serve(wire, _answer, GET, Gate(0, 0))
    try:
        await _written(wire, 1)
        protocol.pause_writing()
        for _ in range(3):
            protocol.data_received(GET)
            await _settle()
        assert len(wire.writes) == 1
        protocol.resume_writing()
        await _settle()
        assert wire.writes[1].startswith(b"HTTP/1.1 200"), "begun, as whoever sends it an answer waits for its reader"
    finally:
        protocol.connection_lost(None)


@pytest.mark.sabotage("app/api/protocol.py", "        if self._is_answering():\n            return\n", "")
async def test_one_timer_closes_a_connection_that_is_idle_and_none_that_is_busy() -> None:
    go_on = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await go_on.wait()
        await _answer(scope, receive, send)

    wire = Wire()
    protocol = await _serve(wire, app, GET)
    try:
        go_on.set()
        await _settle()
        timer = protocol.timeout_keep_alive_task
        protocol.data_received(GET)
        await _settle()
        assert timer is not None
        assert protocol.timeout_keep_alive_task is timer, "the second answer needs no timer of its own"
        protocol.timeout_keep_alive_handler()
        assert not wire.is_closing(), "it was not idle for long enough"
        go_on.clear()
        protocol.data_received(GET)
        protocol.timeout_keep_alive = 0
        protocol.timeout_keep_alive_handler()
        assert not wire.is_closing(), "a request is being answered"
        go_on.set()
        await _settle()
        protocol.timeout_keep_alive_handler()
        assert wire.is_closing()
    finally:
        protocol.connection_lost(None)
    assert protocol.timeout_keep_alive_task is None or protocol.timeout_keep_alive_task.cancelled()
