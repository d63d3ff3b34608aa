"""One connection to a Redis that this test plays: late answers, lost ones, and a loop that was busy."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic

import pytest

from app.scaling.line import Line
from app.scaling.redis_link import RedisDown

# Of an answer; far above what a question takes to its server here, on any machine.
TIMEOUT = 0.5  # seconds


@asynccontextmanager
async def line_to(answers: asyncio.Event, asked: asyncio.Event | None = None) -> AsyncIterator[Line]:
    """Connect to a server that sets `asked` when it has a command, and answers it with OK once `answers` is set."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1000):
            if asked is not None:
                asked.set()
            await answers.wait()
            writer.write(b"+OK\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    _, line = await asyncio.get_running_loop().create_connection(lambda: Line(TIMEOUT, lambda: None), "127.0.0.1", port)
    try:
        yield line
    finally:
        line.cut()
        answers.set()
        server.close()
        await server.wait_closed()


async def test_a_server_that_is_silent_is_given_up_and_refuses_from_then_on() -> None:
    async with line_to(asyncio.Event()) as line:
        with pytest.raises(RedisDown):
            await line.ask(("PING",))
        with pytest.raises(RedisDown):
            line.ask(("PING",))


@pytest.mark.sabotage(
    path="app/scaling/line.py", take_out="        elif oldest is not self._suspect:", put="        elif oldest is None:"
)
async def test_a_loop_that_was_busy_does_not_take_its_redis_for_dead() -> None:
    answers, asked = asyncio.Event(), asyncio.Event()
    async with line_to(answers, asked) as line:
        answer = line.ask(("PING",))
        await asked.wait()
        busy_until = monotonic() + TIMEOUT
        while monotonic() < busy_until:
            pass
        # In its next turn the loop lets the server answer, and then looks for what is late; it reads in the one after.
        answers.set()
        assert await answer == b"OK"
        assert await line.ask(("PING",)) == b"OK"
