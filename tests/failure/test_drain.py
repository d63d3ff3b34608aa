"""An instance that is told to go: it says so, serves on, finishes what it has begun, and nobody notices."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest
import uvicorn
from conftest import until
from expectations import check_problem
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.api.protocol import Protocol
from app.api.serving import Server
from app.scaling.lifecycle import Lifecycle
from deploy.local.cluster import Cluster
from deploy.local.layout import CHECKOUT


@dataclass(frozen=True)
class Instance:
    """An instance outside of the cluster's own, on the cluster's servers; nobody starts it again."""

    process: asyncio.subprocess.Process
    client: httpx.AsyncClient
    log: Path

    def tell(self, number: int = signal.SIGTERM) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    async def ended(self) -> int:
        """Wait for its end and return its exit code."""
        async with asyncio.timeout(40):
            return await self.process.wait()

    async def answers(self, path: str = "/health/live") -> httpx.Response | None:
        """Ask it something; None while it does not listen."""
        try:
            return await self.client.get(path)
        except httpx.TransportError:
            return None


async def command(
    cluster: Cluster, *arguments: str, output: Any = None, **environment: str
) -> asyncio.subprocess.Process:
    """Start `scaleout` with these arguments in the cluster's environment."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "app.cli", *arguments),
        cwd=CHECKOUT,
        env=cluster.environment | {"PATH": os.environ["PATH"]} | environment,
        stdout=output,
        stderr=output,
    )


@asynccontextmanager
async def empty_database(cluster: Cluster) -> AsyncIterator[str]:
    """Make a database without tables on the primary, yield its URL, and drop it."""
    address = urlsplit(cluster.process("primary").address or "")
    connection = await asyncpg.connect(address._replace(path="/postgres").geturl())
    try:
        await connection.execute("CREATE DATABASE unmigrated")
        yield address._replace(path="/unmigrated").geturl()
        await connection.execute("DROP DATABASE unmigrated WITH (FORCE)")
    finally:
        await connection.close()


@pytest.fixture
async def new_instance(cluster: Cluster, tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Instance]]]:
    """Start instances; what still runs is killed at the end."""
    made: list[Instance] = []

    async def make(**environment: str) -> Instance:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = tmp_path / f"{port}.log"
        with log.open("wb") as output:
            process = await command(
                cluster, "api", "--port", str(port), INSTANCE=f"extra-{port}", output=output, **environment
            )
        client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=15)
        instance = Instance(process, client, log)
        made.append(instance)
        await until(instance.answers)
        return instance

    yield make
    for instance in made:
        await instance.client.aclose()
        if instance.process.returncode is None:
            instance.process.kill()
            await instance.process.wait()


async def ready(instance: Instance) -> bool:
    """Say whether the instance is ready."""
    answer = await instance.answers("/health/ready")
    return answer is not None and answer.status_code == 200


@pytest.mark.sabotage("app/api/serving.py", "self._loop.call_later(self._serve_on, self._finish)", "self._finish()")
async def test_an_instance_that_is_told_to_go_fails_readiness_at_once_and_serves_on(
    new_instance: Callable[..., Awaitable[Instance]],
) -> None:
    instance = await new_instance(DRAIN_SECONDS="1.5")
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
    assert served > 10
    assert lasted >= 1.5
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
        return (await instance.client.get("/health/ready")).json()["code"] == "draining"

    await until(draining)
    instance.tell()
    assert await instance.ended() == 0


@pytest.mark.sabotage("app/api/serving.py", "await self._accept_all(waiting)", "pass")
async def test_connections_made_before_the_listener_closed_are_served() -> None:
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
    port = server.servers[0].sockets[0].getsockname()[1]

    # Nothing here lets the event loop take a turn: the kernel makes the connections, and nobody accepts them yet.
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
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
