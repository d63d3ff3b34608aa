"""The relay publishes what has committed, again until it is done, and never waits for what it does not need."""

import asyncio
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson
import pytest
from apart import Apart
from conftest import PATIENCE, settings_from, until

from app.core import context
from app.scaling import outbox
from app.scaling.events import STREAM
from app.wiring import open_resources
from workers.broker import QUEUES, BrokerDown
from workers.relay import ROUTES, Relay
from workers.tasks import TASKS

pytest_plugins = ("apart",)

NOBODY = "redis://127.0.0.1:1/0"  # nothing listens on port 1


@pytest.fixture
async def relay(apart: Apart) -> AsyncIterator[Relay]:
    with apart.publisher() as publisher:
        yield Relay(apart.resources, publisher)


async def streamed(apart: Apart) -> list[tuple[str, str]]:
    return [(entry[b"event"].decode(), entry[b"subject_id"].decode()) for _, entry in await apart.broker.xrange(STREAM)]


def test_every_route_leads_to_a_task_and_every_task_is_reached() -> None:
    routed = {task for tasks in ROUTES.values() for task in tasks}
    assert sorted(routed) == sorted(task.name for task in TASKS)
    assert {task.partition(".")[0] for task in routed} <= set(QUEUES)


async def test_what_has_committed_is_published_and_what_rolled_back_is_not(apart: Apart, relay: Relay) -> None:
    with suppress(ZeroDivisionError):
        async with apart.resources.database.writer() as writer:
            await apart.tell("order.placed", writer)
            raise ZeroDivisionError
    subject = await apart.tell("order.placed")
    assert await relay.relay(0) == 1
    (delivery,) = await apart.taken()
    assert (delivery.task, delivery.message.subject_id) == ("orders.reserve_stock", subject)
    assert (delivery.parts, delivery.message.tries) == (1, 1)


async def test_a_task_is_told_which_position_its_reads_must_have_reached(
    apart: Apart, relay: Relay, work: context.Work
) -> None:
    await apart.tell("order.placed")
    committed = work.positions[0]
    await relay.relay(0)
    (delivery,) = await apart.taken()
    assert delivery.positions[0] >= committed
    assert delivery.message.request_id == work.request_id


@pytest.mark.sabotage("app/scaling/outbox.py", ".with_for_update(skip_locked=True)", "")
async def test_two_relays_never_publish_a_message_twice_in_one_lease(apart: Apart) -> None:
    # A lease that no machine is too slow for.
    workers = apart.settings.workers.model_copy(update={"stale_after": 600.0})
    resources = replace(apart.resources, settings=apart.settings.model_copy(update={"workers": workers}))
    subjects = set()
    for _ in range(30):
        async with apart.resources.database.writer() as writer:
            for _ in range(20):
                subjects.add(await apart.tell("order.placed", writer))
    with apart.publisher() as publisher, apart.publisher() as another:

        async def drain(one: Relay) -> int:
            count = 0
            while moved := await one.relay(0):
                count += moved
            return count

        counts = await asyncio.gather(drain(Relay(resources, publisher)), drain(Relay(resources, another)))
    published = Counter(delivery.message.subject_id for delivery in await apart.taken())
    assert sum(counts) == len(subjects)
    assert published == Counter(subjects)


@pytest.mark.sabotage("app/scaling/outbox.py", "values(due_at=now + lease, tries", "values(due_at=None, tries")
async def test_a_message_that_the_broker_lost_is_published_again(apart: Apart, relay: Relay) -> None:
    subject = await apart.tell("order.placed")
    await relay.relay(0)
    await apart.broker.flushdb()
    assert await relay.relay(0) == 0, "not before its time"
    await apart.make_due()
    assert await relay.relay(0) == 1
    (delivery,) = await apart.taken()
    assert (delivery.message.subject_id, delivery.message.tries) == (subject, 2)


@pytest.mark.sabotage(
    "workers/broker.py", "posting.handed_at + ANSWER_SECONDS < oldest.get(posting.queue, inf)", "True"
)
async def test_a_message_whose_copy_still_waits_in_its_queue_is_not_published_again(apart: Apart) -> None:
    workers = apart.settings.workers.model_copy(update={"stale_after": 0.2})
    soon = apart.settings.model_copy(update={"workers": workers})
    with apart.publisher() as publisher:
        relay = Relay(replace(apart.resources, settings=soon), publisher)
        subjects = [await apart.tell("order.placed") for _ in range(3)]
        invoiced = await apart.tell("order.invoiced")
        assert await relay.relay(0) == 4
        await apart.broker.delete("emails")
        again = await until(relay.relay, 0)
        while again < len(subjects) + 1:
            again += await until(relay.relay, 0)
    found = Counter(delivery.message.subject_id for delivery in await apart.taken())
    assert found == Counter(subjects) + Counter([invoiced]), "what was lost comes again, what waits does not"


@pytest.mark.sabotage(
    "workers/broker.py", "posting.handed_at + ANSWER_SECONDS < oldest.get(posting.queue, inf)", "False"
)
async def test_a_message_that_its_queue_has_passed_is_published_again(apart: Apart, relay: Relay) -> None:
    lost = await apart.tell("order.placed")
    await relay.relay(0)
    await apart.broker.flushdb()
    waits = await apart.tell("order.placed")
    await relay.relay(0)
    await apart.make_due(since=timedelta(minutes=1))  # as if both had been handed over long before the one that waits
    await relay.relay(0)
    found = Counter(delivery.message.subject_id for delivery in await apart.taken())
    assert found[lost] == 1
    assert found[waits] == 2, "nobody can tell it from one that its queue has passed"


async def test_a_message_without_an_outcome_waits_longer_each_time_but_not_for_ever(apart: Apart, relay: Relay) -> None:
    subject = await apart.tell("order.placed")
    for times in (1, 2, 4, 4, 4):
        await apart.make_due()
        before = datetime.now(UTC)
        await relay.relay(0)
        wait = timedelta(seconds=apart.settings.workers.stale_after * times)
        assert before + wait <= (await apart.row(subject)).due_at <= datetime.now(UTC) + wait


@pytest.mark.sabotage(
    "workers/relay.py", "[task for task in tasks if (message.id, task) not in receipts]", "list(tasks)"
)
async def test_only_tasks_without_a_receipt_are_published_again(apart: Apart, relay: Relay) -> None:
    message = await apart.message("order.confirmed")
    await relay.relay(0)
    assert len(await apart.taken()) == len(ROUTES["order.confirmed"])
    async with apart.resources.database.writer() as writer:
        await outbox.receive(writer, message, "invoices.issue")
        await outbox.receive(writer, message, "reports.record_sale")
    await apart.make_due()
    await relay.relay(0)
    assert {delivery.task for delivery in await apart.taken()} == {"orders.capture_payment", "orders.notify_warehouse"}


async def test_a_message_whose_tasks_are_all_done_is_settled(apart: Apart, relay: Relay) -> None:
    message = await apart.message("order.placed")
    await relay.relay(0)
    async with apart.resources.database.writer() as writer:
        await outbox.receive(writer, message, "orders.reserve_stock")  # and the worker dies before it settles
    await apart.make_due()
    await relay.relay(0)
    row = await apart.row(message.subject_id)
    assert row.done_at is not None
    assert row.due_at is None


async def test_an_event_without_tasks_is_done_once_other_services_have_it(apart: Apart, relay: Relay) -> None:
    subject = await apart.tell("profile.created")
    await relay.relay(0)
    assert await streamed(apart) == [("profile.created", str(subject))]
    assert (await apart.row(subject)).done_at is not None
    assert await apart.taken() == []


@pytest.mark.sabotage("workers/relay.py", "len(tasks) if streamed else len(tasks) + 1", "len(tasks)")
async def test_tasks_go_on_while_the_stream_is_down_and_the_event_follows(apart: Apart, relay: Relay) -> None:
    message = await apart.message("order.placed")
    broker = {"REDIS_URL": NOBODY, "REDIS_BROKER_URL": apart.settings.redis.broker}
    settings = settings_from(apart.environment | broker)
    async with open_resources(settings) as cut_off:
        with apart.publisher(settings) as publisher:
            await Relay(cut_off, publisher).relay(0)
    (delivery,) = await apart.taken()
    async with apart.resources.database.writer() as writer:
        await outbox.receive(writer, message, delivery.task)
        await outbox.settle(writer, message, delivery.parts)
    assert (await apart.row(message.subject_id)).done_at is None, "the stream does not have it yet"
    await apart.make_due()
    await relay.relay(0)
    assert await streamed(apart) == [("order.placed", str(message.subject_id))]
    assert (await apart.row(message.subject_id)).done_at is not None


async def test_a_message_that_comes_often_is_not_streamed_often(apart: Apart, relay: Relay) -> None:
    await apart.tell("order.placed")
    for _ in range(6):
        await apart.make_due()
        await relay.relay(0)
    assert 1 <= len(await streamed(apart)) <= 2


@pytest.mark.sabotage(
    "workers/relay.py", "await outbox.sent(writer, messages, again_after=again_after)\n            raise", "raise"
)
async def test_a_broker_that_is_down_leaves_messages_due_soon(apart: Apart, relay: Relay) -> None:
    subject = await apart.tell("order.placed")
    settings = settings_from(apart.environment | {"REDIS_BROKER_URL": NOBODY})
    with apart.publisher(settings) as publisher, pytest.raises(BrokerDown):
        await Relay(apart.resources, publisher).relay(0)
    row = await apart.row(subject)
    assert row.due_at < datetime.now(UTC) + timedelta(seconds=2)
    await apart.make_due()
    await relay.relay(0)
    (delivery,) = await apart.taken()
    assert delivery.message.subject_id == subject


async def test_an_event_of_a_newer_version_waits_and_blocks_nothing(apart: Apart, relay: Relay) -> None:
    unknown = await apart.tell("order.teleported")
    subject = await apart.tell("order.placed")
    assert await relay.relay(0) == 2
    (delivery,) = await apart.taken()
    assert delivery.message.subject_id == subject
    row = await apart.row(unknown)
    assert row.done_at is None
    assert row.due_at > datetime.now(UTC)


async def test_the_process_says_when_it_is_ready_and_finishes_on_sigterm(apart: Apart, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: ASYNC220  # starting it takes a moment only
            [sys.executable, "-m", "app.cli", "relay"],
            env=apart.environment | {"READY_FILE": str(ready), "LOG_FORMAT": "json"},
            stdout=output,
            stderr=output,
        )
    try:
        await until(asyncio.to_thread, ready.exists)
        subject = await apart.tell("order.placed")
        (delivery,) = await until(apart.taken)
        assert delivery.message.subject_id == subject
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, PATIENCE) == 0
        assert not ready.exists()
        phases = [line.get("phase") for line in map(orjson.loads, log.read_bytes().splitlines())]
        assert [phase for phase in phases if phase] == ["READY", "DRAINING"]
    finally:
        process.kill()
