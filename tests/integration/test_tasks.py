"""A task happens once, its transaction is all or nothing, and each kind of error has its answer."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from apart import Apart
from conftest import settings_from, until
from sqlalchemy import func, select

from app.core.errors import Conflict, Unavailable
from app.core.ids import new_id
from app.scaling import outbox
from app.scaling.outbox import Message, message_from
from app.wiring import Resources, open_resources
from workers.task import LONGEST_DELAY, MOST_LOST, Delivery, Handler, Outcome, Task, backoff, execute, once

pytest_plugins = ("apart",)

NOWHERE = "postgresql://nobody:nothing@127.0.0.1:1/nothing"  # nothing listens on port 1


def delivery_of(message: Message, task: Task, *, parts: int = 1) -> Delivery:
    return Delivery(task.name, message, parts, positions={})


def failing(error: Exception, name: str = "orders.test") -> Task:
    async def fail(_resources: Resources, _delivery: Delivery) -> None:
        raise error

    return Task(name, seconds=5, handler=fail)


class Counting:
    """A handler that tells another message in its transaction, and counts how often it came to that."""

    def __init__(self) -> None:
        self.effects = 0

    async def __call__(self, resources: Resources, delivery: Delivery) -> None:
        self.effects += 1
        message = delivery.message
        async with once(resources, delivery) as writer:
            await outbox.append(
                writer, "order.rejected", profile_id=message.profile_id, subject_id=new_id(message.profile_id)
            )


def counting(name: str = "orders.test", handler: Handler | None = None) -> Task:
    return Task(name, seconds=5, handler=handler or Counting())


async def followers(apart: Apart) -> int:
    """Count the messages that tasks have told."""
    async with apart.resources.database.writer() as writer:
        row = await writer.first(select(func.count().label("told")).where(outbox.outbox.c.event == "order.rejected"))
    return row.told if row else 0


async def receipts(apart: Apart) -> set[str]:
    async with apart.resources.database.writer() as writer:
        return {row.task for row in await writer.all(select(outbox.receipts.c.task))}


@pytest.mark.sabotage("workers/task.py", "raise AlreadyDone(delivery.task)", "pass")
async def test_a_second_delivery_changes_nothing(apart: Apart) -> None:
    message = await apart.message("order.placed")
    task = counting()
    assert await execute(task, apart.resources, delivery_of(message, task)) is Outcome.DONE
    assert await execute(task, apart.resources, delivery_of(message, task)) is Outcome.DROPPED
    assert await followers(apart) == 1


async def test_a_repeated_delivery_of_a_finished_task_does_not_even_begin(apart: Apart) -> None:
    message = await apart.message("order.placed")
    counter = Counting()
    task = counting(handler=counter)
    await execute(task, apart.resources, delivery_of(message, task))
    again = delivery_of(replace(message, tries=2), task)
    assert await execute(task, apart.resources, again) is Outcome.DROPPED
    assert counter.effects == 1


async def test_two_deliveries_at_the_same_time_leave_one_effect(apart: Apart) -> None:
    message = await apart.message("order.placed")
    task = counting()
    outcomes = await asyncio.gather(*(execute(task, apart.resources, delivery_of(message, task)) for _ in range(2)))
    assert sorted(outcomes) == [Outcome.DONE, Outcome.DROPPED]
    assert await followers(apart) == 1


@pytest.mark.sabotage(
    "app/scaling/outbox.py", "await writer.all(select(outbox.c.id).where(*key).with_for_update())", ""
)
async def test_tasks_of_one_message_that_end_at_the_same_moment_still_settle_it(apart: Apart) -> None:
    for _ in range(10):
        message = await apart.message("order.confirmed")
        barrier = asyncio.Barrier(4)

        async def act(resources: Resources, delivery: Delivery, barrier: asyncio.Barrier = barrier) -> None:
            async with once(resources, delivery):
                await barrier.wait()

        tasks = [Task(f"orders.test_{number}", 5, act) for number in range(4)]
        await asyncio.gather(*(execute(task, apart.resources, delivery_of(message, task, parts=4)) for task in tasks))
        assert (await apart.row(message.subject_id)).done_at is not None


async def test_a_message_stays_open_until_its_last_task_is_done(apart: Apart) -> None:
    message = await apart.message("order.confirmed")
    first, last = counting("orders.first"), counting("orders.last")
    await execute(first, apart.resources, delivery_of(message, first, parts=2))
    assert (await apart.row(message.subject_id)).done_at is None
    await execute(last, apart.resources, delivery_of(message, last, parts=2))
    assert (await apart.row(message.subject_id)).done_at is not None


async def test_a_task_that_fails_in_its_transaction_leaves_nothing(apart: Apart) -> None:
    message = await apart.message("order.placed")

    async def half(resources: Resources, delivery: Delivery) -> None:
        async with once(resources, delivery) as writer:
            await outbox.append(
                writer, "order.rejected", profile_id=message.profile_id, subject_id=new_id(message.profile_id)
            )
            raise ZeroDivisionError

    task = counting(handler=half)
    assert await execute(task, apart.resources, delivery_of(message, task)) is Outcome.DEFERRED
    assert await followers(apart) == 0
    assert await receipts(apart) == set()


@pytest.mark.sabotage("workers/task.py", "if isinstance(error, WAITS_FOR) and not hung:", "if False:")
@pytest.mark.parametrize("error", [Unavailable("down"), ConnectionResetError("cut"), TimeoutError("late")])
async def test_a_dependency_that_is_down_is_waited_for_however_long(apart: Apart, error: Exception) -> None:
    message = replace(await apart.message("order.reserved"), tries=1000)
    task = failing(error)
    assert await execute(task, apart.resources, delivery_of(message, task)) is Outcome.DEFERRED
    row = await apart.row(message.subject_id)
    assert row.due_at <= datetime.now(UTC) + timedelta(seconds=LONGEST_DELAY)
    assert row.done_at is None
    assert await apart.dead_letters() == []


@pytest.mark.sabotage("workers/task.py", "permanent or failures >= resources.settings.workers.max_tries", "permanent")
async def test_a_poison_message_ends_as_a_dead_letter_and_its_other_tasks_settle_it(apart: Apart) -> None:
    message = await apart.message("order.confirmed")
    poison, good = failing(ZeroDivisionError("by nought"), "orders.poison"), counting("orders.good")
    assert await execute(poison, apart.resources, delivery_of(message, poison, parts=2)) is Outcome.DEFERRED
    assert await apart.dead_letters() == []
    last = replace(message, failures={poison.name: apart.settings.workers.max_tries - 1})
    assert await execute(poison, apart.resources, delivery_of(last, poison, parts=2)) is Outcome.DEAD
    (letter,) = await apart.dead_letters()
    assert (letter.task, letter.event, letter.message_id) == ("orders.poison", "order.confirmed", message.id)
    assert letter.error == "ZeroDivisionError: by nought"
    await execute(good, apart.resources, delivery_of(message, good, parts=2))
    assert (await apart.row(message.subject_id)).done_at is not None


@pytest.mark.sabotage(
    "workers/task.py",
    "failures = delivery.message.failures.get(delivery.task, 0) + 1",
    "failures = delivery.message.tries + sum(delivery.message.failures.values())",
)
async def test_neither_a_long_outage_nor_another_tasks_failures_use_up_a_tasks_tries(apart: Apart) -> None:
    message = await apart.message("order.confirmed")
    most = apart.settings.workers.max_tries
    task, other = failing(ZeroDivisionError("by nought")), failing(ZeroDivisionError("by nought"), "orders.other")
    waited = replace(message, tries=1000, failures={other.name: most - 1})
    for failures in (1, 2):
        assert await execute(task, apart.resources, delivery_of(waited, task, parts=2)) is Outcome.DEFERRED
        row = await apart.row(message.subject_id)
        assert row.failures == {task.name: failures}
        waited = message_from(row, tries=1000 + failures)
    assert await apart.dead_letters() == []
    assert await execute(other, apart.resources, delivery_of(waited, other, parts=2)) is Outcome.DEFERRED
    assert (await apart.row(message.subject_id)).failures == {task.name: 2, other.name: 1}


@pytest.mark.sabotage(
    "workers/task.py", "permanent = isinstance(error, ServiceError) and not hung", "permanent = False"
)
async def test_an_error_that_no_retry_mends_is_a_dead_letter_at_once(apart: Apart) -> None:
    message = await apart.message("order.placed")
    task = failing(Conflict("This can never be."))
    assert await execute(task, apart.resources, delivery_of(message, task)) is Outcome.DEAD
    assert len(await apart.dead_letters()) == 1
    assert await execute(task, apart.resources, delivery_of(message, task)) is Outcome.DROPPED
    assert len(await apart.dead_letters()) == 1


async def test_a_task_that_hangs_is_cut_off_and_does_not_hang_for_ever(apart: Apart) -> None:
    message = await apart.message("order.placed")

    async def hang(_resources: Resources, _delivery: Delivery) -> None:
        await asyncio.Event().wait()

    task = Task("orders.test", seconds=0.05, handler=hang)
    assert await execute(task, apart.resources, delivery_of(message, task)) is Outcome.DEFERRED
    last = replace(message, failures={task.name: apart.settings.workers.max_tries - 1})
    assert await execute(task, apart.resources, delivery_of(last, task)) is Outcome.DEAD


class Slow:
    """A handler with an effect outside, which takes until the test says so."""

    def __init__(self) -> None:
        self.effects = 0
        self.began, self.release = asyncio.Event(), asyncio.Event()

    async def __call__(self, resources: Resources, delivery: Delivery) -> None:
        self.effects += 1
        self.began.set()
        await self.release.wait()
        async with once(resources, delivery):
            pass


@pytest.mark.sabotage("app/scaling/runs.py", "if holder and holder ~= ARGV[1] then", "if false then")
async def test_of_many_copies_at_once_one_has_its_effect_outside_and_none_counts_as_a_death(apart: Apart) -> None:
    message = await apart.message("order.placed")
    slow = Slow()
    task = counting(handler=slow)
    copies = [replace(delivery_of(message, task), copy=f"copy-{number}") for number in range(2 * MOST_LOST)]
    first = asyncio.create_task(execute(task, apart.resources, copies[0]))
    await slow.began.wait()
    assert {await execute(task, apart.resources, copy) for copy in copies[1:]} == {Outcome.DEFERRED}
    assert (await apart.row(message.subject_id)).due_at < datetime.now(UTC) + timedelta(seconds=task.longest)
    slow.release.set()
    assert await first is Outcome.DONE
    assert slow.effects == 1
    assert await execute(task, apart.resources, replace(copies[1], redelivered=True)) is Outcome.DROPPED
    assert await apart.dead_letters() == []


@pytest.mark.sabotage("app/scaling/runs.py", "if holder and holder ~= ARGV[1] then", "if holder then")
async def test_a_copy_whose_process_died_takes_over_from_itself_at_once(apart: Apart) -> None:
    message = await apart.message("order.placed")
    slow = Slow()
    task = counting(handler=slow)
    copy = replace(delivery_of(message, task), copy="copy")
    died = asyncio.create_task(execute(task, apart.resources, copy))
    await slow.began.wait()
    again = asyncio.create_task(execute(task, apart.resources, replace(copy, redelivered=True)))

    async def began_again() -> bool:
        return slow.effects > 1 or again.done()

    await until(began_again)
    slow.release.set()
    assert sorted([await again, await died]) == [Outcome.DONE, Outcome.DROPPED]


@pytest.mark.sabotage("workers/task.py", "lost >= MOST_LOST", "False")
async def test_a_message_that_kills_its_process_again_and_again_is_given_up(apart: Apart) -> None:
    message = await apart.message("order.placed")
    task = failing(ZeroDivisionError("it must not even begin"))
    again = replace(delivery_of(message, task), redelivered=True)
    await apart.broker.set(f"deaths:{{{message.id}:{task.name}}}", MOST_LOST)
    assert await execute(task, apart.resources, again) is Outcome.DEAD
    (letter,) = await apart.dead_letters()
    assert letter.error.startswith("WorkerLost")


async def test_without_the_database_the_message_comes_again_by_itself(apart: Apart) -> None:
    message = await apart.message("order.placed")
    async with open_resources(settings_from(apart.environment | {"DATABASE_URL": NOWHERE})) as cut_off:
        task = counting()
        assert await execute(task, cut_off, delivery_of(message, task)) is Outcome.UNDECIDED
    row = await apart.row(message.subject_id)
    assert row.done_at is None
    assert row.due_at is not None


def test_waits_grow_are_bounded_and_differ() -> None:
    for tries in (1, 5, 50, 5000):
        waits = {backoff(tries).total_seconds() for _ in range(200)}
        assert min(waits) >= 0
        assert max(waits) <= min(LONGEST_DELAY, 0.5 * 2 ** min(tries - 1, 10))
        assert len(waits) > 100
