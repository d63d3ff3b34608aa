"""One local cluster for the whole run: real processes on free ports, in one temporary folder, gone afterwards."""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import containers
import httpx
import pytest
from engines import DATABASE, is_level

from app.core import context
from app.core.settings import Settings, load_settings
from app.wiring import Resources, open_resources
from deploy.local.cluster import Cluster

T = TypeVar("T")

PASSWORD = "a long enough pass phrase"
# Seconds that a test waits for what must come, however slow or busy the machine is; one that passes waits for less.
PATIENCE = float(os.environ.get("TEST_PATIENCE", "60"))
# Limits are tested where they are set low; elsewhere they would only count the tests.
ENVIRONMENT = {
    "RATE_LIMIT_ANONYMOUS": "100000/minute",
    "RATE_LIMIT_FREE": "100000/hour",
    "RATE_LIMIT_ENTERPRISE": "100000/hour",
    "RATE_LIMIT_SIGN_IN": "100000/minute",
    "WORKER_STALE_AFTER": "5",
    # Replicas are paused in tests, for as long as a slow machine takes, and take reads all the same.
    "DATABASE_REPLICA_MAX_LAG": "60",
    # Nor is anybody given up, or a request refused, because a slow or busy machine takes its time.
    "DATABASE_POOL_TIMEOUT": "5",
    "DATABASE_CONNECT_TIMEOUT": "3",
    "DATABASE_WATCH_TIMEOUT": "3",
    "REDIS_TIMEOUT": "1",
    # Each customer of a test costs two hashes, and hashing is not what is tested.
    "SESSION_HASH_MEMORY": "8",
    "SESSION_HASH_PASSES": "1",
}


def pytest_configure() -> None:
    """Try the same examples each time, however slow the machine is: what fails once, fails until it is mended."""
    # Here, because pytest complains of a plugin that was imported before pytest began.
    from hypothesis import settings  # noqa: PLC0415

    settings.register_profile("scaleout", deadline=None, derandomize=True)
    settings.load_profile("scaleout")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what can only be about one engine where the cluster is on the other."""
    for item in items:
        marker = item.get_closest_marker("postgresql")
        if marker is not None and DATABASE != "postgresql":
            item.add_marker(pytest.mark.skip(reason=f"about PostgreSQL: {marker.args[0]}"))
        if item.get_closest_marker("mariadb") and DATABASE != "mariadb":
            item.add_marker(pytest.mark.skip(reason="about MariaDB: make test-mysql"))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running cluster with the demonstration data."""
    folder = tmp_path_factory.mktemp("cluster")
    if containers.wanted():
        with containers.contained_cluster(folder, ENVIRONMENT) as contained:
            yield contained
        return
    if standing := os.environ.get("TEST_CLUSTER"):  # somebody else's, who stops it
        yield Cluster(Path(standing), environment=ENVIRONMENT, database=DATABASE)
        return
    running = Cluster(folder, environment=ENVIRONMENT, database=DATABASE, durable=False)
    running.up()
    yield running
    running.down(wipe=True)


@pytest.fixture(scope="session")
def settings(cluster: Cluster) -> Settings:
    """The settings with which a process finds the cluster's servers."""
    return settings_from(cluster.environment)


@pytest.fixture(scope="session")
async def resources(settings: Settings) -> AsyncIterator[Resources]:
    """The resources of this process, on the cluster's servers."""
    async with open_resources(settings) as opened:
        yield opened


@pytest.fixture(autouse=True)
async def work() -> AsyncIterator[context.Work]:
    """Each test is a piece of work of its own, as a request is: it reads what it has written."""
    with context.working(context.Work(request_id=f"test-{uuid4().hex}")) as current:
        yield current


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    """A stranger's client, through NGINX."""
    async with httpx.AsyncClient(base_url=cluster.url, timeout=15) as opened:
        yield opened


@dataclass(frozen=True)
class Customer:
    """A signed-in customer with a client of their own."""

    client: httpx.AsyncClient
    profile: dict[str, Any]
    email: str
    token: str

    async def order(self, product_id: str, quantity: int = 1, payment_method: str = "tok_ok") -> httpx.Response:
        """Place an order of one line, with a fresh key."""
        return await self.client.post(
            "/api/v1/orders",
            json={"items": [{"product_id": product_id, "quantity": quantity}], "payment_method": payment_method},
            headers={"Idempotency-Key": uuid4().hex},
        )

    async def ended(self, order_id: str) -> dict[str, Any]:
        """Poll the order until it is at an end, and return it."""
        return await until(self._ended, order_id)

    async def invoiced(self, order_id: str) -> dict[str, Any]:
        """Poll the order until its invoice is there, and return it."""
        return await until(self._invoiced, order_id)

    async def _read(self, order_id: str) -> dict[str, Any]:
        return (await self.client.get(f"/api/v1/orders/{order_id}")).raise_for_status().json()

    async def _ended(self, order_id: str) -> dict[str, Any] | None:
        order = await self._read(order_id)
        return order if order["status"] in {"confirmed", "rejected", "cancelled"} else None

    async def _invoiced(self, order_id: str) -> dict[str, Any] | None:
        order = await self._read(order_id)
        return order if order["invoice_url"] else None


async def until(ask: Callable[..., Awaitable[T | None]], *arguments: Any, seconds: float = PATIENCE) -> T:
    """Ask until there is an answer."""
    async with asyncio.timeout(seconds):
        while True:
            answer = await ask(*arguments)
            if answer:
                return answer
            await asyncio.sleep(0.05)


async def replayed(cluster: Cluster) -> None:
    """Wait until every replica shows what the primary has committed before."""
    for name in ("replica-1", "replica-2"):
        await until(is_level, cluster.process("primary").address, cluster.process(name).address)


@pytest.fixture
async def new_customer(cluster: Cluster) -> AsyncIterator[Callable[..., Awaitable[Customer]]]:
    """Sign up and sign in as many customers as a test needs."""
    clients: list[httpx.AsyncClient] = []
    numbers = itertools.count()

    async def make(email: str | None = None, password: str = PASSWORD, **profile: Any) -> Customer:
        client = httpx.AsyncClient(base_url=cluster.url, timeout=15)
        clients.append(client)
        if email is None:
            email = f"c{next(numbers)}-{uuid4().hex}@example.com"
            body = {"email": email, "password": password, "name": "Test Customer", **profile}
            (await client.post("/api/v1/profiles", json=body)).raise_for_status()
        signed_in = await client.post("/api/v1/sessions", json={"email": email, "password": password})
        token = signed_in.raise_for_status().json()["token"]
        client.cookies.clear()
        client.headers["Authorization"] = f"Bearer {token}"
        own = (await client.get("/api/v1/profiles/me")).raise_for_status().json()
        return Customer(client, own, email, token)

    yield make
    for client in clients:
        await client.aclose()


@pytest.fixture
async def admin(new_customer: Callable[..., Awaitable[Customer]]) -> Customer:
    """The seeded administrator."""
    return await new_customer("admin@example.com", "correct horse battery")


@pytest.fixture
def new_product(admin: Customer) -> Callable[..., Awaitable[dict[str, Any]]]:
    """Create products with a stock of their own, so that tests do not share one."""

    async def make(**fields: Any) -> dict[str, Any]:
        body = {
            "sku": f"T-{uuid4().hex[:12]}",
            "name": "Test Thing",
            "description": "Made for a test.",
            "category": "tests",
            "price": {"amount": 1999, "currency": "EUR"},
            "stock": 10,
        } | fields
        return (await admin.client.post("/api/v1/products", json=body)).raise_for_status().json()

    return make


def settings_from(environment: dict[str, str]) -> Settings:
    """Read settings from this process's environment with other variables put over it."""
    return load_settings(os.environ | environment)


def read_lines(path: str | Path) -> list[str]:
    """Return the lines of a log that are whole: the last one may be in the middle of being written."""
    return Path(path).read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
