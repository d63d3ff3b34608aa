"""A database and a Redis number of their own on the cluster's servers: no worker reads them, no other test sees them.

A test module takes these fixtures with `pytest_plugins = ("quiet",)`. Whatever a test does to the servers ends with its
block, and the block ends when the servers are as before. (PYTEST_DONT_REWRITE: nothing is asserted here.)
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psutil
import pytest
from conftest import settings_from, until
from engines import WORDS, ask, database_at, elsewhere

from app.core import context
from app.core.settings import Settings
from app.domain.catalog.tables import warehouses
from app.scaling.database import Database
from app.scaling.dialect import insert_ignore
from app.scaling.redis_link import RedisDown
from app.wiring import Resources, open_resources
from deploy.local.cluster import Cluster
from migrations import runner

DATABASE = "quiet"
REDIS_NUMBER = 5  # the cluster's own processes use 0
REPLICAS = ("replica-1", "replica-2")
# Replicas are asked often, so that conditions come true soon. Whoever waits for a server that hangs gives it up long
# before a statement's own timeout, and nobody one that is only slow.
ENVIRONMENT = {
    "DATABASE_REPLICA_POLL": "0.05",
    "DATABASE_WATCH_TIMEOUT": "2",
    "DATABASE_POOL_TIMEOUT": "3",
    "DATABASE_CONNECT_TIMEOUT": "2",
    "DATABASE_COMMAND_TIMEOUT": "30",
}
WAREHOUSES = (("Hamburg", 53.55, 9.99), ("Lyon", 45.76, 4.84))


def url_of(cluster: Cluster, node: str, database: str = DATABASE) -> str:
    """Return the superuser's URL of a database on a node."""
    return elsewhere(cluster.process(node).address, database)


def environment_of(cluster: Cluster, database: str = DATABASE) -> dict[str, str]:
    """Return the environment of an instance that works with `database` and the Redis number of these tests."""
    redis = elsewhere(cluster.process("redis").address, str(REDIS_NUMBER))
    addresses = {
        "DATABASE_URL": url_of(cluster, "primary", database),
        "REPLICA_URLS": ",".join(url_of(cluster, node, database) for node in REPLICAS),
        "REDIS_URL": redis,
    }
    return cluster.environment | ENVIRONMENT | addresses


def database_on(cluster: Cluster, name: str) -> AbstractAsyncContextManager[str]:
    """Make an empty database, yield its URL on the primary, and drop it."""
    return database_at(cluster.process("primary").address, name)


@pytest.fixture(scope="session")
async def quiet_settings(cluster: Cluster) -> AsyncIterator[Settings]:
    """Settings of an instance whose database is migrated and holds two warehouses and nothing else."""
    async with database_on(cluster, DATABASE):
        settings = settings_from(environment_of(cluster))
        await asyncio.to_thread(runner.upgrade, settings)
        yield settings


@pytest.fixture(scope="session")
async def quiet(quiet_settings: Settings) -> AsyncIterator[Resources]:
    """One instance on the quiet database."""
    async with open_resources(quiet_settings) as opened:
        await opened.redis.client.flushdb()
        async with opened.database.writer() as writer:
            for number, (name, lat, lon) in enumerate(WAREHOUSES, start=1):
                identifier = UUID(f"00000000-0000-8000-8000-00000000000{number}")
                await writer.run(insert_ignore(warehouses).values(id=identifier, name=name, lat=lat, lon=lon))
        await _settled(opened)
        yield opened


@pytest.fixture(scope="session")
async def other(quiet: Resources) -> AsyncIterator[Resources]:
    """Another instance on the same servers."""
    async with open_resources(quiet.settings) as opened:
        await _settled(opened)
        yield opened


@asynccontextmanager
async def started(resources: Resources, **changed: Any) -> AsyncIterator[Database]:
    """Open the database of `resources` once more, with some settings changed."""
    database = Database(resources.settings.database.model_copy(update=changed))
    await database.start()
    try:
        yield database
    finally:
        await database.stop()


@dataclass(frozen=True)
class Servers:
    """What tests do to the servers; `instances` have noticed by the end of each block that all is as before."""

    cluster: Cluster
    instances: tuple[Resources, ...]

    async def sql(self, node: str, statement: str, *arguments: Any) -> list[Any]:
        """Run a statement as superuser on a node's quiet database."""
        return await ask(url_of(self.cluster, node), statement, arguments=arguments)

    @asynccontextmanager
    async def paused(self, *nodes: str) -> AsyncIterator[None]:
        """Stop the replay of replicas inside the block: they receive and do not show it."""
        for node in nodes:
            await self.sql(node, WORDS.pause)
        for node in nodes:
            await until(self._says, node, WORDS.is_paused)
        try:
            yield
        finally:
            for node in nodes:
                await self.sql(node, WORDS.resume)
            await self._settle()

    @asynccontextmanager
    async def cut_off(self, *nodes: str) -> AsyncIterator[None]:
        """Let replicas live without their primary inside the block: they answer and receive nothing."""
        for node in nodes:
            await ask(url_of(self.cluster, node), *WORDS.cut_off)
        for node in nodes:
            await until(self._says, node, WORDS.receives_nothing)
        try:
            yield
        finally:
            for node in nodes:
                await ask(url_of(self.cluster, node), *WORDS.reconnect)
            await self._settle()

    @asynccontextmanager
    async def frozen(self, node: str) -> AsyncIterator[None]:
        """Let a server hang inside the block: its connections stay open and nothing answers on them."""
        process = psutil.Process(self.cluster.process(node).pid)
        family = [process]
        try:
            process.suspend()
            await until(_is_suspended, process)
            # From now on none is added, and none that ends is taken away.
            for member in process.children(recursive=True):
                family.append(member)
                member.suspend()
                await until(_is_suspended, member)
            yield
        finally:
            # The parent last: once it goes on it takes away those that have ended meanwhile.
            for member in reversed(family):
                member.resume()
            await self._settle()

    @asynccontextmanager
    async def down(self, *nodes: str) -> AsyncIterator[None]:
        """Keep processes down inside the block."""
        for node in nodes:
            await asyncio.to_thread(self.cluster.stop, node)
        try:
            yield
        finally:
            for node in nodes:
                await asyncio.to_thread(self.cluster.start, node)
            await self._settle()

    async def _settle(self) -> None:
        await asyncio.gather(*(_settled(instance) for instance in self.instances))

    async def _says(self, node: str, question: str) -> bool:
        (row,) = await self.sql(node, question)
        return bool(row["so"])


@pytest.fixture
def servers(cluster: Cluster, quiet: Resources, other: Resources) -> Servers:
    """The servers behind `quiet` and `other`."""
    return Servers(cluster, (quiet, other))


def stranger() -> context.Work:
    """Return the work of a caller who has written nothing."""
    return context.Work(request_id=context.new_request_id())


async def _is_suspended(process: psutil.Process) -> bool:
    """Whether it stands still, or has ended: until then a server of many threads may answer once more."""
    return process.status() in {psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE}


async def _settled(resources: Resources) -> None:
    """Wait until the primary takes writes, every replica has replayed them, and Redis answers."""

    async def written() -> int | None:
        try:
            with context.working(stranger()) as work:
                async with resources.database.writer():
                    pass
                return work.positions[0]
        except Exception:  # noqa: BLE001  # whatever it is while the server starts, it is asked again
            return None

    position = await until(written)

    async def replayed() -> bool:
        replicas = resources.database.shards[0].replicas.replicas
        return all(replica.healthy and replica.position >= position for replica in replicas)

    async def answers() -> bool:
        try:
            async with resources.redis.calling("test") as client:
                return bool(await client.ping() and await resources.pipe.ask("test", "PING"))
        except RedisDown:
            return False

    await until(replayed)
    await until(answers)
