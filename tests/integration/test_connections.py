"""Connections are bounded and so is what holds them: the budget of a fleet, time limits on the server, PgBouncer."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest
from conftest import until
from quiet import stranger, url_of
from sqlalchemy import func, insert, select

from app.core import context
from app.core.settings import Settings
from app.domain.reports.tables import bought_together as rows
from app.scaling.database import Database
from app.scaling.dialect import Rows
from app.scaling.lookup import Lookup
from deploy.local.cluster import Cluster
from deploy.local.ports import free_port

pytest_plugins = ("quiet",)
pytestmark = pytest.mark.postgresql("PgBouncer is about it, and the server's settings are its own")

PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
with_pgbouncer = pytest.mark.skipif(PGBOUNCER is None, reason="PgBouncer is not installed here: apt install pgbouncer")
PID = Lookup(select(func.pg_backend_pid().label("pid")))
SERVER_CONNECTIONS = 3
CLIENTS = 24


async def run_check(cluster: Cluster, *options: str) -> tuple[int, str]:
    """Run `scaleout check` as its user would, and return its exit code and what it said."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "app.cli", "check", *options,
        env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await process.communicate()
    return process.returncode or 0, said.decode()


@pytest.mark.sabotage(path="app/operations.py", take_out="FOUND_SOMETHING if wrong else DONE", put="DONE")
async def test_the_check_asks_every_server_and_refuses_a_fleet_that_does_not_fit(cluster: Cluster) -> None:
    code, said = await run_check(cluster, "--instances", "2", "--workers", "1")
    assert (code, said.count("of 197 connections")) == (0, 3), said
    code, said = await run_check(cluster, "--instances", "40")
    assert code == 1
    assert "shard 0, replica 2: 45 processes" in said
    assert "set DATABASE_POOL_SIZE=1, or raise max_connections by" in said


async def test_the_server_ends_what_takes_too_long_or_does_nothing_in_a_transaction(cluster: Cluster) -> None:
    for url in (cluster.environment["DATABASE_URL"], *cluster.environment["REPLICA_URLS"].split(",")):
        connection = await asyncpg.connect(url)
        found = [await connection.fetchval(f"SHOW {name}") for name in
                 ("statement_timeout", "idle_in_transaction_session_timeout")]  # fmt: skip
        await connection.close()
        assert found == ["10s", "15s"]


@asynccontextmanager
async def pgbouncer(cluster: Cluster, folder: Path) -> AsyncIterator[str]:
    """Run PgBouncer in transaction mode before the primary, and yield the URL of the quiet database through it."""
    assert PGBOUNCER is not None
    server = urlsplit(url_of(cluster, "primary"))
    port = free_port()
    settings = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "auth_type": "any",
        "pool_mode": "transaction",
        "default_pool_size": SERVER_CONNECTIONS,
        "max_client_conn": 10 * CLIENTS,
        "unix_socket_dir": "",
    }
    lines = [
        "[databases]",
        f"* = host=127.0.0.1 port={server.port} user={server.username} password={server.password}",
        "[pgbouncer]",
        *(f"{name} = {value}" for name, value in settings.items()),
    ]
    configuration = folder / "pgbouncer.ini"
    configuration.write_text("\n".join(lines) + "\n", encoding="utf-8")
    # It refuses to run as root.
    other = {"user": "nobody"} if os.geteuid() == 0 else {}
    for path in (configuration, folder, *folder.parents[:2]):
        path.chmod(0o755)
    process = await asyncio.create_subprocess_exec(PGBOUNCER, configuration, stderr=subprocess.DEVNULL, **other)

    async def answers() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    try:
        await until(answers)
        yield server._replace(netloc=f"pooled@127.0.0.1:{port}").geturl()
    finally:
        process.terminate()
        await process.wait()


@asynccontextmanager
async def database_behind(url: str, settings: Settings, clients: int) -> AsyncIterator[Database]:
    """Open a database behind the pooler at `url`, with so many connections to it."""
    address = settings.database.shards[0].model_copy(update={"primary": url, "replicas": ()})
    # A transaction waits for one of few connections to be free, behind the pooler; so does the watcher.
    waits = {"pool_timeout": 10.0, "watch_timeout": 10.0}
    sizes = {"pool_size": clients, "primary_read_cap": clients}
    changed = {"shards": (address,), "pooler": "transaction"} | waits | sizes
    database = Database(settings.database.model_copy(update=changed))
    await database.start()
    try:
        yield database
    finally:
        await database.stop()


@asynccontextmanager
async def held(url: str, pid: int) -> AsyncIterator[None]:
    """Have a transaction of somebody else on one connection of the server, behind the pooler, for the block."""
    async with AsyncExitStack() as ours, AsyncExitStack() as others:
        while True:  # it is given to one of so many, if its watcher does not have it just now
            connection = await asyncpg.connect(url, statement_cache_size=0)
            await connection.execute("BEGIN")
            if await connection.fetchval("SELECT pg_backend_pid()") == pid:
                ours.push_async_callback(connection.close)
                break
            others.push_async_callback(connection.close)
        await others.aclose()
        yield


@with_pgbouncer
@pytest.mark.sabotage(
    path="app/scaling/dialect/postgresql.py",
    take_out='0 if settings.pooler == "transaction" else STATEMENTS_KEPT',
    put="STATEMENTS_KEPT",
)
async def test_no_statement_is_looked_for_where_another_connection_of_the_server_has_it(
    cluster: Cluster, quiet_settings: Settings, tmp_path: Path
) -> None:
    async with pgbouncer(cluster, tmp_path) as url, database_behind(url, quiet_settings, 1) as database:

        async def answered_by() -> int:
            return (await database.reader().find(PID)).pid

        pid = await answered_by()
        async with held(url, pid):
            assert await answered_by() != pid


@with_pgbouncer
async def test_many_clients_share_a_few_connections_through_pgbouncer_in_transaction_mode(
    cluster: Cluster, quiet_settings: Settings, tmp_path: Path
) -> None:
    behind = set[int]()  # processes of the server that have answered
    async with pgbouncer(cluster, tmp_path) as url, database_behind(url, quiet_settings, CLIENTS) as database:

        async def customer() -> bool:
            """Write in both ways and read what was written."""
            with context.working(stranger()):
                first, second = uuid4(), uuid4()
                async with database.writer() as writer:
                    await writer.run(insert(rows).values(product_id=first, other_id=first, orders=1))
                    row = await writer.first(select(rows.c.orders, func.pg_backend_pid().label("pid")))
                    behind.add(row.pid)
                    await writer.run(insert(rows).values(product_id=second, other_id=second, orders=2))
                row = {"product_id": first, "other_id": second, "orders": 3}
                assert await database.insert_once(first, Rows(rows, [row]))
                assert not await database.insert_once(first, Rows(rows, [row]))
                found = await database.reader().all(select(rows.c.orders).where(rows.c.product_id == first))
                return sorted(row.orders for row in found) == [1, 3]

        for _ in range(3):
            assert all(await asyncio.gather(*(customer() for _ in range(CLIENTS))))
    assert 0 < len(behind) <= SERVER_CONNECTIONS
