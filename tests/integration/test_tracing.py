"""One order, one trace: from the client's own span through NGINX, API, outbox, relay and tasks to the provider's call.

A cluster of its own exports to a collector of the tests, which decodes what the protocol says.
"""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from collector import CLIENT, CONSUMER, PRODUCER, SERVER, Collector, Seen, collecting
from conftest import ENVIRONMENT, read_lines, until
from engines import DATABASE

from deploy.local.cluster import Cluster

ADA = {"email": "ada@example.com", "password": "correct horse battery"}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as running:
        yield running


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Cluster]:
    """A cluster whose processes export every trace."""
    # What is slow on a busy machine is not taken for lost, and handed over again: each step is one span.
    patient = {"WORKER_STALE_AFTER": "600"}
    told = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_EXPORTER_OTLP_HEADERS": "x-key=s%3Decret"}
    running = Cluster(
        tmp_path_factory.mktemp("traced"),
        environment=ENVIRONMENT | patient | told | {"TRACE_SAMPLE": "1"},
        database=DATABASE,
        durable=False,
    )
    running.up()
    try:
        yield running
    finally:
        running.down(wipe=True)


@pytest.fixture
async def ada(traced: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    """A customer, signed in through NGINX."""
    async with httpx.AsyncClient(base_url=traced.url, timeout=30) as client:
        token = (await client.post("/api/v1/sessions", json=ADA)).raise_for_status().json()["token"]
        client.cookies.clear()
        client.headers["Authorization"] = f"Bearer {token}"
        yield client


async def place(client: httpx.AsyncClient, **headers: str) -> dict[str, Any]:
    """Place an order and return it once it has its invoice, which is nearly its last step."""
    product = (await client.get("/api/v1/products?limit=1")).raise_for_status().json()["items"][0]
    order = {"items": [{"product_id": product["id"], "quantity": 1}], "payment_method": "tok_ok"}
    placed = await client.post("/api/v1/orders", json=order, headers={"Idempotency-Key": uuid4().hex} | headers)
    location = placed.raise_for_status().headers["location"]

    async def invoiced() -> dict[str, Any] | None:
        found: dict[str, Any] = (await client.get(location)).raise_for_status().json()
        return found if found["invoice_url"] else None

    return await until(invoiced, seconds=60)


@pytest.mark.sabotage("app/scaling/outbox.py", 'values["traceparent"] = span.traceparent', "pass")
async def test_an_order_is_one_trace_from_the_client_to_the_payment_provider(
    collector: Collector, ada: httpx.AsyncClient
) -> None:
    trace, client_span, request_id = secrets.token_hex(16), secrets.token_hex(8), f"traced-{uuid4().hex}"
    await place(ada, traceparent=f"00-{trace}-{client_span}-00", **{"X-Request-ID": request_id})

    async def complete() -> dict[str, Seen] | None:
        spans = {span.id: span for span in collector.of(trace)}
        names = {span.name for span in spans.values() if span.service == "scaleout-worker"}
        last = {"emails.confirm_order", "orders.capture_payment", "reports.record_sale"}
        # Nothing hangs in the air: every span's parent is in the trace, but for the client's own.
        whole = {span.parent for span in spans.values()} - set(spans) == {client_span}
        return spans if whole and last <= names else None

    spans = await until(complete, seconds=60)

    def only(name: str, service: str, kind: int) -> Seen:
        (found,) = (span for span in spans.values() if (span.name, span.service, span.kind) == (name, service, kind))
        return found

    def below(span: Seen) -> list[Seen]:
        return [each for each in spans.values() if each.parent == span.id]

    edge = only("POST /api/v1/orders", "scaleout-api", SERVER)
    assert edge.parent == client_span
    assert edge.told["http.response.status_code"] == 202
    assert edge.told["scaleout.request_id"] == request_id
    assert {"db", "redis", "relay order.placed"} <= {span.name for span in below(edge)}
    assert "primary" in {span.told["scaleout.answered_by"] for span in below(edge) if span.name == "db"}

    placed = only("relay order.placed", "scaleout-relay", PRODUCER)
    reserve = only("orders.reserve_stock", "scaleout-worker", CONSUMER)
    reserved = only("relay order.reserved", "scaleout-relay", PRODUCER)
    authorise = only("orders.authorise_payment", "scaleout-worker", CONSUMER)
    confirmed = only("relay order.confirmed", "scaleout-relay", PRODUCER)
    assert [placed.parent, reserve.parent, reserved.parent] == [edge.id, placed.id, reserve.id]
    assert [authorise.parent, confirmed.parent] == [reserved.id, authorise.id]
    assert {span.name for span in below(confirmed)} >= {"orders.capture_payment", "invoices.issue"}
    provider = [span for span in below(authorise) if span.name == "payments"]
    assert [(span.kind, span.failed) for span in provider] == [(CLIENT, False)]
    assert authorise.told["scaleout.outcome"] == "done"

    # What a person may be known by stays out of traces.
    said = json.dumps([[span.name, span.told] for span in spans.values()])
    assert not any(secret in said for secret in ("example.com", "tok_ok", "SELECT", "INSERT"))
    assert {headers["x-key"] for headers in collector.headers} == {"s=ecret"}


@pytest.mark.sabotage("app/core/telemetry.py", 'fields["trace_id"] = span.trace_id', "pass")
async def test_lines_of_api_and_worker_carry_the_trace_and_the_request(traced: Cluster, ada: httpx.AsyncClient) -> None:
    trace, request_id = secrets.token_hex(16), f"logged-{uuid4().hex}"
    await place(ada, traceparent=f"00-{trace}-{secrets.token_hex(8)}-01", **{"X-Request-ID": request_id})

    def lines(kind: str) -> list[dict[str, Any]]:
        logs = [Path(process.log) for process in traced.processes if process.kind == kind]
        return [json.loads(line) for log in logs for line in read_lines(log) if trace in line and line.startswith("{")]

    async def written() -> bool:
        return bool(lines("api") and lines("worker") and lines("nginx"))

    await until(written)
    assert {line["request_id"] for kind in ("api", "worker", "nginx") for line in lines(kind)} == {request_id}
    assert {line["event"] for line in lines("api")} == {"request"}
    assert {line["trace_id"] for kind in ("api", "worker") for line in lines(kind)} == {trace}


@pytest.mark.parametrize(
    "traceparent",
    ["", "garbage", "00-" + "0" * 32 + "-" + "1" * 16 + "-01", "ff-" + "a" * 32 + "-" + "1" * 16 + "-01", "00-" * 2000],
)
async def test_a_traceparent_that_is_none_begins_a_trace_of_its_own(
    collector: Collector, ada: httpx.AsyncClient, traceparent: str
) -> None:
    request_id = f"odd-{uuid4().hex}"
    answer = await ada.get("/api/v1/profiles/me", headers={"traceparent": traceparent, "X-Request-ID": request_id})
    assert answer.status_code == 200

    async def received() -> Seen | None:
        return next((span for span in collector.spans if span.told.get("scaleout.request_id") == request_id), None)

    span = await until(received)
    assert (span.name, span.parent) == ("GET /api/v1/profiles/me", "")
    assert span.trace not in {"0" * 32, "a" * 32}


async def test_a_cached_read_is_traced_on_the_hot_path(collector: Collector, ada: httpx.AsyncClient) -> None:
    profile = (await ada.get("/api/v1/profiles/me")).json()["id"]
    await ada.get(f"/api/v1/profiles/{profile}")
    trace = secrets.token_hex(16)
    answer = await ada.get(f"/api/v1/profiles/{profile}", headers={"traceparent": f"00-{trace}-{'b' * 16}-01"})
    assert answer.headers["server-timing"].startswith('cache;desc="l')

    async def received() -> Seen | None:
        return next((span for span in collector.of(trace) if span.kind == SERVER), None)

    span = await until(received)
    assert (span.name, span.told["http.response.status_code"]) == ("GET /api/v1/profiles/{profile_id}", 200)


async def test_probes_and_metrics_are_not_traced(collector: Collector, traced: Cluster) -> None:
    async with httpx.AsyncClient(base_url=str(traced.process("api-1").address)) as client:
        for path in ("/health/live", "/health/ready", "/metrics"):
            (await client.get(path)).raise_for_status()
        trace = secrets.token_hex(16)
        await client.get("/api/v1/products?limit=1", headers={"traceparent": f"00-{trace}-{'b' * 16}-01"})

    async def received() -> bool:
        return bool(collector.of(trace))

    await until(received)
    assert not {span.name for span in collector.spans if "health" in span.name or "metrics" in span.name}


@pytest.mark.sabotage(
    "app/core/otlp.py", 'TRACE_SPANS.labels("exported" if taken else "failed").inc(len(spans))', "pass"
)
async def test_a_collector_that_is_down_is_counted_and_no_client_notices(
    collector: Collector, traced: Cluster, ada: httpx.AsyncClient
) -> None:
    collector.refuse = True
    try:
        for _ in range(20):
            assert (await ada.get("/api/v1/profiles/me")).status_code == 200

        async def counted() -> bool:
            texts = []
            for name in ("api-1", "api-2"):
                async with httpx.AsyncClient(base_url=str(traced.process(name).address)) as client:
                    texts.append((await client.get("/metrics")).text)
            return any('trace_spans_total{outcome="failed"}' in text for text in texts)

        await until(counted, seconds=40)
    finally:
        collector.refuse = False
    assert (await asyncio.wait_for(place(ada), 60))["status"] == "confirmed"
