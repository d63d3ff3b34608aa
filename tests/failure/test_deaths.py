"""kill -9 of each process while an order is on its way: it is confirmed, charged once, invoiced once, mailed once."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from conftest import PASSWORD, PATIENCE, Customer, until

from deploy.local.cluster import Cluster, Process

LONG = 3 * PATIENCE  # seconds; the slowest way back is a broker that its worker asks for every 2, 4, 6 … s
LOST = {502, 503, 504}  # what a client may see while a process is down


async def poll(customer: Customer, order_id: str, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Ask until the order is as far as wanted; while something is down the answer may be that it is."""

    async def ask() -> dict[str, Any] | None:
        answer = await customer.client.get(f"/api/v1/orders/{order_id}")
        if answer.status_code in LOST:
            return None
        order: dict[str, Any] = answer.raise_for_status().json()
        return order if reached(order) else None

    return await until(ask, seconds=LONG)


async def back(cluster: Cluster, before: Process) -> bool:
    """Say whether the process that was killed has a successor that is ready."""
    if cluster.process(before.name).pid in {None, before.pid}:
        return False
    return (await asyncio.to_thread(cluster.status))[before.name] == "ready"


async def charges(cluster: Cluster, order_id: str) -> list[dict[str, Any]]:
    """Return what the provider's ledger says of the order."""
    async with httpx.AsyncClient(base_url=cluster.process("payments").address or "") as provider:
        ledger = (await provider.get("/ledger")).json()
    return [entry for entry in ledger.values() if entry["reference"] == order_id]


async def mails(cluster: Cluster, email: str) -> list[dict[str, Any]]:
    """Return the mails that the customer got."""
    async with httpx.AsyncClient(base_url=cluster.process("smtp").http_address or "") as sink:
        found: list[dict[str, Any]] = (await sink.get("/messages", params={"to": email})).json()["items"]
    return found


@pytest.mark.parametrize(
    "name", ["api-1", "relay-1", "worker-1", "replica-1", "redis", "primary", "payments", "smtp", "nginx"]
)
async def test_an_order_on_its_way_survives_the_death_of(
    name: str,
    cluster: Cluster,
    new_customer: Callable[..., Awaitable[Customer]],
    new_product: Callable[..., Awaitable[dict[str, Any]]],
) -> None:
    customer, product = await new_customer(), await new_product()
    placed = (await customer.order(product["id"])).raise_for_status().json()
    before = cluster.process(name)
    cluster.kill(name, signal.SIGKILL)
    await until(back, cluster, before, seconds=LONG)
    order = await poll(customer, placed["id"], lambda order: order["status"] in {"confirmed", "rejected"})
    assert order["status"] == "confirmed"
    await poll(customer, placed["id"], lambda order: order["invoice_url"] is not None)
    assert len(await until(mails, cluster, customer.email, seconds=LONG)) == 1

    async def captured() -> list[dict[str, Any]] | None:
        found = await charges(cluster, placed["id"])
        return found if all(entry["status"] == "captured" for entry in found) else None

    (charge,) = await until(captured, seconds=LONG)
    assert (charge["captured"], charge["refunded"]) == (1999, 0)

    async def one_is_gone() -> bool:
        # Who heard of it while Redis was down has heard nothing, and what it remembers lasts for two seconds.
        found = await customer.client.get(f"/api/v1/products/{product['id']}")
        return bool(found.raise_for_status().json()["available"] == product["available"] - 1)

    await until(one_is_gone)


@pytest.mark.sabotage("app/scaling/dialect/__init__.py", "if is_cut(connection.driver_connection):", "if False:")
async def test_once_the_primary_is_back_no_write_meets_a_connection_from_before(
    cluster: Cluster, new_customer: Callable[..., Awaitable[Customer]]
) -> None:
    customer = await new_customer()

    async def sign_in() -> int:
        answer = await customer.client.post(
            "/api/v1/sessions",
            json={"email": customer.email, "password": PASSWORD},
            headers={"Authorization": f"Bearer {customer.token}"},
        )
        return answer.status_code

    await asyncio.gather(*(sign_in() for _ in range(10)))
    before = cluster.process("primary")
    cluster.kill("primary", signal.SIGKILL)
    await until(back, cluster, before, seconds=LONG)
    assert [await sign_in() for _ in range(10)] == [201] * 10
