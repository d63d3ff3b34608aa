"""The event stream for other services: what is published fits its schema, and a consumer group handles each event."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import jsonschema
import pytest
from apart import Apart, apart_from
from conftest import PATIENCE, until
from sagas import Shop

from app.core.ids import new_id
from app.scaling.events import STREAM
from app.scaling.outbox import Message
from deploy.local.cluster import Cluster
from workers.consumer import BATCH, Consumer, Event, UnknownSchema
from workers.relay import ROUTES, Relay

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "schemas" / "event.v1.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.FormatChecker())


@pytest.fixture(scope="module")
async def made(cluster: Cluster) -> AsyncIterator[Shop]:
    async with apart_from(cluster) as apart:
        yield await Shop(apart, cluster).open()


@pytest.fixture
async def shop(made: Shop) -> Shop:
    await made.apart.clear()
    return made


@pytest.fixture
async def apart(shop: Shop) -> Apart:
    return shop.apart


class Handled:
    """What consumers of a group have handled; one may be told to die after so many."""

    def __init__(self, apart: Apart) -> None:
        self.events: list[Event] = []
        self._apart = apart

    def consumer(self, name: str, *, dies_after: int | None = None, group: str = "shipping") -> Consumer:
        left = dies_after

        async def handle(event: Event) -> None:
            nonlocal left
            if left == 0:
                raise ConnectionAbortedError
            left = None if left is None else left - 1
            self.events.append(event)

        return Consumer(self._apart.resources.redis, group, name, handle, claim_after=0)

    @property
    def ids(self) -> list[str]:
        return [event.id for event in self.events]


def message(event: str = "profile.updated") -> Message:
    subject = new_id()
    return Message(subject, new_id(subject), event, subject, {"version": 1}, "-", 1)


async def publish(apart: Apart, count: int) -> list[str]:
    messages = [message() for _ in range(count)]
    await apart.resources.events.publish(messages)
    return [str(each.id) for each in messages]


@pytest.mark.sabotage("app/domain/orders/rules.py", '"sequence": len(self.history), ', "")
async def test_everything_that_is_published_fits_the_schema(shop: Shop) -> None:
    handled, resources = Handled(shop.apart), shop.apart.resources
    consumer = handled.consumer("one")
    await consumer.join(from_start=True)
    orders = [await shop.order(), await shop.order(method="tok_declined"), await shop.order(11)]
    with shop.apart.publisher() as publisher:
        relay = Relay(resources, publisher)
        for _ in range(8):
            await relay.relay(0)
            await shop.step()
        await resources.orders.cancel(orders[0].profile_id, orders[0].id)
        profile = await resources.profiles.own(orders[0].profile_id)
        changed = await resources.profiles.change(profile.id, profile.version, {"name": "Countess"})
        await resources.profiles.erase(profile.id, changed.version)
        for _ in range(4):
            await shop.apart.make_due()
            await relay.relay(0)
            await shop.step()
    while await consumer.step():
        pass
    for event in handled.events:
        VALIDATOR.validate(event.to_json())
    seen = {event.event for event in handled.events}
    # The provider is up, so no payment has to wait.
    assert seen == {event for event in ROUTES if event.startswith(("order.", "profile."))} - {"order.payment_pending"}
    assert "Ada" not in str(handled.events), "nothing of a person"
    last = max(
        (event for event in handled.events if event.subject_id == str(orders[0].id)), key=lambda e: e.payload["version"]
    )
    assert last.payload["status"] == "cancelled"


async def test_the_schema_knows_every_event_that_can_be_published() -> None:
    order, profile = SCHEMA["allOf"][0]["then"], SCHEMA["allOf"][0]["else"]
    known = {*order["properties"]["event"]["enum"], *profile["properties"]["event"]["enum"]}
    assert known == {event for event in ROUTES if event.startswith(("order.", "profile."))}


@pytest.mark.sabotage("workers/consumer.py", "if event.id not in known:", "if True:")
async def test_an_event_that_is_published_twice_is_handled_once(apart: Apart) -> None:
    handled, one = Handled(apart), message()
    consumer = handled.consumer("one")
    await consumer.join(from_start=True)
    await apart.resources.events.publish([one, one])
    await consumer.step()
    await apart.resources.events.publish([one])
    await consumer.step()
    assert handled.ids == [str(one.id)]


@pytest.mark.sabotage("workers/consumer.py", "await self._abandoned() or await self._fresh()", "await self._fresh()")
async def test_what_a_dead_consumer_held_goes_to_another(apart: Apart) -> None:
    handled = Handled(apart)
    dying, other = handled.consumer("dying", dies_after=3), handled.consumer("other")
    await dying.join(from_start=True)
    published = await publish(apart, 10)
    with pytest.raises(ConnectionAbortedError):
        await dying.step()
    while await other.step():
        pass
    assert handled.ids == published
    assert (await apart.broker.xpending(STREAM, "shipping"))["pending"] == 0


async def test_an_event_at_which_every_consumer_dies_is_given_up(apart: Apart) -> None:
    handled = Handled(apart)
    await handled.consumer("any").join(from_start=True)
    published = await publish(apart, 2)
    for number in range(5):
        with pytest.raises(ConnectionAbortedError):
            await handled.consumer(f"{number}", dies_after=0).step()
    while await handled.consumer("last").step():
        pass
    assert set(handled.ids) <= set(published)
    assert (await apart.broker.xpending(STREAM, "shipping"))["pending"] == 0


async def test_each_group_gets_every_event_and_its_consumers_share_them(apart: Apart) -> None:
    one, two, other = Handled(apart), Handled(apart), Handled(apart)
    first, second, third = one.consumer("a"), two.consumer("b"), other.consumer("a", group="billing")
    for each in (first, third):
        await each.join(from_start=True)
    published = await publish(apart, 3 * BATCH)
    while await first.step() + await second.step() + await third.step():
        pass
    assert sorted(one.ids + two.ids) == sorted(published)
    assert other.ids == published
    assert one.ids
    assert two.ids


async def test_a_group_that_joins_late_begins_with_what_comes(apart: Apart) -> None:
    await publish(apart, 3)
    handled = Handled(apart)
    consumer = handled.consumer("a", group="late")
    await consumer.join(from_start=False)
    published = await publish(apart, 2)
    await consumer.step()
    assert handled.ids == published


async def test_a_consumer_stops_when_it_is_told_to(apart: Apart) -> None:
    handled, stopping = Handled(apart), asyncio.Event()
    consumer = handled.consumer("a")
    await consumer.join(from_start=True)
    serving = asyncio.create_task(consumer.serve(stopping))
    await publish(apart, 1)

    async def at_work() -> bool:
        return bool(handled.events)

    await until(at_work)
    stopping.set()
    async with asyncio.timeout(PATIENCE):
        await serving


async def test_what_the_stream_was_cut_past_is_given_up_and_blocks_nothing(apart: Apart) -> None:
    handled = Handled(apart)
    dying = handled.consumer("dying", dies_after=0)
    await dying.join(from_start=True)
    await publish(apart, 3)
    with pytest.raises(ConnectionAbortedError):
        await dying.step()
    await apart.broker.xtrim(STREAM, maxlen=0)
    published = await publish(apart, 1)
    other = handled.consumer("other")
    while await other.step():
        pass
    assert handled.ids == published
    assert (await apart.broker.xpending(STREAM, "shipping"))["pending"] == 0


def test_an_event_of_a_later_schema_is_not_guessed_at() -> None:
    with pytest.raises(UnknownSchema, match="schema 2"):
        Event.read({b"schema": b"2"})
