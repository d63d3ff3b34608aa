"""A whole cluster with two shards, as `make run SHARDS=2` starts it: everything works for the profiles of both."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from conftest import ENVIRONMENT, Customer, until

from app.core.ids import LOGICAL_SHARDS, logical_shard
from deploy.local.cluster import Cluster
from deploy.local.programs import Sizes

pytestmark = pytest.mark.postgresql("it runs a cluster of its own, on PostgreSQL")

PASSWORD = "a long enough pass phrase"
PRIMARIES = ("primary", "shard1-primary")


@pytest.fixture(scope="module")
def sharded() -> Iterator[Cluster]:
    """A cluster of its own with two shards; the second has one replica, as the first has here."""
    with tempfile.TemporaryDirectory(prefix="scaleout-shards-") as folder:
        sizes = Sizes(replicas=1, shards=2)
        running = Cluster(Path(folder) / "c", sizes=sizes, environment=ENVIRONMENT)
        running.up()
        yield running
        running.down(wipe=True)


@pytest.fixture
async def people(sharded: Cluster) -> AsyncIterator[list[Customer]]:
    """One signed-in customer of each shard."""
    found: dict[int, Customer] = {}
    while len(found) < len(PRIMARIES):
        client = httpx.AsyncClient(base_url=sharded.url, timeout=15)
        email = f"{uuid4().hex}@example.com"
        body = {"email": email, "password": PASSWORD, "name": "Of a shard"}
        profile = (await client.post("/api/v1/profiles", json=body)).raise_for_status().json()
        half = logical_shard(UUID(profile["id"])) * len(PRIMARIES) // LOGICAL_SHARDS
        if half in found:
            await client.aclose()
            continue
        signed_in = await client.post("/api/v1/sessions", json={"email": email, "password": PASSWORD})
        token = signed_in.raise_for_status().json()["token"]
        client.cookies.clear()
        client.headers["Authorization"] = f"Bearer {token}"
        found[half] = Customer(client, profile, email, token)
    yield [found[half] for half in sorted(found)]
    for customer in found.values():
        await customer.client.aclose()


async def count(sharded: Cluster, node: str, statement: str, *arguments: Any) -> int:
    """Run a counting statement as superuser on a node."""
    connection = await asyncpg.connect(sharded.process(node).address)
    try:
        return int(await connection.fetchval(statement, *arguments))
    finally:
        await connection.close()


@pytest.mark.sabotage(
    path="deploy/local/programs.py",
    take_out='                addresses["SHARDS"] = json.dumps(shards)',
    put="                pass",
)
async def test_the_main_job_works_for_the_profiles_of_every_shard(sharded: Cluster, people: list[Customer]) -> None:
    for shard, customer in enumerate(people):
        products = (await customer.client.get("/api/v1/products", params={"limit": 1})).raise_for_status().json()
        order = (await customer.order(products["items"][0]["id"], 2)).raise_for_status().json()
        assert (await customer.ended(order["id"]))["status"] == "confirmed"
        await customer.invoiced(order["id"])
        invoice = await customer.client.get(f"/api/v1/orders/{order['id']}/invoice", follow_redirects=True)
        assert invoice.raise_for_status().content.startswith(b"%PDF")
        await until(mail_to, sharded, customer.email)
        changed = await customer.client.patch(
            f"/api/v1/profiles/{customer.profile['id']}", json={"bio": "moved in"}, headers={"If-Match": '"v1"'}
        )
        assert changed.raise_for_status().json()["bio"] == "moved in"
        for number, node in enumerate(PRIMARIES):
            for table in ("profiles", "sessions", "orders", "order_items", "payment_attempts", "invoices", "mails"):
                statement = f"SELECT count(*) FROM {table} WHERE profile_id = $1"  # noqa: S608  # our own tables
                rows = await count(sharded, node, statement, UUID(customer.profile["id"]))
                assert bool(rows) is (number == shard), (table, node)


async def mail_to(sharded: Cluster, email: str) -> list[Any]:
    """Return the mails that have arrived for an address."""
    async with httpx.AsyncClient(base_url=sharded.process("smtp").http_address or "") as client:
        found: list[Any] = (await client.get("/messages", params={"to": email})).raise_for_status().json()
        return found


async def test_every_server_of_every_shard_is_shown_and_the_demonstration_data_is_spread_over_both(
    sharded: Cluster,
) -> None:
    servers = {process.name for process in sharded.processes if process.kind in {"primary", "replica"}}
    assert servers == {"primary", "replica-1", "shard1-primary", "shard1-replica-1"}
    assert set(sharded.status().values()) == {"ready"}
    seeded = [
        await count(sharded, node, "SELECT count(*) FROM profiles WHERE email LIKE '%@example.com'")
        for node in PRIMARIES
    ]
    assert min(seeded) > 4_000
    async with httpx.AsyncClient(base_url=sharded.url, timeout=15) as client:
        body = {"email": "admin@example.com", "password": "correct horse battery"}
        token = (await client.post("/api/v1/sessions", json=body)).raise_for_status().json()["token"]
        client.cookies.clear()
        client.headers["Authorization"] = f"Bearer {token}"
        shown = (await client.get("/api/v1/admin/shards")).raise_for_status().json()
        assert [shard["ranges"] for shard in shown["items"]] == [
            [{"first": 0, "last": 511}],
            [{"first": 512, "last": 1023}],
        ]
        page = (await client.get("/api/v1/profiles", params={"limit": 100})).raise_for_status().json()
        ids = [UUID(item["id"]) for item in page["items"]]
        assert ids == sorted(ids, reverse=True)
        assert {logical_shard(identifier) // 512 for identifier in ids} == {0, 1}
