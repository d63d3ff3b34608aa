"""Readers and writers on real servers: one commit owner, positions, bounded waiting, and coming back by itself."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from typing import Any
from uuid import UUID, uuid4

import pytest
from conftest import until
from engines import WORDS
from quiet import Servers, started, stranger, url_of
from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError
from wiretap import Wire

from app.core import context
from app.core.errors import Unavailable
from app.domain.reports.tables import bought_together as rows
from app.scaling import dialect
from app.scaling.database import Database, Reader, Writer
from app.scaling.node import Node
from app.wiring import Resources
from deploy.local.cluster import Cluster

pytest_plugins = ("quiet",)


def adding(identifier: UUID) -> Any:
    return insert(rows).values(product_id=identifier, other_id=identifier, orders=1)


def looking_for(identifier: UUID) -> Any:
    return select(rows.c.orders).where(rows.c.product_id == identifier)


async def exists(servers: Servers, identifier: UUID) -> bool:
    return bool(await servers.sql("primary", "SELECT 1 FROM bought_together WHERE product_id = $1", identifier))


async def add(database: Database) -> UUID:
    identifier = uuid4()
    async with database.writer() as writer:
        await writer.run(adding(identifier))
    return identifier


@pytest.fixture
async def narrow(quiet: Resources) -> AsyncIterator[Database]:
    """A database without replicas, with two connections a pool that are waited for as long as one takes to open."""
    address = quiet.settings.database.shards[0].model_copy(update={"replicas": ()})
    async with started(quiet, shards=(address,), pool_size=2, pool_timeout=1.5, primary_read_cap=2) as database:
        yield database


async def test_leaving_the_block_commits_and_nothing_else_does(quiet: Resources, servers: Servers) -> None:
    identifier = uuid4()
    async with quiet.database.writer() as writer:
        await writer.run(adding(identifier))
        assert await writer.first(looking_for(identifier))
        assert not await exists(servers, identifier)
    assert await exists(servers, identifier)


async def test_an_exception_inside_the_block_rolls_everything_back(
    quiet: Resources, servers: Servers, work: context.Work
) -> None:
    identifier = uuid4()
    with pytest.raises(RuntimeError, match="halfway"):  # noqa: PT012  # where in the block it is raised is the point
        async with quiet.database.writer() as writer:
            await writer.run(adding(identifier))
            raise RuntimeError("halfway")
    assert not await exists(servers, identifier)
    assert (work.positions, work.wrote) == ({}, set())


async def test_a_caller_that_goes_away_inside_the_block_leaves_nothing(quiet: Resources, servers: Servers) -> None:
    identifier, inside = uuid4(), asyncio.Event()

    async def write() -> None:
        async with quiet.database.writer() as writer:
            await writer.run(adding(identifier))
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(write())
    await inside.wait()
    task.cancel()
    await asyncio.wait({task})
    assert not await exists(servers, identifier)
    assert await add(quiet.database)


async def test_a_wrong_statement_is_no_outage_and_shows_no_values(quiet: Resources) -> None:
    identifier = await add(quiet.database)
    with pytest.raises(IntegrityError) as refusal:
        async with quiet.database.writer() as writer:
            await writer.run(insert(rows).values(product_id=identifier, other_id=identifier, orders=424242))
    assert "424242" not in str(refusal.value)


@pytest.mark.sabotage(
    path="app/scaling/database/writer.py", take_out="    work.reached(shard.number, position)\n", put=""
)
async def test_a_commit_tells_the_work_the_position_that_its_reads_must_reach(
    quiet: Resources, servers: Servers, work: context.Work
) -> None:
    await add(quiet.database)
    first = work.positions[0]
    await add(quiet.database)
    (row,) = await servers.sql("primary", WORDS.newest)
    assert first < work.positions[0] <= row["position"]
    assert work.wrote == {0}


@pytest.mark.postgresql("MariaDB tells the position in the commit's own answer")
@pytest.mark.sabotage(
    path="app/scaling/database/writer.py", take_out="return unknown_position(", put="raise SystemError("
)
async def test_a_primary_lost_right_after_the_commit_has_committed(
    quiet: Resources, servers: Servers, work: context.Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = dialect.commit_position

    async def cut(connection: Any) -> int:
        await servers.sql("primary", "SELECT pg_terminate_backend($1, 5000)", connection.get_server_pid())
        return await real(connection)

    monkeypatch.setattr(dialect, "commit_position", cut)
    identifier = await add(quiet.database)
    assert await exists(servers, identifier)
    assert work.position(0) > context.NEWEST
    assert await quiet.database.reader().first(looking_for(identifier))
    assert work.spans["db"].description == "primary"


async def test_a_connection_lost_before_the_commit_is_unavailable_and_leaves_nothing(
    quiet: Resources, servers: Servers
) -> None:
    identifier = uuid4()
    with pytest.raises(Unavailable) as refusal:  # noqa: PT012  # where in the block it is raised is the point
        async with quiet.database.writer() as writer:
            row = await writer.first(text(WORDS.own_id))
            await writer.run(adding(identifier))
            await servers.sql("primary", WORDS.end, row and row.id)
    assert refusal.value.code == "database_down"
    assert not await exists(servers, identifier)


@pytest.mark.sabotage(path="app/scaling/database/writer.py", take_out="    if node.answers:", put="    if False:")
async def test_when_all_connections_are_in_use_a_write_says_so_instead_of_waiting_for_ever(narrow: Database) -> None:
    async with AsyncExitStack() as held:
        for _ in range(2):
            await held.enter_async_context(narrow.writer())
        with pytest.raises(Unavailable) as refusal:
            async with asyncio.timeout(10), narrow.writer():
                pass
    assert (refusal.value.code, refusal.value.retry_after) == ("database_busy", 1)
    assert await add(narrow)


@pytest.mark.sabotage(
    path="app/scaling/connections.py", take_out="Turns(places, patience)", put="Turns(1000, patience)"
)
async def test_a_read_that_waits_for_a_connection_is_not_passed_by_for_ever(narrow: Database) -> None:
    """Who gives one back and at once asks for one would take it before the one that waits has woken up."""
    primary = narrow.shards[0].replicas.primary
    size, done = len(await _fill(primary)), asyncio.Event()

    async def greedy() -> None:
        while not done.is_set():
            await primary.all(text("SELECT 1"))

    async def all_in_use() -> bool:
        return len(primary.in_use) == size

    others = [asyncio.create_task(greedy()) for _ in range(size)]
    await until(all_in_use)
    try:
        assert await primary.all(text("SELECT 2"))
    finally:
        done.set()
        await asyncio.gather(*others)


async def _fill(node: Node) -> list[Any]:
    """Open every connection of a node's pool for reads."""
    engine = node.reads.engine
    opened = [await engine.connect() for _ in range(engine.pool.size())]  # type: ignore[attr-defined]
    for connection in opened:
        await connection.close()
    return opened


@pytest.mark.sabotage(
    path="app/scaling/database/__init__.py",
    take_out="Turns(settings.primary_read_cap, PRIMARY_WAIT)",
    put="Turns(settings.primary_read_cap, 3600)",
)
@pytest.mark.postgresql("its advisory locks hold the reads up")
async def test_reads_of_the_primary_are_capped_and_refused_past_the_cap(narrow: Database, servers: Servers) -> None:
    waiting = "SELECT count(*) AS n FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711 AND NOT granted"

    async def both_wait() -> bool:
        (row,) = await servers.sql("primary", waiting)
        return bool(row["n"] == 2)

    async with narrow.writer() as holder:
        await holder.all(text("SELECT pg_advisory_xact_lock(4711)"))
        slow = [
            asyncio.create_task(narrow.reader().all(text("SELECT pg_advisory_xact_lock_shared(4711)")))
            for _ in range(2)
        ]
        await until(both_wait)
        with pytest.raises(Unavailable) as refusal:
            await narrow.reader().first(text("SELECT 1"))
        assert refusal.value.code == "read_capacity"
    await asyncio.gather(*slow)
    assert await narrow.reader().first(text("SELECT 1"))


@pytest.mark.sabotage(
    path="app/scaling/dialect/postgresql.py",
    take_out='isolation_level="AUTOCOMMIT" if autocommit else "READ COMMITTED"',
    put='isolation_level="READ COMMITTED"',
)
@pytest.mark.postgresql("the messages of its protocol are counted")
async def test_a_read_is_one_round_trip_without_a_transaction_around_it(quiet: Resources, cluster: Cluster) -> None:
    (only,) = quiet.settings.database.shards
    async with Wire.to(url_of(cluster, "replica-1")) as wire:
        through = wire.instead_of(only.replicas[0])
        shards = (only.model_copy(update={"replicas": (through,)}),)
        # The watcher asks only at the start, so that what passes is what the reads send.
        async with started(quiet, shards=shards, replica_poll=3600) as database:
            read = database.reader().first
            await read(text("SELECT 4711"))
            wire.sent.clear()
            for _ in range(20):
                await read(text("SELECT 4711"))
    # Each read: bind, execute, sync. One sync is one round trip; a BEGIN would be a query of its own.
    wire.sent.pop("X", None)
    assert wire.sent == {"B": 20, "E": 20, "S": 20}


def test_a_reader_cannot_write_and_is_no_writer() -> None:
    assert not issubclass(Reader, Writer)
    assert not issubclass(Writer, Reader)
    assert not hasattr(Reader, "run")


@pytest.mark.sabotage(
    path="app/scaling/dialect/__init__.py",
    take_out="    if isinstance(told, OSError):",
    put="    if isinstance(told, ZeroDivisionError):",
)
async def test_without_its_primary_the_service_reads_refuses_writes_and_comes_back_by_itself(
    quiet: Resources, servers: Servers
) -> None:
    identifier = await add(quiet.database)
    async with servers.down("primary"):
        with context.working(stranger()) as work:
            assert (await quiet.database.reader().first(text("SELECT 1"))) is not None
            assert work.spans["db"].description.startswith("replica")
        with pytest.raises(Unavailable) as refusal:
            await add(quiet.database)
        assert refusal.value.code == "database_down"
        # What only the primary can know is not answered from an older state.
        context.current().reached(0, context.unknown_position(60))
        with pytest.raises(Unavailable) as refusal:
            await quiet.database.reader().first(looking_for(identifier))
        assert refusal.value.code == "database_down"

    assert await add(quiet.database)
    assert await quiet.database.reader().first(looking_for(identifier))


@pytest.mark.sabotage("app/scaling/database/writer.py", "        self._then.append(act)", "        act()")
async def test_what_waits_for_the_commit_does_not_happen_without_it(quiet: Resources) -> None:
    counted: list[str] = []
    with suppress(ZeroDivisionError):
        async with quiet.database.writer() as writer:
            writer.then(lambda: counted.append("rolled back"))
            raise ZeroDivisionError
    async with quiet.database.writer() as writer:
        writer.then(lambda: counted.append("committed"))
        assert counted == []
    assert counted == ["committed"]
