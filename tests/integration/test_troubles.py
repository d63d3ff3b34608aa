"""What befalls a statement is told apart: a lost node, a slow query, a lock, a primary that is none any more."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from time import monotonic
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from conftest import until
from engines import WORDS
from quiet import REPLICAS, Servers, started, stranger
from sqlalchemy import bindparam, insert, select, text, update
from sqlalchemy.exc import DBAPIError

from app.core import context
from app.core.errors import TimedOut, Unavailable
from app.core.ids import new_id
from app.domain.profiles.rules import NewProfile
from app.domain.reports.tables import bought_together as rows
from app.domain.sessions import service as sessions
from app.scaling import dialect
from app.scaling.database import Database
from app.scaling.dialect import Rows, cut
from app.scaling.lookup import Lookup
from app.wiring import Resources

pytest_plugins = ("quiet",)

PASSWORD = "a long enough pass phrase"


@pytest.fixture
async def hasty(quiet: Resources) -> AsyncIterator[Database]:
    """An instance whose statements have little time, yet enough for a quick one on a busy machine."""
    async with started(quiet, command_timeout=1.5) as database:
        yield database


def healthy(database: Database) -> list[bool]:
    return [replica.healthy for replica in database.shards[0].replicas.replicas]


@pytest.mark.sabotage(
    path="app/scaling/database/reader.py",
    take_out="if trouble is Trouble.SLOW and node.answered_at > since:",
    put="if False:",
)
async def test_a_slow_query_times_out_and_costs_no_replica_its_reads(hasty: Database) -> None:
    with pytest.raises(TimedOut) as refusal:
        await hasty.reader().first(text(WORDS.sleep))
    assert refusal.value.code == "database_timeout"
    assert healthy(hasty) == [True, True]


@pytest.mark.sabotage(
    path="app/scaling/dialect/__init__.py",
    take_out='raise ConnectionError("the server has hung up") if new else DisconnectionError("the server has hung up")',
    put='raise DisconnectionError("the server has hung up")',
)
async def test_a_primary_that_hangs_up_on_new_connections_too_is_an_outage(
    hasty: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def write() -> None:
        async with hasty.writer() as writer:
            await writer.first(text("SELECT 1"))

    await write()  # one connection is in the pool
    # As a primary that is killed again and again: each connection is cut before anything is asked over it.
    monkeypatch.setattr(dialect, "is_cut", lambda _connection: True)
    for _ in range(2):  # with the one of before, and with none
        with pytest.raises(Unavailable) as refusal:
            await write()
        assert refusal.value.code == "database_down"
    monkeypatch.undo()
    await write()


async def test_a_slow_statement_of_a_write_times_out(hasty: Database) -> None:
    with pytest.raises(TimedOut):
        async with hasty.writer() as writer:
            await writer.first(text(WORDS.sleep))


@pytest.mark.postgresql("only asyncpg refuses values itself")
@pytest.mark.sabotage(
    path="app/scaling/dialect/postgresql.py",
    take_out='return Trouble.LOST if "closed" in str(error) else None',
    put="return Trouble.LOST",
)
async def test_a_statement_that_the_driver_refuses_is_our_mistake_and_costs_no_replica_its_reads(
    quiet: Resources,
) -> None:
    too_many = select(rows.c.orders).where(rows.c.product_id.in_([uuid4()] * 40_000))
    with pytest.raises(DBAPIError, match="cannot exceed"):
        await quiet.database.reader().first(too_many)
    assert healthy(quiet.database) == [True, True]


@pytest.mark.postgresql("only asyncpg prepares a statement before it executes it")
@pytest.mark.sabotage(
    path="app/scaling/dialect/postgresql.py", take_out="        connection_class=_Connection,\n", put=""
)
@pytest.mark.parametrize("way", ["lookup", "read", "insert", "transaction"])
async def test_a_connection_that_is_cut_between_preparing_and_executing_is_an_outage_and_no_mistake_of_ours(
    quiet: Resources, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    identifier, cuts = uuid4(), list[str]()
    row = {"product_id": identifier, "other_id": identifier, "orders": 1}
    prepare = asyncpg.Connection._get_statement

    async def cut_once(connection: asyncpg.Connection, query: str, *arguments: Any, **options: Any) -> Any:
        statement = await prepare(connection, query, *arguments, **options)
        if rows.name in query and not cuts:
            cuts.append(query)
            cut(connection)
        return statement

    monkeypatch.setattr(asyncpg.Connection, "_get_statement", cut_once)
    if way == "lookup":  # a read is asked again, of another node
        by_id = Lookup(select(rows.c.orders).where(rows.c.product_id == bindparam("product_id")))
        assert await quiet.database.reader().find(by_id, product_id=identifier) is None
    elif way == "read":
        assert await quiet.database.reader().first(select(rows).where(rows.c.product_id == identifier)) is None
    else:
        with pytest.raises(Unavailable) as refusal:  # noqa: PT012  # wherever it fails
            if way == "insert":
                await quiet.database.insert_once(new_id(), Rows(rows, [row]))
            else:
                async with quiet.database.writer() as writer:
                    await writer.run(insert(rows).values(row))
        assert refusal.value.code == "database_down"
    assert len(cuts) == 1


@pytest.mark.postgresql("its way of making one connection read-only")
@pytest.mark.sabotage(
    path="app/scaling/database/writer.py",
    take_out="            await node.writes.replace()  # they all lead to the same server",
    put="            pass",
)
async def test_a_primary_that_is_none_any_more_is_an_outage_and_its_connections_are_replaced(quiet: Resources) -> None:
    # What a pooled connection to a demoted primary does, while the name behind it leads to another one already.
    async with quiet.database.writer() as writer:
        await writer.run(text("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"))
    identifier = uuid4()

    async def write() -> None:
        async with quiet.database.writer() as writer:
            await writer.run(insert(rows).values(product_id=identifier, other_id=identifier, orders=1))

    with pytest.raises(Unavailable) as refusal:
        await write()
    assert (refusal.value.code, refusal.value.retry_after) == ("database_down", 1)
    await write()


@pytest.mark.postgresql("the time of one statement's lock is set in its words")
@pytest.mark.sabotage(
    path="app/scaling/dialect/postgresql.py", take_out="(asyncpg.LockNotAvailableError, asyncpg", put="(asyncpg"
)
async def test_who_waits_too_long_for_somebody_elses_change_is_told_to_come_again(quiet: Resources) -> None:
    identifier = uuid4()
    async with quiet.database.writer() as writer:
        await writer.run(insert(rows).values(product_id=identifier, other_id=identifier, orders=1))
    change = update(rows).where(rows.c.product_id == identifier).values(orders=2)
    async with quiet.database.writer() as holder:
        await holder.run(change)
        with pytest.raises(Unavailable) as refusal:  # noqa: PT012  # which of the two is refused is not the point
            async with quiet.database.writer() as waiting:
                await waiting.run(text("SET LOCAL lock_timeout = '20ms'"))
                await waiting.run(change)
    assert (refusal.value.code, refusal.value.retry_after) == ("database_busy", 1)


@pytest.mark.postgresql("its patience with deadlocks is set in its words")
async def test_a_deadlock_costs_one_of_the_two_a_try(quiet: Resources) -> None:
    first, second = uuid4(), uuid4()
    async with quiet.database.writer() as writer:
        for identifier in (first, second):
            await writer.run(insert(rows).values(product_id=identifier, other_id=identifier, orders=1))
    both_hold = asyncio.Barrier(2)

    async def change(*identifiers: object) -> None:
        async with quiet.database.writer() as writer:
            await writer.run(text("SET LOCAL deadlock_timeout = '10ms'"))
            for number, identifier in enumerate(identifiers):
                if number:
                    await both_hold.wait()
                await writer.run(update(rows).where(rows.c.product_id == identifier).values(orders=rows.c.orders + 1))

    outcomes = await asyncio.gather(change(first, second), change(second, first), return_exceptions=True)
    (refusal,) = [outcome for outcome in outcomes if outcome is not None]
    assert isinstance(refusal, Unavailable)
    assert refusal.code == "database_busy"


@pytest.mark.sabotage(
    path="app/scaling/replicas.py",
    take_out="        if isinstance(error, TimeoutError):\n",
    put="        if node is not self.primary:\n",
)
async def test_while_the_primary_hangs_writes_are_refused_within_a_second_and_reads_go_on(
    quiet: Resources, servers: Servers
) -> None:
    read = select(rows.c.orders).limit(1)
    began, frozen = asyncio.Event(), asyncio.Event()

    async def write(*, under_way: bool) -> float:
        """Try to write, and return for how many seconds that took."""
        since = monotonic()
        with context.working(stranger()), pytest.raises(Unavailable) as refusal:  # noqa: PT012  # wherever it fails
            async with quiet.database.writer() as writer:
                if under_way:
                    await writer.first(read)
                    began.set()
                    await frozen.wait()
                    since = monotonic()
                await writer.first(read)
        assert refusal.value.code in {"database_down", "database_busy"}
        return monotonic() - since

    before = asyncio.create_task(write(under_way=True))
    await began.wait()
    async with servers.frozen("primary"):
        frozen.set()
        # More at once than the pool has connections: whoever waits for one is refused in time, too.
        taken = await asyncio.gather(before, *(write(under_way=False) for _ in range(10)))
        # The time of the pool or of the watcher on a machine that does nothing else; a statement's own is ten times it.
        assert max(taken) < quiet.settings.database.command_timeout / 2
        assert max([await write(under_way=False) for _ in range(3)]) < quiet.settings.database.command_timeout / 2
        for _ in range(20):
            with context.working(stranger()) as work:
                await quiet.database.reader().first(read)
                assert work.spans["db"].description in REPLICAS


@pytest.mark.sabotage(
    path="app/domain/sessions/service.py",
    take_out="now - session.seen_at < SEEN_EVERY or not self._database.takes_writes(session.profile_id)",
    put="now - session.seen_at < SEEN_EVERY",
)
async def test_while_the_primary_hangs_a_request_does_not_wait_to_note_that_its_session_is_in_use(
    quiet: Resources, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    email = f"{uuid4().hex}@example.com"
    await quiet.profiles.sign_up(NewProfile(email=email, password=PASSWORD, name="Ada"))
    signed_in = await quiet.sessions.sign_in(email, PASSWORD, "")
    monkeypatch.setattr(sessions, "SEEN_EVERY", timedelta(0))

    async def noticed() -> bool:
        return not quiet.database.takes_writes()

    async with servers.frozen("primary"):
        await until(noticed)
        monkeypatch.setattr(quiet.database, "writer", None)
        assert await quiet.sessions.find(signed_in.token)
        monkeypatch.undo()
