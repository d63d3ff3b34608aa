"""Reads on replicas: my own write is never hidden, others stay on the replicas, and a lost node is not noticed."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import pytest
from conftest import until
from engines import WORDS
from quiet import REPLICAS, Servers, started, stranger
from sqlalchemy import insert, select, text

from app.core import context
from app.domain.reports.tables import bought_together as rows
from app.scaling.database import Database
from app.scaling.node import Node
from app.wiring import Resources

pytest_plugins = ("quiet",)


async def add(database: Database) -> UUID:
    identifier = uuid4()
    async with database.writer() as writer:
        await writer.run(insert(rows).values(product_id=identifier, other_id=identifier, orders=1))
    return identifier


async def sees(database: Database, identifier: UUID) -> bool:
    return await database.reader().first(select(rows.c.orders).where(rows.c.product_id == identifier)) is not None


async def answered_by(database: Database) -> str:
    """Return the node that answers the work at hand."""
    await database.reader().first(text("SELECT 1"))
    return context.current().spans["db"].description


async def strangers_are_answered_by(database: Database, reads: int = 40) -> set[str]:
    found = set()
    for _ in range(reads):
        with context.working(stranger()):
            found.add(await answered_by(database))
    return found


async def answer_strangers(database: Database, nodes: set[str]) -> bool:
    """Whether these nodes answer strangers, and no other."""
    return await strangers_are_answered_by(database) == nodes


def replicas_of(database: Database) -> tuple[Node, ...]:
    return database.shards[0].replicas.replicas


@pytest.fixture
async def strict(quiet: Resources) -> AsyncIterator[Database]:
    """An instance that takes little lag: more than a replica has that is only looked at late."""
    async with started(quiet, replica_max_lag=0.5) as database:
        yield database


@pytest.mark.sabotage(
    path="app/scaling/database/reader.py",
    take_out="replica = nodes.choose(position, besides=lost)",
    put="replica = None",
)
async def test_reads_go_to_the_replicas_and_spread_over_them(quiet: Resources) -> None:
    await until(answer_strangers, quiet.database, set(REPLICAS))


@pytest.mark.sabotage(  # any replica
    path="app/scaling/replicas.py",
    take_out="if replica.healthy and replica.position >= position and replica not in besides",
    put="if replica.healthy and replica not in besides",
)
@pytest.mark.sabotage(
    path="app/scaling/database/reader.py",
    take_out="else max(arrived, work.position(shard.number))",
    put="else 0",
)
async def test_a_paused_replica_never_hides_my_own_write(quiet: Resources, servers: Servers) -> None:
    async with servers.paused(*REPLICAS):
        identifier = await add(quiet.database)
        for _ in range(10):
            assert await sees(quiet.database, identifier)
            assert context.current().spans["db"].description == "primary"
        # Nobody else pays for it: they wrote nothing, and an answer from just before is right for them.
        await until(answer_strangers, quiet.database, set(REPLICAS))
        with context.working(stranger()):
            assert not await sees(quiet.database, identifier)
    assert await answered_by(quiet.database) in REPLICAS
    assert await sees(quiet.database, identifier)


async def test_a_replica_that_has_my_write_answers_me_while_another_is_behind(
    quiet: Resources, servers: Servers
) -> None:
    async with servers.paused("replica-1"):
        identifier = await add(quiet.database)

        async def on_the_other() -> bool:
            return await answered_by(quiet.database) == "replica-2"

        await until(on_the_other)
        assert await sees(quiet.database, identifier)


@pytest.mark.sabotage("app/scaling/replicas.py", "elif lag > self._settings.replica_max_lag:", "elif False:")
async def test_a_replica_that_lags_too_much_takes_no_reads_until_it_has_caught_up(
    strict: Database, servers: Servers
) -> None:
    lagging, other = replicas_of(strict)

    async def ejected() -> bool:
        return not lagging.healthy and other.healthy

    async def back() -> bool:
        return lagging.healthy

    async with servers.paused("replica-1"):
        await add(strict)
        await until(ejected)
        await until(answer_strangers, strict, {"replica-2"})
    await until(back)


@pytest.mark.sabotage(
    path="app/scaling/database/reader.py", take_out="or len(lost) == REPLICA_TRIES or node in lost:", put="or node:"
)
async def test_a_read_whose_node_dies_is_answered_by_another_and_the_node_comes_back_by_itself(
    quiet: Resources, servers: Servers
) -> None:
    dying, staying = replicas_of(quiet.database)
    await until(answer_strangers, quiet.database, set(REPLICAS))

    async def back() -> bool:
        return dying.healthy

    async with servers.down("replica-1"):
        # As if it had died just now: nobody knows yet, and this one is the less busy of the two.
        dying.healthy = True
        staying.in_flight += 100
        try:
            assert await answered_by(quiet.database) == "replica-2"
        finally:
            staying.in_flight -= 100
        assert not dying.healthy
        await until(answer_strangers, quiet.database, {"replica-2"})
    await until(back)
    await until(answer_strangers, quiet.database, set(REPLICAS))


@pytest.mark.sabotage(
    path="app/scaling/database/reader.py", take_out="or len(lost) == REPLICA_TRIES or node in lost:", put="or lost:"
)
async def test_a_read_that_loses_both_replicas_at_once_is_answered_by_the_primary(
    quiet: Resources, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await until(answer_strangers, quiet.database, set(REPLICAS))
    async with servers.down(*REPLICAS):
        for replica in replicas_of(quiet.database):
            replica.healthy = True
        with monkeypatch.context() as unseen:
            # As if they had died just now: nobody has seen it yet, and nobody does while the read looks for an answer.
            unseen.setattr(quiet.database.shards[0].replicas, "_mark", lambda *_, **__: None)
            assert await read_apart(quiet.database) == "primary"


async def test_without_any_replica_reads_go_to_the_primary_until_one_is_back(
    quiet: Resources, servers: Servers
) -> None:
    async with servers.down(*REPLICAS):
        reads = await asyncio.gather(*(read_apart(quiet.database) for _ in range(5)))
        assert set(reads) == {"primary"}
    await until(answer_strangers, quiet.database, set(REPLICAS))


async def read_apart(database: Database) -> str:
    with context.working(stranger()):
        return await answered_by(database)


async def test_reads_under_way_on_a_replica_that_is_stopped_all_get_their_answer(
    quiet: Resources, servers: Servers
) -> None:
    done: list[Any] = []
    stop = asyncio.Event()

    async def keep_reading() -> None:
        while not stop.is_set():
            with context.working(stranger()):
                done.append(await quiet.database.reader().first(text("SELECT 1 AS one")))

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(keep_reading())
        async with servers.down("replica-2"):
            before = len(done)

            async def some_more() -> bool:
                return len(done) > before + 100

            await until(some_more)
        stop.set()
    assert all(row.one == 1 for row in done)


@pytest.mark.sabotage(
    path="app/scaling/replicas.py",
    take_out="                self._timeline.note(state.position, now)\n",
    put="                pass\n",
)
async def test_replicas_that_are_cut_off_from_their_primary_are_late_although_they_believe_themselves_up_to_date(
    strict: Database, servers: Servers
) -> None:
    async def ejected() -> bool:
        return not any(replica.healthy for replica in replicas_of(strict))

    async def back() -> bool:
        return all(replica.healthy for replica in replicas_of(strict))

    async with servers.cut_off(*REPLICAS):
        await add(strict)
        for node in REPLICAS:
            assert [row["so"] for row in await servers.sql(node, WORDS.believes)] == [True]
        await until(ejected)
        await until(answer_strangers, strict, {"primary"})
    await until(back)


@pytest.mark.sabotage(
    path="app/scaling/replicas.py", take_out="            dialect.cut(driver_connection)\n", put="            pass\n"
)
async def test_reads_that_hang_with_their_replica_are_answered_by_another_at_once(
    quiet: Resources, servers: Servers
) -> None:
    hanging, staying = replicas_of(quiet.database)
    await until(answer_strangers, quiet.database, set(REPLICAS))
    async with servers.frozen("replica-1"):
        # The watcher has not noticed yet, and all that is read goes to the one that hangs.
        hanging.healthy = True
        staying.in_flight += 100
        try:
            async with asyncio.timeout(quiet.settings.database.command_timeout / 2):
                assert await asyncio.gather(*(read_apart(quiet.database) for _ in range(5))) == ["replica-2"] * 5
        finally:
            staying.in_flight -= 100
        assert not hanging.healthy
    await until(answer_strangers, quiet.database, set(REPLICAS))
