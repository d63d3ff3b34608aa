"""What Prometheus finds at relay and worker, and that every metric which deploy/ asks for is somewhere to be found."""

import asyncio
import re
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import PATIENCE, Customer, until
from prometheus_client.parser import text_string_to_metric_families

from deploy.local.cluster import Cluster

DEPLOY = Path(__file__).parents[2] / "deploy"
ASKS = ("prometheus/rules/*.yml", "k8s/base/autoscaling.yaml", "k8s/components/*/*.yaml", "grafana/*.json")
# What these files name that looks like a metric of ours and is none.
OTHERS = re.compile(r"kube_|pg_|http_requests_per_second$")


async def scraped(cluster: Cluster, name: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return what a process tells, by name and labels."""
    process = cluster.process(name)
    address = f"{process.address}/metrics" if process.kind == "api" else str(process.address)
    async with httpx.AsyncClient() as client:
        text = (await client.get(address)).raise_for_status().text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def done(cluster: Cluster) -> float:
    """Return how many orders the worker has reserved stock for."""
    labels = frozenset({("task", "orders.reserve_stock"), ("outcome", "done")})
    return (await scraped(cluster, "worker-1")).get(("tasks_total", labels), 0.0)


@pytest.mark.sabotage("app/cli.py", "share(load_settings().service.metrics_port)", "share(None)")
async def test_a_worker_tells_what_its_children_did_also_of_those_that_died(
    cluster: Cluster,
    new_customer: Callable[..., Awaitable[Customer]],
    new_product: Callable[..., Awaitable[dict[str, Any]]],
) -> None:
    customer, product = await new_customer(), await new_product()
    await customer.ended((await customer.order(product["id"])).raise_for_status().json()["id"])
    before = await done(cluster)
    assert before >= 1
    parent = psutil.Process(cluster.process("worker-1").pid)
    children = parent.children()
    for child in children:
        child.send_signal(signal.SIGKILL)

    async def replaced() -> bool:
        return len(set(parent.children()) - set(children)) == len(children)

    await until(replaced)
    await customer.ended((await customer.order(product["id"])).raise_for_status().json()["id"])
    assert await done(cluster) >= before + 1


@pytest.mark.sabotage("workers/relay.py", "OUTBOX_OLDEST.labels(label).set(backlog.oldest)", "pass")
async def test_a_relay_tells_what_waits_and_for_how_long(
    cluster: Cluster,
    new_customer: Callable[..., Awaitable[Customer]],
    new_product: Callable[..., Awaitable[dict[str, Any]]],
) -> None:
    customer, product = await new_customer(), await new_product()
    shard = frozenset({("shard", "0")})

    async def waits() -> bool:
        told = await scraped(cluster, "relay-1")
        return told.get(("outbox_messages_waiting", shard), 0) >= 1 and (
            told.get(("outbox_oldest_message_seconds", shard), 0) > 0
        )

    async def is_empty() -> bool:
        told = await scraped(cluster, "relay-1")
        names = ("outbox_messages_waiting", "outbox_oldest_message_seconds", "dead_letters_open")
        return [told.get((name, shard)) for name in names] == [0, 0, 0]

    await asyncio.to_thread(cluster.stop, "worker-1")
    try:
        order = (await customer.order(product["id"])).raise_for_status().json()
        await until(waits)
    finally:
        await asyncio.to_thread(cluster.start, "worker-1")
    await customer.ended(order["id"])
    await until(is_empty, seconds=2 * PATIENCE)


async def test_a_metrics_port_is_free_again_although_children_outlive_a_killed_worker(
    cluster: Cluster,
) -> None:
    before = cluster.process("worker-1")
    cluster.kill("worker-1", signal.SIGKILL)

    async def back() -> bool:
        return cluster.process("worker-1").pid not in {None, before.pid} and bool(await scraped(cluster, "worker-1"))

    async def answers() -> bool:
        try:
            return await back()
        except httpx.TransportError:
            return False

    await until(answers)


@pytest.mark.sabotage("app/core/telemetry.py", '"outbox_oldest_message_seconds"', '"outbox_oldest_seconds"')
async def test_every_metric_that_deploy_asks_for_exists(cluster: Cluster) -> None:
    asked = set()
    for pattern in ASKS:
        for file in DEPLOY.glob(pattern):
            asked |= set(re.findall(r"\b([a-z]+(?:_[a-z]+)+)\b(?=[{\[)]| [<>=])", file.read_text()))
    # An instance imports every metric there is, and tells its name although it may have nothing to tell of it.
    async with httpx.AsyncClient(base_url=str(cluster.process("api-1").address)) as client:
        text = (await client.get("/metrics")).raise_for_status().text
    families = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    found = {family + ending for family in families for ending in ("", "_bucket", "_count", "_sum")}
    assert {name for name in asked if not OTHERS.match(name)} <= found
    assert "outbox_messages_waiting" in asked
