"""Through NGINX, on both instances: I see what I wrote although replicas are paused, and nobody else pays for it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import httpx
import pytest
from conftest import PATIENCE, Customer, replayed, until
from engines import WORDS, ask, is_level
from redis.asyncio import Redis

from deploy.local.cluster import Cluster

REPLICAS = ("replica-1", "replica-2")
# Over two instances and two replicas: that one of the four is never asked happens once in 25,000 runs. Not all at once,
# as the primary takes so many only.
ROUNDS, AT_ONCE = 4, 10
READS = ROUNDS * AT_ONCE


@asynccontextmanager
async def paused(cluster: Cluster, *nodes: str) -> AsyncIterator[None]:
    """Stop the replay of replicas inside the block."""

    async def has_paused(node: str) -> bool:
        (row,) = await ask(cluster.process(node).address, WORDS.is_paused)
        return bool(row["so"])

    primary = cluster.process("primary").address
    for node in nodes:
        await ask(cluster.process(node).address, WORDS.pause)
        await until(has_paused, node)
    try:
        yield
    finally:
        for node in nodes:
            await ask(cluster.process(node).address, WORDS.resume)
            await until(is_level, primary, cluster.process(node).address)


def node_of(answer: httpx.Response) -> str:
    """Return who answered, as `Server-Timing` says."""
    return answer.headers["server-timing"].partition('db;desc="')[2].partition('"')[0]


async def read(client: httpx.AsyncClient, path: str, **headers: str) -> list[httpx.Response]:
    """Read a path many times, each over any instance."""
    answers: list[httpx.Response] = []
    for _ in range(ROUNDS):
        answers += await asyncio.gather(*(client.get(path, headers=headers) for _ in range(AT_ONCE)))
    return [answer.raise_for_status() for answer in answers]


@pytest.mark.sabotage(  # any replica
    path="app/scaling/replicas.py",
    take_out="if replica.healthy and replica.position >= position and replica not in besides",
    put="if replica.healthy and replica not in besides",
)
@pytest.mark.sabotage(
    path="app/scaling/positions.py",
    take_out="                work.reached(int(shard), int(value))",
    put="                pass",
)
@pytest.mark.parametrize("nodes", [("replica-1",), REPLICAS], ids=["one paused", "both paused"])
async def test_a_session_sees_its_own_writes_on_every_instance_in_rows_and_lists(
    cluster: Cluster,
    new_customer: Callable[..., Awaitable[Customer]],
    new_product: Callable[..., Awaitable[dict[str, Any]]],
    nodes: tuple[str, ...],
) -> None:
    customer, other, product = await new_customer(), await new_customer(), await new_product()
    name = f"Ada {uuid4().hex}"

    async def others_nodes() -> set[str]:
        return {node_of(answer) for answer in await read(other.client, "/api/v1/profiles/me")}

    async def other_is_on_the_replicas() -> bool:
        return await others_nodes() <= set(REPLICAS)

    await until(other_is_on_the_replicas)
    async with paused(cluster, *nodes):
        changed = await customer.client.patch(
            f"/api/v1/profiles/{customer.profile['id']}",
            json={"name": name},
            headers={"If-Match": f'"v{customer.profile["version"]}"'},
        )
        assert changed.status_code == 200, changed.text
        order = (await customer.order(product["id"])).raise_for_status().json()

        own = await read(customer.client, "/api/v1/profiles/me")
        assert {answer.json()["name"] for answer in own} == {name}
        assert not {node_of(answer) for answer in own} & set(nodes)
        assert {answer.headers["x-instance"] for answer in own} == {"api-1", "api-2"}
        listed = await read(customer.client, "/api/v1/orders")
        assert {answer.json()["items"][0]["id"] for answer in listed} == {order["id"]}
        found = await read(customer.client, f"/api/v1/profiles?name_prefix={name}")
        assert {answer.json()["items"][0]["id"] for answer in found} == {customer.profile["id"]}

        # Who has written nothing new stays on the replicas, the paused ones too.
        assert await others_nodes() == set(REPLICAS)


@pytest.mark.sabotage(  # any replica
    path="app/scaling/replicas.py",
    take_out="if replica.healthy and replica.position >= position and replica not in besides",
    put="if replica.healthy and replica not in besides",
)
@pytest.mark.sabotage(
    path="app/api/middleware.py",
    take_out="        context.current().reached(shard, position)",
    put="        pass",
)
async def test_a_client_without_a_session_sees_its_writes_by_the_consistency_token(
    cluster: Cluster, client: httpx.AsyncClient
) -> None:
    body = {"email": f"{uuid4().hex}@example.com", "password": "a long enough pass phrase", "name": "Grace"}
    async with paused(cluster, *REPLICAS):
        created = await client.post("/api/v1/profiles", json=body)
        assert created.status_code == 201, created.text
        identifier, token = created.json()["id"], created.headers["consistency-token"]
        # Without the cache, which holds what was written: the database has to answer.
        async with Redis.from_url(cluster.process("redis").address or "") as redis:
            assert await redis.delete(*await redis.keys(f"profile:*{identifier}*"))
        found = await client.get(f"/api/v1/profiles/{identifier}", headers={"Consistency-Token": token})
        assert (found.status_code, node_of(found)) == (200, "primary"), found.text


@pytest.mark.sabotage("app/api/middleware.py", "context.current().bound = True", "pass")
async def test_a_consistency_token_holds_although_the_cache_has_not_heard_of_the_write(
    cluster: Cluster, new_customer: Callable[..., Awaitable[Customer]]
) -> None:
    customer, reader = await new_customer(), await new_customer()
    path, name = f"/api/v1/profiles/{customer.profile['id']}", f"Ada {uuid4().hex}"
    (await reader.client.get(path)).raise_for_status()
    async with Redis.from_url(cluster.process("redis").address or "") as redis:
        (key,) = await redis.keys(f"profile:*{customer.profile['id']}*")
        before = await redis.get(key)
        changed = await customer.client.patch(path, json={"name": name}, headers={"If-Match": '"v1"'})
        # As a network leaves it that loses the write on its way to Redis, and lets all else through.
        await redis.set(key, before, ex=60)
    token = {"Consistency-Token": changed.raise_for_status().headers["consistency-token"]}
    for instance in ("api-1", "api-2"):
        found = await reader.client.get(f"{cluster.process(instance).address}{path}", headers=token)
        assert found.raise_for_status().json()["name"] == name


@pytest.mark.sabotage(  # any replica
    path="app/scaling/replicas.py",
    take_out="if replica.healthy and replica.position >= position and replica not in besides",
    put="if replica.healthy and replica not in besides",
)
@pytest.mark.sabotage(
    path="app/scaling/database/__init__.py",
    take_out="        reading = profile_id or context.current().profile_id",
    put="        reading = context.current().profile_id",
)
async def test_an_order_seen_confirmed_never_goes_back(
    cluster: Cluster,
    new_customer: Callable[..., Awaitable[Customer]],
    new_product: Callable[..., Awaitable[dict[str, Any]]],
) -> None:
    customer, product = await new_customer(), await new_product()
    await asyncio.to_thread(cluster.stop, "worker-1")
    order = (await customer.order(product["id"])).raise_for_status().json()
    # Both replicas have the order; from here on one stands still, and whoever asks it sees every later step undone.
    await replayed(cluster)
    async with paused(cluster, "replica-1"):
        await asyncio.to_thread(cluster.start, "worker-1")
        seen: list[str] = []
        async with asyncio.timeout(2 * PATIENCE):
            while "confirmed" not in seen[:-READS]:
                answer = await customer.client.get(f"/api/v1/orders/{order['id']}")
                seen.append(answer.raise_for_status().json()["status"])
                await asyncio.sleep(0.02)
    assert set(seen[seen.index("confirmed") :]) == {"confirmed"}
