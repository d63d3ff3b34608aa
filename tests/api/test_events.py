"""Following an order: every status once and in order, on whichever instance, bounded, and gone with either side."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import httpx
import pytest
from conftest import PATIENCE, Customer, until
from expectations import check_problem

from deploy.local.cluster import Cluster

Make = Callable[..., Awaitable[Customer]]
NewProduct = Callable[..., Awaitable[dict[str, Any]]]


@dataclass(frozen=True)
class Event:
    """One event as a client reads it."""

    id: str
    data: dict[str, Any]


async def read(lines: AsyncIterator[str]) -> AsyncIterator[Event]:
    """Read events as the HTML standard says: fields until an empty line, comments dropped."""
    fields: dict[str, str] = {}
    async for line in lines:
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        elif "data" in fields:
            assert fields["event"] == "status"
            yield Event(fields["id"], json.loads(fields["data"]))
            fields = {}


@asynccontextmanager
async def following(
    customer: Customer, order_id: str, last: str | None = None, at: str = ""
) -> AsyncIterator[AsyncIterator[Event]]:
    """Open the stream, on the instance `at` if given, and yield its events."""
    headers = {} if last is None else {"Last-Event-ID": last}
    async with customer.client.stream("GET", f"{at}/api/v1/orders/{order_id}/events", headers=headers) as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        yield read(answer.aiter_lines())


async def first(events: AsyncIterator[Event], count: int) -> list[Event]:
    async with asyncio.timeout(PATIENCE):
        return [event async for event in aislice(events, count)]


async def aislice(events: AsyncIterator[Event], count: int) -> AsyncIterator[Event]:
    for _ in range(count):
        yield await anext(events)


def instances(cluster: Cluster) -> list[str]:
    return [str(process.address) for process in cluster.processes if process.kind == "api"]


async def open_streams(address: str) -> float:
    async with httpx.AsyncClient() as client:
        text = (await client.get(f"{address}/metrics")).text
    return float(next(line for line in text.splitlines() if line.startswith("event_streams ")).split()[1])


async def has_been_cancelled(customer: Customer, order_id: str) -> bool:
    order = (await customer.client.get(f"/api/v1/orders/{order_id}")).raise_for_status().json()
    return bool(order["status"] == "cancelled")


@pytest.fixture
async def order(new_customer: Make, new_product: NewProduct) -> tuple[Customer, str]:
    """A customer with a confirmed order."""
    customer = await new_customer()
    placed = (await customer.order((await new_product())["id"])).json()
    await customer.ended(placed["id"])
    return customer, placed["id"]


@pytest.mark.sabotage("app/scaling/events.py", 'watch.tell(wire.decode(fields[b"payload"]).get("version", 0))', "pass")
async def test_each_status_comes_as_it_happens_through_nginx(new_customer: Make, new_product: NewProduct) -> None:
    customer, product = await new_customer(), await new_product()
    placed = (await customer.order(product["id"])).json()
    async with following(customer, placed["id"]) as events:
        confirmed = await first(events, 2)
        telling = asyncio.create_task(anext(events))
        await customer.client.post(f"/api/v1/orders/{placed['id']}/cancel")
        # Far below the 15 s after which the stream would look by itself.
        async with asyncio.timeout(10):
            rest = [await telling]
        # The saga takes as long as it takes; who is told of its end is told at once.
        await until(has_been_cancelled, customer, placed["id"])
        async with asyncio.timeout(10):
            rest += [event async for event in events]
    history = (await customer.ended(placed["id"]))["history"]
    assert [event.id for event in confirmed + rest] == ["1", "2", "3", "4"]
    assert [{key: event.data[key] for key in ("status", "at")} for event in confirmed + rest] == history
    assert [step["status"] for step in history] == ["processing", "confirmed", "processing", "cancelled"]


async def test_a_rejected_order_says_why_and_then_nothing_more_can_come(
    new_customer: Make, new_product: NewProduct
) -> None:
    customer = await new_customer()
    placed = (await customer.order((await new_product())["id"], payment_method="tok_declined")).json()
    async with following(customer, placed["id"]) as events, asyncio.timeout(PATIENCE):
        seen = [event async for event in events]
    assert seen[-1].data == {
        "order_id": placed["id"],
        "status": "rejected",
        "at": seen[-1].data["at"],
        "reason": "payment_declined",
    }
    path = f"/api/v1/orders/{placed['id']}/events"
    assert (await customer.client.get(path, headers={"Last-Event-ID": seen[-1].id})).status_code == 204


@pytest.mark.sabotage("app/domain/orders/following.py", "if number > after", "if number > after + 1")
async def test_a_client_that_comes_back_to_another_instance_misses_nothing_and_sees_nothing_twice(
    cluster: Cluster, order: tuple[Customer, str]
) -> None:
    customer, order_id = order
    one, other = instances(cluster)[:2]
    async with following(customer, order_id, at=one) as events:
        seen = await first(events, 1)
    await customer.client.post(f"/api/v1/orders/{order_id}/cancel")
    async with following(customer, order_id, seen[-1].id, at=other) as events:
        seen += await first(events, 2)
    async with following(customer, order_id, seen[-1].id, at=one) as events:
        seen += await first(events, 1)
    assert [event.id for event in seen] == ["1", "2", "3", "4"]


async def test_somebody_elses_order_cannot_be_followed(new_customer: Make, order: tuple[Customer, str]) -> None:
    other = await new_customer()
    check_problem(await other.client.get(f"/api/v1/orders/{order[1]}/events"), 404, "not_found")
    check_problem(await other.client.get(f"/api/v1/orders/{uuid4()}/events"), 404, "not_found")
    del other.client.headers["Authorization"]
    check_problem(await other.client.get(f"/api/v1/orders/{order[1]}/events"), 401, "unauthenticated")


@pytest.mark.parametrize("last", ["x", "-1", "1.5", "\u0661", "9" * 10])
async def test_a_last_event_id_that_we_never_gave_is_refused(order: tuple[Customer, str], last: str) -> None:
    customer, order_id = order
    answer = await customer.client.get(f"/api/v1/orders/{order_id}/events", headers={"Last-Event-ID": last.encode()})
    check_problem(answer, 400, "invalid_last_event_id", "header/Last-Event-ID")


async def test_a_client_that_goes_away_frees_its_place(cluster: Cluster, order: tuple[Customer, str]) -> None:
    customer, order_id = order
    address = instances(cluster)[0]

    async def none_open() -> bool:
        return await open_streams(address) == 0

    await until(none_open)
    async with following(customer, order_id, at=address) as events:
        await first(events, 1)
        assert await open_streams(address) == 1
    await until(none_open)


@pytest.mark.sabotage("app/api/events.py", ">= self.settings.streams_per_caller", "< 0")
async def test_one_caller_cannot_take_all_streams(cluster: Cluster, order: tuple[Customer, str]) -> None:
    customer, order_id = order
    path = f"{instances(cluster)[0]}/api/v1/orders/{order_id}/events"
    async with AsyncExitStack() as held:
        streams = []  # kept: a stream that nobody holds is closed
        for _ in range(10):
            streams.append(await held.enter_async_context(following(customer, order_id, at=instances(cluster)[0])))
            await first(streams[-1], 1)
        check_problem(await customer.client.get(path), 429, "too_many_streams")

    async def again() -> bool:
        async with customer.client.stream("GET", path) as answer:
            return answer.status_code == 200

    assert await until(again)


async def test_a_head_does_not_wait_for_events(order: tuple[Customer, str]) -> None:
    customer, order_id = order
    answer = await customer.client.head(f"/api/v1/orders/{order_id}/events")
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.sabotage("app/api/events.py", "not (first or await session_lives(resources, session))", "False")
async def test_a_session_that_ends_hears_nothing_more(order: tuple[Customer, str]) -> None:
    customer, order_id = order
    async with httpx.AsyncClient(base_url=customer.client.base_url, timeout=15) as client:
        signed_in = await client.post(
            "/api/v1/sessions", json={"email": customer.email, "password": "a long enough pass phrase"}
        )
        client.cookies.clear()
        client.headers["Authorization"] = f"Bearer {signed_in.json()['token']}"
        gone = Customer(client, customer.profile, customer.email, signed_in.json()["token"])
        async with following(gone, order_id) as events:
            await first(events, 2)
            await client.delete("/api/v1/sessions/current")
            await customer.client.post(f"/api/v1/orders/{order_id}/cancel")
            async with asyncio.timeout(PATIENCE):
                assert [event async for event in events] == []


@pytest.mark.sabotage("app/api/events.py", "resources.lifecycle.draining.is_set() or ", "")
async def test_an_instance_that_stops_ends_its_streams_and_does_not_wait_for_them(
    cluster: Cluster, order: tuple[Customer, str]
) -> None:
    customer, order_id = order
    address = cluster.process("api-2").address
    try:
        async with following(customer, order_id, at=str(address)) as events:
            await first(events, 2)
            stopping = asyncio.create_task(asyncio.to_thread(cluster.stop, "api-2"))
            async with asyncio.timeout(PATIENCE):
                assert [event async for event in events] == [], "whole, not broken off"
        await stopping
    finally:
        await asyncio.to_thread(cluster.start, "api-2")
