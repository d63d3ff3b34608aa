"""The cache while everybody asks: one load for a crowd; Redis dies: no error, nothing stale, nobody signed out."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import monotonic
from uuid import UUID

import httpx
import pytest
from conftest import PATIENCE, Customer, replayed, until
from redis.asyncio import Redis

from app.scaling.cache import Entry, Kind
from app.scaling.values import LEASE_MILLISECONDS
from app.wiring import Resources
from deploy.local.cluster import Cluster

Make = Callable[..., Awaitable[Customer]]
READERS = 8


@asynccontextmanager
async def redis_of(cluster: Cluster) -> AsyncIterator[Redis]:
    """Open a client to the cluster's Redis."""
    client = Redis.from_url(cluster.process("redis").address or "")
    try:
        yield client
    finally:
        await client.aclose()


def instances_of(cluster: Cluster) -> list[str]:
    """Return the addresses of the instances, around NGINX."""
    return [process.address or "" for process in cluster.processes if process.kind == "api"]


async def loads(client: httpx.AsyncClient, urls: list[str]) -> float:
    """Return how often the instances have loaded a profile behind the cache."""
    total = 0.0
    for url in urls:
        lines = (await client.get(f"{url}/metrics")).text.splitlines()
        total += sum(float(line.split()[-1]) for line in lines if line.startswith('cache_loads_total{kind="profile"}'))
    return total


@asynccontextmanager
async def readers(customer: Customer, path: str) -> AsyncIterator[list[tuple[float, httpx.Response]]]:
    """Let readers ask for `path` again and again inside the block; yield the list of their answers with its growth."""
    answers: list[tuple[float, httpx.Response]] = []

    async def read() -> None:
        while True:
            asked = monotonic()
            answers.append((asked, await customer.client.get(path)))

    async def enough(number: int) -> bool:
        for task in tasks:
            if task.done():
                task.result()
        return len(answers) >= number

    tasks = [asyncio.create_task(read()) for _ in range(READERS)]
    try:
        await until(enough, 5 * READERS)
        yield answers
        await until(enough, len(answers) + 5 * READERS)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_500_requests_for_one_cold_profile_on_two_instances_cost_one_read(
    cluster: Cluster, new_customer: Make
) -> None:
    customer, urls = await new_customer(), instances_of(cluster)
    path = f"/api/v1/profiles/{customer.profile['id']}"
    headers = {"Authorization": f"Bearer {customer.token}"}
    # At most 40 at an instance at once, as each has its connection: more than its places (48) would be refused.
    limits = httpx.Limits(max_connections=80)
    async with redis_of(cluster) as redis, httpx.AsyncClient(timeout=PATIENCE, limits=limits) as client:
        for url in urls:  # each knows the session and has its connections open
            (await client.get(f"{url}/api/v1/profiles/me", headers=headers)).raise_for_status()
        await redis.delete(*await redis.keys(f"profile:*{customer.profile['id']}*"))
        before, began = await loads(client, urls), monotonic()
        answers = await asyncio.gather(
            *(client.get(f"{urls[number % 2]}{path}", headers=headers) for number in range(500))
        )
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.content for answer in answers}) == 1
        # Who loads has a lease of it; only a load that takes longer is not waited for any more.
        longer = int((monotonic() - began) * 1000 / LEASE_MILLISECONDS)
        assert 1 <= await loads(client, urls) - before <= 1 + longer


@pytest.mark.sabotage(
    path="app/domain/profiles/service.py",
    take_out="            await self._cache.deliver(PROFILE, str(profile_id), entry)\n",
    put="            pass\n",
)
async def test_a_change_reaches_the_cache_although_its_writer_died_after_the_commit(
    resources: Resources, new_customer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    customer = await new_customer()
    path = f"/api/v1/profiles/{customer.profile['id']}"
    assert (await customer.client.get(path)).json()["bio"] is None

    async def die(_kind: Kind, _key: str, entry: Entry) -> Entry:
        return entry

    monkeypatch.setattr(resources.cache, "put", die)
    await resources.profiles.change(UUID(customer.profile["id"]), 1, {"bio": "after"})

    async def shown() -> bool:
        return (await customer.client.get(path)).json()["bio"] == "after"

    await until(shown)


@pytest.mark.sabotage(
    path="app/scaling/cache.py",
    take_out='        except RedisDown:\n            span.description = "bypass"\n',
    put="        except ZeroDivisionError:\n",
)
async def test_redis_killed_and_back_under_load_is_no_error_and_nothing_stale(
    cluster: Cluster, new_customer: Make
) -> None:
    customer = await new_customer()
    await replayed(cluster)  # without Redis any replica may answer
    path = f"/api/v1/profiles/{customer.profile['id']}"
    async with readers(customer, path) as answers:
        await asyncio.to_thread(cluster.stop, "redis")
        changed = await customer.client.patch(path, json={"bio": "meanwhile"}, headers={"If-Match": '"v1"'})
        assert changed.status_code == 200, changed.text
        # Without Redis nobody knows what this session has written: a replica that is late might show what was before.
        await replayed(cluster)
        told = monotonic()
        await asyncio.to_thread(cluster.start, "redis")
    assert {answer.status_code for _, answer in answers} == {200}
    # With the instance that wrote out of reach of Redis like all others, nobody's memory lasts longer than its lease.
    assert {answer.json()["bio"] for asked, answer in answers if asked > told + 2} <= {"meanwhile"}
    assert (await customer.client.get(path)).json()["bio"] == "meanwhile"


@pytest.mark.sabotage(
    path="app/domain/sessions/service.py",
    take_out="                looking = asyncio.create_task(self._recover(profile_id, key))",
    put="                return None",
)
async def test_flushing_redis_under_load_signs_nobody_out(cluster: Cluster, new_customer: Make) -> None:
    customer = await new_customer()
    await replayed(cluster)  # who has no position any more may be answered by any replica
    async with readers(customer, f"/api/v1/profiles/{customer.profile['id']}") as answers, redis_of(cluster) as redis:
        for _ in range(3):
            already = len(answers)
            await redis.flushall()

            async def more(number: int) -> bool:
                return len(answers) >= number

            await until(more, already + 5 * READERS)
    assert {answer.status_code for _, answer in answers} == {200}
