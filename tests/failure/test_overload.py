"""More than an instance can do: it refuses early and says so, and goes on with what it has let in."""

import asyncio
import re
import resource
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager

import asyncpg
import httpx
import pytest
from conftest import Customer, until
from expectations import check_problem
from instances import Instance, ready

from deploy.local.cluster import Cluster

pytest_plugins = ("instances",)
pytestmark = pytest.mark.postgresql("a lock of a whole table holds the reads up")

CHEAP = "/api/v1/products?limit=1"
# Each takes up to two of the 4,096 connections of a process of NGINX, of which a machine with one core has one.
CROWD = 2000
NOWHERE = "/api/v1/nothing"
HANGING = "/api/v1/admin/dead-letters"
# The labels under which the refused are counted: nobody has found their routes.
ONES = 'handler="none",method="GET",status="5xx"'


@asynccontextmanager
async def hanging(cluster: Cluster) -> AsyncIterator[Callable[[], Awaitable[bool]]]:
    """Let whatever reads dead letters wait inside the block; yields what says whether something does."""

    async def waits() -> bool:
        return bool(
            await connection.fetchval(
                "SELECT 1 FROM pg_locks WHERE relation = 'dead_letters'::regclass AND NOT granted"
            )
        )

    connection = await asyncpg.connect(cluster.process("primary").address)
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE dead_letters IN ACCESS EXCLUSIVE MODE")
            yield waits
    finally:
        await connection.close()


@pytest.fixture
def many_files() -> Iterator[None]:
    """Let this process have as many connections as it may; a shell gives a process 1,024 files as a rule."""
    usual, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < CROWD + 1000:
        pytest.skip(f"needs {CROWD + 1000} open files, and may have {most}: raise the hard limit (`ulimit -Hn`)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (usual, most))


@pytest.fixture
async def narrow(
    new_instance: Callable[..., Awaitable[Instance]], admin: Customer, cluster: Cluster
) -> tuple[Instance, Callable[[], asyncio.Task[httpx.Response]]]:
    """An instance that takes one request at a time, and a way to send it one that hangs; nobody ends that soon."""
    one = {"REQUESTS_AT_ONCE": "1", "REQUESTS_WAITING": "0"}
    patient = {
        "DATABASE_URL": f"{cluster.environment['DATABASE_URL']}?statement_timeout=300s",
        "DATABASE_COMMAND_TIMEOUT": "60",
        "REQUEST_DEADLINE": "120",
    }
    instance = await new_instance(**one, **patient, REPLICA_URLS="")
    await until(ready, instance)

    def hang() -> asyncio.Task[httpx.Response]:
        return asyncio.create_task(
            instance.client.get(HANGING, headers={"Authorization": f"Bearer {admin.token}"}), name="hanging"
        )

    return instance, hang


async def served(instance: Instance) -> bool:
    """Say whether something cheap is answered."""
    return (await instance.client.get(CHEAP)).status_code == 200


@pytest.mark.sabotage("app/api/middleware.py", "Middleware(Turnstile, gate=gate),", "")
async def test_past_its_places_it_refuses_and_still_answers_health_and_sign_out(
    narrow: tuple[Instance, Callable[[], asyncio.Task[httpx.Response]]],
    cluster: Cluster,
    new_customer: Callable[..., Awaitable[Customer]],
) -> None:
    (instance, hang), customer = narrow, await new_customer()
    async with hanging(cluster) as waits:
        inside = hang()
        await until(waits)
        answer = await instance.client.get(CHEAP)
        check_problem(answer, 503, "overloaded")
        assert answer.headers["retry-after"] == "1"
        assert (await instance.client.get("/health/live")).status_code == 200
        assert (await instance.client.get("/health/ready")).status_code == 200
        out = await instance.client.delete(
            "/api/v1/sessions/current", headers={"Authorization": f"Bearer {customer.token}"}
        )
        assert out.status_code == 204
    assert (await inside).status_code == 200, "who was let in is served"
    assert await served(instance)


@pytest.mark.sabotage("app/api/protocol.py", "if self._door is None or not self._refuses(self._door):", "if True:")
async def test_a_refusal_is_made_before_anything_is_begun(
    narrow: tuple[Instance, Callable[[], asyncio.Task[httpx.Response]]], cluster: Cluster
) -> None:
    (instance, hang), number = narrow, 50
    async with hanging(cluster) as waits:
        inside = hang()
        await until(waits)
        before, answered = await refusals(instance), await counted(instance, "http_requests_total", ONES)
        for answer in await asyncio.gather(*(instance.client.get(CHEAP) for _ in range(number))):
            check_problem(answer, 503, "overloaded")

        async def all_are_counted() -> bool:
            return await refusals(instance) == before + number

        assert await until(all_are_counted), "they are counted together, a second after the first of them"
        assert await counted(instance, "http_requests_total", ONES) == answered + number
        assert await counted(instance, "http_request_duration_seconds_count", 'handler="none",method="GET"') == 0
        given = await instance.client.get(CHEAP, headers={"X-Request-ID": "a-request-of-mine"})
        assert check_problem(given, 503, "overloaded")["request_id"] == "a-request-of-mine"
        head = await instance.client.head(CHEAP)
        assert (head.status_code, head.content) == (503, b"")
        assert int(head.headers["content-length"]) > 0
        # Bodies are read to their end, or the next request on the connection would begin in the middle of one.
        body = {"email": "late@example.com", "password": "x" * 50_000}
        for _ in range(3):
            check_problem(await instance.client.post("/api/v1/sessions", json=body), 503, "overloaded")
    assert (await inside).status_code == 200
    assert await until(told_of, instance), "one line tells of all of them"
    lines = instance.log.read_text().splitlines()
    assert not [line for line in lines if '"status":503' in line and "/health/" not in line]


async def test_an_early_refusal_has_the_headers_of_every_other_problem(
    narrow: tuple[Instance, Callable[[], asyncio.Task[httpx.Response]]], cluster: Cluster
) -> None:
    instance, hang = narrow
    other = await instance.client.get(NOWHERE)
    async with hanging(cluster) as waits:
        inside = hang()
        await until(waits)
        answer = await instance.client.get(CHEAP)
    await inside
    limits = {"ratelimit", "ratelimit-policy"}  # it has not been counted
    assert set(answer.headers) == set(other.headers) - limits | {"retry-after"}
    same = set(answer.headers) - {"x-request-id", "content-length", "retry-after", "date", "server-timing"}
    assert {name: answer.headers[name] for name in same} == {name: other.headers[name] for name in same}


async def counted(instance: Instance, name: str, labels: str) -> float:
    """Return the value of a metric, 0 if there is none yet."""
    metrics = (await instance.client.get("/metrics")).text
    found = re.search(rf"^{name}\{{{re.escape(labels)}\}} (\S+)$", metrics, re.MULTILINE)
    return float(found[1]) if found else 0.0


async def refusals(instance: Instance) -> float:
    """Return how many requests were refused before they were begun."""
    return await counted(instance, "requests_shed_total", 'reason="door"')


async def told_of(instance: Instance) -> bool:
    """Say whether the log tells of refusals."""
    return "requests refused" in instance.log.read_text()


@pytest.mark.sabotage("app/api/turnstile.py", "            work.cancel()", "            pass")
async def test_a_caller_who_hangs_up_frees_the_place(
    narrow: tuple[Instance, Callable[[], asyncio.Task[httpx.Response]]], cluster: Cluster
) -> None:
    instance, hang = narrow
    async with hanging(cluster) as waits:
        inside = hang()
        await until(waits)
        assert not await served(instance)
        inside.cancel()
        await asyncio.wait({inside})
        assert await until(served, instance), "the database ends it after a minute only"


@pytest.mark.sabotage("app/api/turnstile.py", "body = await _whole(receive)", 'body = b""')
async def test_a_slow_client_holds_no_place(
    narrow: tuple[Instance, Callable[[], asyncio.Task[httpx.Response]]],
) -> None:
    instance, _ = narrow
    reader, writer = await asyncio.open_connection("127.0.0.1", instance.client.base_url.port)

    async def nobody_else_is_there() -> bool:
        # An answer may be here before its place is free again; the second is the one that asks.
        text = (await instance.client.get("/metrics")).text
        return "\nhttp_requests_in_flight 2.0\n" in text

    try:
        # What is asked for needs a place, and neither a database nor its time.
        writer.write(b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nhalf " % NOWHERE.encode())
        await writer.drain()
        for _ in range(20):
            await until(nobody_else_is_there)
            check_problem(await instance.client.get(NOWHERE), 404, "not_found")
        await until(nobody_else_is_there)
        writer.write(b"whole")
        assert await reader.readline() == b"HTTP/1.1 404 Not Found\r\n"
    finally:
        writer.close()


@pytest.mark.sabotage("deploy/nginx/nginx.conf.template", "worker_connections 4096;", "worker_connections 128;")
@pytest.mark.usefixtures("many_files")
async def test_a_crowd_at_nginx_is_answered_to_the_last(cluster: Cluster) -> None:
    url = httpx.URL(cluster.url)
    request = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with AsyncExitStack() as connections:

        async def come() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            reader, writer = await asyncio.open_connection(url.host, url.port)
            connections.callback(writer.close)
            return reader, writer

        crowd = await asyncio.gather(*(come() for _ in range(CROWD)))
        for _, writer in crowd:
            writer.write(request)
        answers = await asyncio.gather(*(reader.readline() for reader, _ in crowd))
    assert set(answers) == {b"HTTP/1.1 200 OK\r\n"}
