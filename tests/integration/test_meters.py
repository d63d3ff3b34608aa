"""What is counted when pools are full, loads are shared and calls are repeated: once each, under the right labels."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from uuid import uuid4

import pytest
from conftest import until
from prometheus_client import REGISTRY
from sqlalchemy import text

from app.core.errors import Unavailable
from app.scaling.cache import PROFILE, Entry
from app.scaling.database import Database
from app.scaling.outbound import Outbound
from app.wiring import Resources

pytest_plugins = ("quiet",)


def told(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.fixture
async def narrow(quiet: Resources) -> AsyncIterator[Database]:
    """A database without replicas, with two connections a pool that are waited for as long as one takes to open."""
    address = quiet.settings.database.shards[0].model_copy(update={"replicas": ()})
    settings = quiet.settings.database.model_copy(
        update={"shards": (address,), "pool_size": 2, "pool_timeout": 1.5, "primary_read_cap": 8}
    )
    database = Database(settings)
    await database.start()
    try:
        yield database
    finally:
        await database.stop()


def turned_away(pool: str) -> tuple[float, float]:
    """Return how many have waited for a connection to the primary, and how many of them got none."""
    labels = {"shard": "0", "node": "primary", "pool": pool}
    return told("database_pool_waits_total", **labels), told("database_pool_timeouts_total", **labels)


def used(database: Database) -> float:
    """Return what its watcher tells next; others of this process tell under the same labels, so it is asked here."""
    replicas = database.shards[0].replicas
    replicas._tell_of_pools(replicas.primary)
    return told("database_pool_in_use", shard="0", node="primary", pool="write")


@pytest.mark.sabotage("app/scaling/replicas.py", 'used["write"] = node.writes.in_use', 'used["write"] = 0')
@pytest.mark.sabotage("app/scaling/database/writer.py", 'timeouts_of(shard.number, "primary", "write").inc()', "pass")
async def test_a_full_pool_is_told_with_who_waited_and_who_got_nothing(narrow: Database) -> None:
    waited, refused = turned_away("write")
    assert used(narrow) == 0
    async with AsyncExitStack() as held:
        for _ in range(2):
            await held.enter_async_context(narrow.writer())
        assert used(narrow) == told("database_pool_size", shard="0", node="primary", pool="write") == 2
        assert turned_away("write") == (waited, refused)
        with pytest.raises(Unavailable):
            async with narrow.writer():
                pass
    assert turned_away("write") == (waited + 1, refused + 1)
    assert used(narrow) == 0


@pytest.mark.sabotage("app/scaling/database/reader.py", "if node.reads.full:", "if False:")
async def test_a_read_that_finds_no_connection_is_counted(narrow: Database) -> None:
    waited, refused = turned_away("read")
    reads = narrow.shards[0].replicas.primary.reads
    async with AsyncExitStack() as held:
        for _ in range(2):
            await held.enter_async_context(reads.connect())
        with pytest.raises(Unavailable):
            await narrow.readers()[0].all(text("SELECT 1"))
    assert turned_away("read") == (waited + 1, refused + 1)


@pytest.mark.sabotage("app/scaling/cache.py", 'STAMPEDES_AVOIDED.labels(kind.name, "process").inc()', "pass")
async def test_misses_that_load_nothing_are_counted(quiet: Resources, other: Resources) -> None:
    key, ready, entry = uuid4().hex, asyncio.Event(), Entry(1, b"{}")

    async def load() -> Entry:
        await ready.wait()
        return entry

    def avoided(where: str) -> float:
        return told("cache_stampedes_avoided_total", kind=PROFILE.name, where=where)

    def misses() -> float:
        return told("cache_reads_total", kind=PROFILE.name, result="miss")

    before, missed = (avoided("process"), avoided("instance")), misses()

    async def all_missed() -> bool:
        return misses() - missed == 10

    readers = [asyncio.create_task((quiet, other)[number % 2].cache.read(PROFILE, key, load)) for number in range(10)]
    await until(all_missed)
    ready.set()
    assert await asyncio.gather(*readers) == [entry] * 10
    # On each instance one is at it for the others; on one of the two it takes what the other has loaded.
    assert (avoided("process") - before[0], avoided("instance") - before[1]) == (8, 1)


@pytest.mark.sabotage("app/scaling/outbound.py", "OUTBOUND_RETRIES.labels(self.name).inc()", "pass")
async def test_a_call_that_is_repeated_is_counted_once_for_each_repetition() -> None:
    name = f"meters-{uuid4().hex}"
    outbound = Outbound(name, timeout=1, concurrency=1, waiting=0, failures=(ConnectionError,), tries=3)

    async def fail() -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await outbound.call(fail)
    assert told("outbound_retries_total", dependency=name) == 2
    assert told("outbound_calls_total", dependency=name, outcome="error") == 3
