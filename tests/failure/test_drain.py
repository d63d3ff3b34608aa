"""An instance that is told to go: it says so, serves on, finishes what it has begun, and nobody notices."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import httpx
import pytest
import uvicorn
import uvloop
from conftest import until
from engines import database_at
from expectations import check_problem
from instances import Instance, command, ready
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.api.protocol import Protocol
from app.api.serving import ACCEPTED_A_TURN, Server
from app.scaling.lifecycle import Lifecycle
from deploy.local.cluster import Cluster

pytest_plugins = ("instances",)


def empty_database(cluster: Cluster) -> AbstractAsyncContextManager[str]:
    """Make a database without tables on the primary, yield its URL, and drop it."""
    return database_at(cluster.process("primary").address, "unmigrated")


@pytest.mark.sabotage("app/api/serving.py", "self._loop.call_later(self._serve_on, self._finish)", "self._finish()")
async def test_an_instance_that_is_told_to_go_fails_readiness_at_once_and_serves_on(
    new_instance: Callable[..., Awaitable[Instance]],
) -> None:
    instance = await new_instance(DRAIN_SECONDS="3")
    await until(ready, instance)
    told = asyncio.get_running_loop().time()
    instance.tell()

    async def not_ready() -> httpx.Response | None:
        answer = await instance.client.get("/health/ready")
        return answer if answer.status_code == 503 else None

    check_problem(await until(not_ready), 503, "draining")
    served = 0
    while (answer := await instance.answers("/api/v1/products?limit=1")) is not None:
        assert answer.status_code == 200
        assert answer.headers["connection"] == "close"
        served += 1
    lasted = asyncio.get_running_loop().time() - told
    assert served
    assert lasted >= 3
    assert await instance.ended() == 0
    assert "Traceback" not in instance.log.read_text()


@pytest.mark.sabotage(
    "app/api/serving.py", "step = Leaving(min(self._leaving + 1, Leaving.AT_ONCE))", "step = Leaving.SERVING_ON"
)
async def test_a_second_signal_ends_the_waiting(new_instance: Callable[..., Awaitable[Instance]]) -> None:
    instance = await new_instance(DRAIN_SECONDS="60")
    await until(ready, instance)
    instance.tell()

    async def draining() -> bool:
        return (await instance.client.get("/health/ready")).json().get("code") == "draining"

    await until(draining)
    instance.tell()
    assert await instance.ended() == 0


async def listening() -> Server:
    """Return a server that listens on a free port, before an application that says what it was told."""

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[dict[str, Lifecycle]]:
        yield {"lifecycle": Lifecycle()}

    async def echo(request: Request) -> Response:
        return Response(await request.body())

    app = Starlette(routes=[Route("/", echo, methods=["POST"])], lifespan=lifespan)
    server = Server(uvicorn.Config(app, port=0, http=Protocol, log_config=None), serve_on=0)
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await server.startup()
    return server


def connect(server: Server, number: int) -> list[socket.socket]:
    """Connect so many clients while the event loop has no turn: the kernel does it, and nobody accepts them yet."""
    port = server.servers[0].sockets[0].getsockname()[1]
    return [socket.create_connection(("127.0.0.1", port)) for _ in range(number)]


@pytest.mark.sabotage("app/api/serving.py", "await self._accept_all(waiting)", "pass")
async def test_connections_made_before_the_listener_closed_are_served() -> None:
    server = await listening()
    port = server.servers[0].sockets[0].getsockname()[1]
    clients = connect(server, 20)
    for client in clients:
        client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\nhi")
    await server.shutdown()

    for client in clients:
        with client:
            answer = client.recv(1000)
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"hi")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


@pytest.mark.sabotage("app/api/serving.py", "for _ in range(ACCEPTED_A_TURN - 2)", "for _ in range(0)")
def test_a_crowd_of_new_connections_is_taken_in_few_turns() -> None:
    number = 5 * ACCEPTED_A_TURN

    async def count() -> int:
        server, turns = await listening(), 0
        clients = connect(server, number)
        try:
            while len(server.server_state.connections) < number:
                await asyncio.sleep(0)
                turns += 1
        finally:
            for client in clients:
                client.close()
            await server.shutdown()
        return turns

    # An instance's own event loop, which takes one connection of each listener in a turn.
    assert uvloop.run(count()) < number / ACCEPTED_A_TURN * 2


@pytest.mark.sabotage("app/main.py", "if behind is not None:", "if False:")
async def test_a_start_says_what_it_waits_for_and_goes_on_when_it_is_there(
    cluster: Cluster, new_instance: Callable[..., Awaitable[Instance]]
) -> None:
    async with empty_database(cluster) as url:
        instance = await new_instance(DATABASE_URL=url, REPLICA_URLS="")

        async def says_so() -> httpx.Response | None:
            answer = await instance.client.get("/health/ready")
            return answer if "scaleout migrate" in answer.text else None

        check_problem(await until(says_so), 503, "starting")
        assert (await instance.client.get("/health/startup")).status_code == 503
        assert (await instance.client.get("/health/live")).status_code == 200
        migration = await command(cluster, "migrate", DATABASE_URL=url, REPLICA_URLS="")
        assert await migration.wait() == 0
        await until(ready, instance)
        assert (await instance.client.get("/health/startup")).status_code == 200
