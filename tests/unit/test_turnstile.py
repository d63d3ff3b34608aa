"""The turnstile: a request that is answered is forgotten at once, and the collector has nothing of it to look for."""

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest
from starlette.types import Message, Receive, Scope, Send

from app.api.exchange import Exchange, begin
from app.api.turnstile import Turnstile
from app.core.context import Work
from app.scaling.gate import Gate


class Client:
    """A client that sends a request without a body and waits for the answer."""

    def __init__(self) -> None:
        self._sent = False
        self.answer: list[Message] = []

    async def receive(self) -> Message:
        if self._sent:
            await asyncio.Event().wait()
        self._sent = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(self, message: Message) -> None:
        self.answer.append(message)


@pytest.fixture
def _nothing_is_collected() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


async def _answer(_scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await asyncio.sleep(0)  # so that the look after the client has begun
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.usefixtures("_nothing_is_collected")
@pytest.mark.sabotage("app/api/turnstile.py", "                self._watching = None\n", "")
async def test_an_answered_request_leaves_nothing_for_the_collector() -> None:
    client = Client()
    scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    begin(scope, Exchange(Work(request_id="one"), "127.0.0.1"))
    await asyncio.create_task(Turnstile(_answer, Gate(1, 0))(scope, client.receive, client.send))
    for _ in range(5):
        await asyncio.sleep(0)
    assert client.answer
    forgotten = weakref.ref(client)
    del client
    assert forgotten() is None
