"""What Prometheus finds at relay and worker, and that every metric which deploy/ asks for is somewhere to be found."""

import asyncio
import json
import re
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest
from conftest import PATIENCE, Customer, until
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from promql import metrics_of

from deploy.k8s import alerts
from deploy.k8s.manifests import named
from deploy.local.cluster import Cluster

DEPLOY = Path(__file__).parents[2] / "deploy"
# What they name that others tell: Kubernetes, the exporter of PostgreSQL, Prometheus itself, its adapter.
OTHERS = re.compile(r"kube_|pg_|up$|http_requests_per_second$")


async def families(cluster: Cluster, name: str) -> list[Metric]:
    """Return what a process tells; counters under the names that they are asked for by."""
    process = cluster.process(name)
    address = f"{process.address}/metrics" if process.kind == "api" else str(process.address)
    async with httpx.AsyncClient() as client:
        text = (await client.get(address)).raise_for_status().text
    found = list(text_string_to_metric_families(text))
    for family in found:
        family.name += "_total" if family.type == "counter" else ""
    return found


async def scraped(cluster: Cluster, name: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return what a process tells, by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in await families(cluster, name)
        for sample in family.samples
    }


async def done(cluster: Cluster) -> float:
    """Return how many orders the worker has reserved stock for."""
    labels = frozenset({("task", "orders.reserve_stock"), ("outcome", "done")})
    return (await scraped(cluster, "worker-1")).get(("tasks_total", labels), 0.0)


@pytest.mark.sabotage("app/cli/service.py", "share(load_settings().service.metrics_port)", "share(None)")
async def test_a_worker_tells_what_its_children_did_also_of_those_that_died(
    cluster: Cluster,
    new_customer: Callable[..., Awaitable[Customer]],
    new_product: Callable[..., Awaitable[dict[str, Any]]],
) -> None:
    customer, product = await new_customer(), await new_product()
    await customer.ended((await customer.order(product["id"])).raise_for_status().json()["id"])
    before = await until(done, cluster)  # right after the commit that the customer sees
    parent = psutil.Process(cluster.process("worker-1").pid)
    children = parent.children()
    for child in children:
        child.send_signal(signal.SIGKILL)

    async def replaced() -> bool:
        return len(set(parent.children()) - set(children)) == len(children)

    await until(replaced)
    await customer.ended((await customer.order(product["id"])).raise_for_status().json()["id"])

    async def one_more() -> bool:
        return await done(cluster) >= before + 1

    await until(one_more)


async def nothing_waits(cluster: Cluster) -> bool:
    """Return whether the relay tells so."""
    told = await scraped(cluster, "relay-1")
    names = ("outbox_messages_waiting", "outbox_oldest_message_seconds", "dead_letters_open")
    return [told.get((name, frozenset({("shard", "0")}))) for name in names] == [0, 0, 0]


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

    await asyncio.to_thread(cluster.stop, "worker-1")
    try:
        order = (await customer.order(product["id"])).raise_for_status().json()
        await until(waits)
    finally:
        await asyncio.to_thread(cluster.start, "worker-1")
    await customer.ended(order["id"])
    await until(nothing_waits, cluster, seconds=2 * PATIENCE)


@pytest.mark.sabotage("workers/relay.py", "outbox.backlog(reader, besides=AWAITED)", "outbox.backlog(reader)")
async def test_an_upload_that_nobody_sends_is_no_backlog(
    cluster: Cluster, new_customer: Callable[..., Awaitable[Customer]]
) -> None:
    customer = await new_customer()

    async def is_told() -> bool:
        return not await nothing_waits(cluster)

    await asyncio.to_thread(cluster.stop, "worker-1")
    try:
        announced = {"content_type": "image/png", "size": 1000}
        path = f"/api/v1/profiles/{customer.profile['id']}"
        (await customer.client.put(f"{path}/avatar", json=announced)).raise_for_status()
        # What is written after it tells when the relay has looked.
        change = {"If-Match": '"v1"'}
        (await customer.client.patch(path, json={"name": "Eve"}, headers=change)).raise_for_status()
        await until(is_told)
    finally:
        await asyncio.to_thread(cluster.start, "worker-1")
    await until(nothing_waits, cluster, seconds=2 * PATIENCE)


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


def asked_for() -> set[str]:
    """Every metric that a dashboard, a rule, an alert or an autoscaler names."""
    dashboards = [json.loads(file.read_text()) for file in DEPLOY.glob("grafana/*.json")]
    expressions = [
        target["expr"]
        for dashboard in dashboards
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    ]
    kubernetes = named("production", "PrometheusRule", "kubernetes")["spec"]["groups"]
    expressions += [str(rule["expr"]) for group in [*alerts.groups(), *kubernetes] for rule in group["rules"]]
    asked = {name for expression in expressions for name in metrics_of(expression) if ":" not in name}
    for pattern in ("k8s/base/autoscaling.yaml", "k8s/components/*/*.yaml"):
        for file in DEPLOY.glob(pattern):
            asked |= set(re.findall(r"\b([a-z]+(?:_[a-z]+)+)\b(?=[{\[)]| [<>=])", file.read_text()))
    return asked


@pytest.mark.sabotage("app/core/telemetry.py", '"outbox_oldest_message_seconds"', '"outbox_oldest_seconds"')
async def test_every_metric_that_deploy_asks_for_exists(cluster: Cluster) -> None:
    # An instance imports every metric there is, and tells its name although it may have nothing to tell of it.
    async with httpx.AsyncClient(base_url=str(cluster.process("api-1").address)) as client:
        text = (await client.get("/metrics")).raise_for_status().text
    there = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    found = {family + ending for family in there for ending in ("", "_bucket", "_count", "_sum")}
    asked = asked_for()
    assert {name for name in asked if not OTHERS.match(name)} <= found
    assert {"outbox_messages_waiting", "http_request_duration_seconds_bucket", "database_pool_in_use"} <= asked


# What each process must tell, by what one wants to know of it.
EVERYWHERE = {
    "scaleout_build_info", "database_statements_total", "database_pool_size", "database_pool_in_use",
    "database_pool_waits_total", "database_pool_timeouts_total", "database_read_retries_total",
    "database_primary_reads_total", "replica_lag_seconds", "replica_healthy", "cache_reads_total", "cache_loads_total",
    "cache_stampedes_avoided_total", "redis_failures_total", "breaker_open", "outbound_calls_total",
    "outbound_retries_total", "business_events_total", "business_revenue_minor_units_total", "trace_spans_total",
}  # fmt: skip
OF_THE_API = {
    "http_requests_total", "http_request_duration_seconds", "http_request_duration_highr_seconds",
    "http_request_size_bytes", "http_response_size_bytes", "http_requests_in_flight", "http_requests_waiting",
    "requests_shed_total", "rate_limited_total", "rate_limit_local_total", "event_streams", "asyncio_tasks",
}  # fmt: skip
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "other"}
OF_A_RELAY = {
    "outbox_messages_waiting", "outbox_oldest_message_seconds", "outbox_published_total", "dead_letters_open",
    "queue_length", "queue_oldest_message_seconds",
}  # fmt: skip
# It tells of what it has done; what never happened, such as a dead letter, it does not name.
OF_A_WORKER = {
    "tasks_total", "task_duration_seconds", "business_events_total", "business_revenue_minor_units_total",
    "database_statements_total", "database_pool_size", "database_pool_in_use", "outbound_calls_total",
    "scaleout_build_info",
}  # fmt: skip


@pytest.mark.sabotage("app/core/telemetry.py", '"business_revenue_minor_units_total"', '"business_revenue_total"')
@pytest.mark.parametrize(
    ("name", "expected"),
    [("api-1", EVERYWHERE | OF_THE_API), ("relay-1", EVERYWHERE | OF_A_RELAY), ("worker-1", OF_A_WORKER)],
)
async def test_each_process_tells_what_there_is_to_know_of_it(
    cluster: Cluster,
    new_customer: Callable[..., Awaitable[Customer]],
    new_product: Callable[..., Awaitable[dict[str, Any]]],
    name: str,
    expected: set[str],
) -> None:
    customer, product = await new_customer(), await new_product()
    await customer.ended((await customer.order(product["id"])).raise_for_status().json()["id"])

    async def told() -> bool:
        return expected <= {family.name for family in await families(cluster, name)}

    await until(told)
    for family in await families(cluster, name):
        # Files of several processes keep no help.
        assert family.documentation, family.name
        assert re.fullmatch(r"[a-z][a-z0-9_]*", family.name)


@pytest.mark.sabotage("app/api/metrics.py", 'return method if method in _METHODS else "other"', "return method")
async def test_what_strangers_invent_makes_no_label(cluster: Cluster) -> None:
    noise = [uuid4().hex for _ in range(50)]
    async with httpx.AsyncClient(base_url=str(cluster.process("api-1").address)) as client:
        for word in noise:
            odd = {"X-Request-ID": f"id-{word}", "Authorization": f"Bearer {word}", "User-Agent": word}
            await client.get(f"/{word}")
            await client.get(f"/api/v1/{word}?{word}={word}", headers=odd)
            await client.get(f"/api/v1/profiles/{word}", headers=odd)
            await client.get(f"/api/v1/products/search?q={word}")
            await client.request(word.upper(), "/api/v1/products")
            await client.post("/api/v1/orders", headers={"Idempotency-Key": word}, json={"payment_method": word})
        for method in ("PROPFIND", "PURGE", "TRACE"):  # which the parser lets pass, unlike those that are not HTTP's
            await client.request(method, "/api/v1/products")
        templates = set((await client.get("/openapi.json")).raise_for_status().json()["paths"])
    told = await families(cluster, "api-1")
    labels = [(name, value) for family in told for each in family.samples for name, value in each.labels.items()]
    assert not {word for word in noise for _, value in labels if word in value.lower()}
    (requests,) = (family for family in told if family.name == "http_requests_total")
    assert {each.labels["method"] for each in requests.samples} <= METHODS
    assert {each.labels["status"] for each in requests.samples} <= {"2xx", "3xx", "4xx", "5xx"}
    served = {each.labels["handler"] for each in requests.samples if each.labels["handler"].startswith("/api/")}
    # A route says of a parameter that it takes slashes, too; OpenAPI has no word for that.
    assert {template.replace(":path}", "}") for template in served} <= templates


@pytest.mark.sabotage("app/api/serving.py", "len(self.server_state.tasks)", "0")
async def test_an_instance_tells_how_many_requests_are_in_flight(cluster: Cluster) -> None:
    told = await scraped(cluster, "api-1")
    assert told["http_requests_in_flight", frozenset()] >= 1  # the one that asks


async def test_confirmed_orders_are_counted_with_what_they_come_to(
    cluster: Cluster,
    new_customer: Callable[..., Awaitable[Customer]],
    new_product: Callable[..., Awaitable[dict[str, Any]]],
) -> None:
    async def revenue() -> float:
        told = await scraped(cluster, "worker-1")
        return told.get(("business_revenue_minor_units_total", frozenset({("currency", "EUR")})), 0.0)

    customer, product = await new_customer(), await new_product()
    before = await revenue()
    order = (await customer.order(product["id"], quantity=3)).raise_for_status().json()
    assert (await customer.ended(order["id"]))["status"] == "confirmed"

    async def counted() -> bool:  # right after the commit that the customer sees
        return await revenue() - before >= 3 * 1999

    await until(counted)


@pytest.mark.sabotage("workers/relay.py", "QUEUE_LENGTH.labels(queue).set(length)", "pass")
async def test_a_relay_tells_what_waits_in_the_queues(
    cluster: Cluster,
    new_customer: Callable[..., Awaitable[Customer]],
    new_product: Callable[..., Awaitable[dict[str, Any]]],
) -> None:
    customer, product = await new_customer(), await new_product()
    queue = frozenset({("queue", "orders")})

    async def waits() -> bool:
        told = await scraped(cluster, "relay-1")
        return told.get(("queue_length", queue), 0) >= 1 and told.get(("queue_oldest_message_seconds", queue), 0) > 0

    await asyncio.to_thread(cluster.stop, "worker-1")
    try:
        order = (await customer.order(product["id"])).raise_for_status().json()
        await until(waits)
    finally:
        await asyncio.to_thread(cluster.start, "worker-1")
    await customer.ended(order["id"])
