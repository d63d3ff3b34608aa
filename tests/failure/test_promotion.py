"""The primary dies under load and a replica is promoted: no setting changes, no instance restarts, nothing is lost."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from uuid import UUID, uuid4

import httpx
import pytest
from conftest import ENVIRONMENT, PASSWORD, until
from engines import DATABASE
from promoting import Promotion

from deploy.local.cluster import Cluster
from deploy.local.programs import Sizes

INSTANCES = ("api-1", "api-2")
REPLICAS = ("replica-1", "replica-2")
# How long somebody waits for a database that is away is what is tested here.
USUAL = {"DATABASE_POOL_TIMEOUT": "0.8", "DATABASE_CONNECT_TIMEOUT": "0.8", "DATABASE_WATCH_TIMEOUT": "0.6"}
OUTAGE = {503, 504}  # what a write may be told while there is no primary
SECONDS = 5  # after a promotion, until everybody writes again
ROUNDS = 10  # the same on a machine on which it takes half a second that everybody writes once


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two instances on a primary and two replicas of their own; a commit waits until one of the replicas has it."""
    kinds = ("api", "primary", "replica", "redis")
    # Nothing here pays or mails, but no process starts without knowing where to.
    unused = {"PAYMENT_URL": "http://127.0.0.1:1", "SMTP_URL": "smtp://127.0.0.1:1"}
    running = Cluster(
        tmp_path_factory.mktemp("shard"),
        sizes=Sizes(kinds=kinds),
        environment=ENVIRONMENT | USUAL | unused,
        database=DATABASE,
        seed=False,
        durable=False,
    )
    running.up()
    yield running
    running.down(wipe=True)


@dataclass
class Author:
    """Somebody who changes their own profile all the time, each time through another instance.

    Attributes:
        acknowledged: the newest version of which an instance has said that it is written.
        at: moment of that, by instance.
        stale: what was read that is older than what had been acknowledged.
    """

    clients: dict[str, httpx.AsyncClient]
    profile_id: str = ""
    acknowledged: int = 1
    at: dict[str, float] = field(default_factory=dict)
    stale: list[tuple[int, int]] = field(default_factory=list)

    async def sign_up(self) -> None:
        """Become a customer."""
        client = self.clients["api-1"]
        credentials = {"email": f"{uuid4().hex}@example.com", "password": PASSWORD}
        made = await client.post("/api/v1/profiles", json={**credentials, "name": "Ada"})
        self.profile_id = made.raise_for_status().json()["id"]
        token = (await client.post("/api/v1/sessions", json=credentials)).raise_for_status().json()["token"]
        for each in self.clients.values():
            each.cookies.clear()
            each.headers["Authorization"] = f"Bearer {token}"

    async def write_until(self, stop: asyncio.Event) -> None:
        """Change the profile again and again, and read it back from the other instance each time."""
        version = self.acknowledged
        while not stop.is_set():
            for writing, reading in (INSTANCES, INSTANCES[::-1]):
                changed = await self.clients[writing].patch(
                    f"/api/v1/profiles/{self.profile_id}",
                    json={"name": f"Ada {version + 1}"},
                    headers={"If-Match": f'"v{version}"'},
                )
                assert changed.status_code in OUTAGE | {200, 412}, changed.text
                if changed.status_code == 200:
                    self.acknowledged = changed.json()["version"]
                    self.at[writing] = monotonic()
                found = await self.clients[reading].get("/api/v1/profiles/me")
                assert found.status_code in OUTAGE | {200}, found.text
                if found.status_code == 200:
                    # What an unanswered write has done is only seen by looking.
                    version = found.json()["version"]
                    if version < self.acknowledged:
                        self.stale.append((version, self.acknowledged))

    async def write(self) -> int:
        """Change the profile for the first time, and return its version."""
        changed = await self.clients["api-1"].patch(
            f"/api/v1/profiles/{self.profile_id}", json={"name": "Grace"}, headers={"If-Match": '"v1"'}
        )
        return int(changed.raise_for_status().json()["version"])

    async def read_until(self, stop: asyncio.Event, seen: list[int]) -> None:
        """Read without ever writing."""
        while not stop.is_set():
            for client in self.clients.values():
                answer = await client.get("/api/v1/profiles/me")
                seen.append(answer.status_code)


@asynccontextmanager
async def authors(shard: Cluster, count: int) -> AsyncIterator[list[Author]]:
    """Sign people up."""
    async with AsyncExitStack() as opened:
        made = []
        for _ in range(count):
            clients = {
                name: httpx.AsyncClient(base_url=shard.process(name).address or "", timeout=15) for name in INSTANCES
            }
            for client in clients.values():
                opened.push_async_callback(client.aclose)
            made.append(Author(clients))
            await made[-1].sign_up()
        yield made


@pytest.mark.sabotage(
    path="app/scaling/replicas.py",
    take_out="        self.primary = best\n",
    put="        return\n        self.primary = best\n",
)
async def test_a_promoted_replica_takes_the_writes_within_seconds_and_no_acknowledged_one_is_missing(
    shard: Cluster,
) -> None:
    servers = Promotion(shard)
    await servers.wait_for_a_replica("primary", *REPLICAS)
    stop, seen = asyncio.Event(), list[int]()
    async with authors(shard, 6) as (reader, *writers), asyncio.TaskGroup() as load:
        load.create_task(reader.read_until(stop, seen))
        for writer in writers:
            load.create_task(writer.write_until(stop))

        async def everybody_writes_through_every_instance(since: float) -> bool:
            return all(writer.at.get(name, 0) > since for writer in writers for name in INSTANCES)

        began = monotonic()
        await until(everybody_writes_through_every_instance, began)
        calm = monotonic() - began
        shard.kill("primary", signal.SIGKILL)
        await asyncio.to_thread(shard.stop, "primary")
        received = {name: await servers.received(name) for name in REPLICAS}
        # The one that has the most has all that was acknowledged: each commit is on one of them at least.
        promoted, other = sorted(REPLICAS, key=lambda name: received[name], reverse=True)
        await servers.promote(promoted)
        since = monotonic()
        await until(everybody_writes_through_every_instance, since, seconds=max(SECONDS, ROUNDS * calm))

        # The other replica follows the new primary, and takes reads again that must see what was written since.
        await servers.follow(other, promoted, "primary")

        await servers.wait_for_a_replica(promoted, other)
        written = await reader.write()

        async def answered_by_the_other() -> int | None:
            # As somebody who writes no more: the position of one who writes all the time is ahead of every replica.
            found = await reader.clients["api-1"].get("/api/v1/profiles/me")
            return found.json()["version"] if f'db;desc="{other}"' in found.headers["server-timing"] else None

        assert await until(answered_by_the_other) == written

        # The old primary comes back as if nothing had happened. Nobody writes to it.
        await asyncio.to_thread(shard.start, "primary")
        await until(everybody_writes_through_every_instance, monotonic())
        stop.set()
    assert set(seen) == {200}
    assert [writer.stale for writer in writers] == [[]] * len(writers)
    for writer in writers:
        owner = (UUID(writer.profile_id),)
        version = "SELECT version FROM profiles WHERE profile_id = $1"
        assert await servers.value(promoted, version, arguments=owner) >= writer.acknowledged
        assert await servers.value("primary", version, arguments=owner) < writer.acknowledged
