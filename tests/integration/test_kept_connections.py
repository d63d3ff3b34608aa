"""Connections that are kept for the driver itself: never more than the pool has, and none that leads nowhere."""

import pytest
from conftest import PATIENCE, until
from engines import WORDS
from quiet import Servers, started
from sqlalchemy import select

from app.core.errors import Unavailable
from app.core.ids import new_id
from app.scaling import dialect
from app.scaling.database import Database
from app.scaling.idempotency import Claim, idempotency_keys
from app.scaling.positions import name_of
from app.wiring import Resources

pytest_plugins = ("quiet",)


async def claim(database: Database) -> bool:
    profile_id = new_id()
    return await database.insert_once(profile_id, Claim.of(profile_id, "test", "key", {}).row({}))


@pytest.mark.sabotage(
    path="app/scaling/connections.py",
    take_out="if not dialect.is_cut(connection.driver_connection):",
    put="if connection:",
)
@pytest.mark.postgresql("elsewhere an order is a transaction of SQLAlchemy's")
async def test_an_order_meets_no_connection_that_its_server_has_closed(quiet: Resources, servers: Servers) -> None:
    async with started(quiet, pool_size=1) as database:
        assert await claim(database)
        (kept,) = database.shards[0].replicas.primary.writes._kept

        async def is_cut() -> bool:
            return dialect.is_cut(kept.driver_connection)

        await servers.sql("primary", WORDS.end, kept.driver_connection.get_server_pid())
        await until(is_cut)
        assert await claim(database)


@pytest.mark.sabotage(
    path="app/scaling/connections.py",
    take_out="        if self._kept:\n            self._kept",
    put="        if False:\n            self._kept",
)
async def test_orders_and_transactions_share_the_connections_of_one_pool(quiet: Resources) -> None:
    async with started(quiet, pool_size=1) as database:
        for _ in range(3):
            assert await claim(database)
            async with database.writer() as writer:
                assert await writer.all(select(idempotency_keys).limit(1))


@pytest.mark.sabotage(
    path="app/scaling/database/writer.py",
    take_out="the commit begins with the statement.\n        self.position = 0",
    put="the commit begins with the statement.\n        self.position = NEWEST",
)
@pytest.mark.postgresql("elsewhere an order is a transaction of SQLAlchemy's")
async def test_an_order_that_found_no_connection_binds_nobody_to_the_primary(
    quiet: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile_id = new_id()
    async with started(quiet, pool_size=1, pool_timeout=PATIENCE) as database:
        database._positions = quiet.positions
        async with database.writer():
            # Only from here on: a busy machine takes its time to open the first one.
            monkeypatch.setattr(database.shards[0].replicas.primary.writes._turns, "_patience", 0.1)
            with pytest.raises(Unavailable):
                await database.insert_once(profile_id, Claim.of(profile_id, "test", "key", {}).row({}))
    assert await quiet.redis.client.hgetall(name_of(profile_id)) == {}
