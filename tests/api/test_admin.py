"""Administration through NGINX: for the role at an allowed address, and for nobody else."""

from collections.abc import AsyncIterator, Awaitable, Callable
from uuid import uuid4

import httpx
import pytest
from conftest import Customer, settings_from
from expectations import check_problem

from app.main import create_app
from deploy.local.cluster import Cluster

Make = Callable[..., Awaitable[Customer]]
READS = ("/api/v1/admin/dead-letters", "/api/v1/admin/shards", "/api/v1/admin/breakers")


@pytest.fixture
async def elsewhere(cluster: Cluster, admin: Customer) -> AsyncIterator[httpx.AsyncClient]:
    """The administrator at an instance that allows another network only."""
    app = create_app(settings_from(cluster.environment | {"ADMIN_ALLOW": "198.51.100.0/24"}))
    transport = httpx.ASGITransport(app, client=("192.0.2.1", 4711))
    headers = {"Authorization": f"Bearer {admin.token}"}
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://shop", headers=headers) as client,
    ):
        yield client


async def test_an_administrator_sees_shards_replicas_and_breakers(admin: Customer) -> None:
    shards = (await admin.client.get(READS[1])).raise_for_status().json()
    (shard,) = shards["items"]
    assert (shard["number"], shard["ranges"], shards["move"]) == (0, [{"first": 0, "last": 1023}], None)
    assert [node["name"] for node in shard["replicas"]] == ["replica-1", "replica-2"]
    breakers = (await admin.client.get(READS[2])).raise_for_status().json()
    assert {breaker["dependency"] for breaker in breakers["items"]} == {"redis", "payments", "smtp"}
    assert {breaker["state"] for breaker in breakers["items"]} <= {"closed", "open", "half-open"}
    letters = (await admin.client.get(READS[0], params={"limit": 5})).raise_for_status().json()
    assert set(letters) == {"items", "next_cursor"}
    check_problem(await admin.client.get(READS[0], params={"cursor": "x"}), 400, "invalid_cursor", "query/cursor")
    check_problem(await admin.client.post(f"{READS[0]}/{uuid4()}/replay"), 404, "not_found")


@pytest.mark.sabotage("app/api/dependencies.py", "if session.role != ADMIN:", "if False:")
async def test_nobody_else_sees_anything(new_customer: Make, client: httpx.AsyncClient) -> None:
    customer = await new_customer()
    for path in READS:
        check_problem(await client.get(path), 401, "unauthenticated")
        check_problem(await customer.client.get(path), 403, "forbidden")
    check_problem(await customer.client.post(f"{READS[0]}/{uuid4()}/replay"), 403, "forbidden")


@pytest.mark.sabotage(
    "app/api/dependencies.py",
    "if not within(exchange_of(scope).address, resources_of(scope).settings.service.admin_allow):",
    "if not session:",
)
async def test_an_administrator_elsewhere_may_do_nothing(elsewhere: httpx.AsyncClient) -> None:
    for path in READS:
        check_problem(await elsewhere.get(path), 403, "forbidden")
    check_problem(await elsewhere.post(f"{READS[0]}/{uuid4()}/replay"), 403, "forbidden")
    forged = {"X-Forwarded-For": "198.51.100.7"}
    check_problem(await elsewhere.get(READS[0], headers=forged), 403, "forbidden")
