"""Two shards, each a database of its own on the cluster's primary: no worker reads them, no other test sees them.

A test module takes these fixtures with `pytest_plugins = ("halves",)`. (PYTEST_DONT_REWRITE: nothing is asserted here.)
"""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import pytest
from conftest import settings_from
from engines import ask
from quiet import ENVIRONMENT, database_on, url_of
from sqlalchemy import insert

from app.core.ids import LOGICAL_SHARDS, logical_shard
from app.core.settings import Settings
from app.domain.profiles.rules import NewProfile, Profile
from app.domain.profiles.tables import profiles
from app.wiring import Resources, open_resources
from deploy.local.cluster import Cluster
from migrations import runner

REDIS_NUMBER = 6  # the cluster's own processes use 0
HALF = LOGICAL_SHARDS // 2
PASSWORD = "a long enough pass phrase"


@dataclass(frozen=True)
class Halves:
    """Two instances on two shards: logical shards below 512 begin on shard 0, the others on shard 1."""

    environment: dict[str, str]
    urls: tuple[str, str]
    settings: Settings
    one: Resources
    other: Resources

    async def sql(self, shard: int, statement: str, *arguments: Any) -> list[Any]:
        """Run a statement as superuser on a shard."""
        return await ask(self.urls[shard], statement, arguments=arguments)

    async def sign_up(self, half: int, name: str = "Somebody", instance: Resources | None = None) -> Profile:
        """Sign somebody up whose id falls into the lower or the upper half of the logical shards."""
        while True:
            new = NewProfile(f"{uuid4().hex}@example.com", PASSWORD, name)
            profile = await (instance or self.one).profiles.sign_up(new)
            if logical_shard(profile.id) // HALF == half:
                return profile

    async def put(self, identifier: UUID, name: str, instance: Resources | None = None) -> None:
        """Insert a profile as it is, without the work of a sign-up."""
        now = datetime.now(UTC)
        async with (instance or self.one).database.writer(identifier) as writer:
            await writer.run(
                insert(profiles).values(
                    profile_id=identifier,
                    name=name,
                    tier="free",
                    role="member",
                    attributes={},
                    version=1,
                    created_at=now,
                    updated_at=now,
                )
            )


@pytest.fixture(scope="session")
async def halves(cluster: Cluster) -> AsyncIterator[Halves]:
    """Two instances on two migrated, empty shards."""
    names = [f"half_{number}_{secrets.token_hex(3)}" for number in (0, 1)]
    async with database_on(cluster, names[0]), database_on(cluster, names[1]):
        urls = (url_of(cluster, "primary", names[0]), url_of(cluster, "primary", names[1]))
        shards = [
            {"primary": urls[0], "first": 0, "last": HALF - 1},
            {"primary": urls[1], "first": HALF, "last": LOGICAL_SHARDS - 1},
        ]
        redis = urlsplit(cluster.process("redis").address or "")._replace(path=f"/{REDIS_NUMBER}").geturl()
        environment = cluster.environment | ENVIRONMENT | {"SHARDS": json.dumps(shards), "REDIS_URL": redis}
        settings = settings_from(environment)
        await asyncio.to_thread(runner.upgrade, settings)
        async with open_resources(settings) as one, open_resources(settings) as other:
            await one.redis.client.flushdb()
            yield Halves(environment, urls, settings, one, other)


def on_half(half: int, moment: int) -> UUID:
    """Return a profile id of the lower or upper half, made at `moment` (milliseconds since 1970)."""
    logical = half * HALF + secrets.randbelow(HALF)
    return UUID(int=moment << 80 | 8 << 76 | logical << 66 | 2 << 62 | secrets.randbits(62))
