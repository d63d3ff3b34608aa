"""Outbox and idempotency keys on a database that no relay reads: nothing lost, nothing twice."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from conftest import until
from engines import WORDS
from quiet import Servers, started
from sqlalchemy import delete, text

from app.core import context
from app.core.errors import Conflict, Invalid, Unavailable
from app.core.ids import new_id
from app.scaling import dialect, outbox
from app.scaling.database import Database
from app.scaling.idempotency import Claim
from app.scaling.outbox import Message
from app.wiring import Resources

pytest_plugins = ("quiet",)

MINUTE = timedelta(minutes=1)


@pytest.fixture
async def empty(quiet: Resources) -> Database:
    """The database without any message."""
    async with quiet.database.writer() as writer:
        for table in (outbox.outbox, outbox.receipts, outbox.dead_letters):
            await writer.run(delete(table))
    return quiet.database


async def tell(database: Database, count: int = 1) -> None:
    async with database.writer() as writer:
        for _ in range(count):
            profile_id = new_id()
            await outbox.append(writer, "thing.done", profile_id=profile_id, subject_id=profile_id, payload={"a": [1]})


async def claimed(database: Database, batch: int = 100, lease: timedelta = MINUTE) -> Sequence[Message]:
    async with database.writer() as writer:
        return await outbox.claim(writer, batch=batch, lease=lease)


async def row_of(servers: Servers, message: Message) -> Any:
    (row,) = await servers.sql("primary", "SELECT * FROM outbox WHERE id = $1", message.id)
    return row


@pytest.mark.sabotage(path="app/scaling/outbox.py", take_out="context.current().request_id,", put='"-",')
async def test_a_message_leaves_with_the_commit_and_carries_the_request_id(empty: Database, work: context.Work) -> None:
    with pytest.raises(RuntimeError):  # noqa: PT012  # where in the block it is raised is the point
        async with empty.writer() as writer:
            await outbox.append(writer, "thing.done", profile_id=new_id(), subject_id=new_id())
            raise RuntimeError("rolled back")
    assert not await claimed(empty)
    await tell(empty)
    (message,) = await claimed(empty)
    assert (message.event, message.payload, message.tries) == ("thing.done", {"a": [1]}, 1)
    assert message.request_id == work.request_id
    assert Message.from_json(message.to_json()) == message


@pytest.mark.sabotage(path="app/scaling/outbox.py", take_out="skip_locked=True", put="skip_locked=False")
async def test_two_relays_at_once_claim_different_messages_without_waiting(empty: Database) -> None:
    await tell(empty, 20)
    async with asyncio.timeout(10), empty.writer() as first, empty.writer() as second:
        ours = await outbox.claim(first, batch=12, lease=MINUTE)
        theirs = await outbox.claim(second, batch=12, lease=MINUTE)
    assert (len(ours), len(theirs)) == (12, 8)
    assert len({message.id for message in (*ours, *theirs)}) == 20
    assert not await claimed(empty)


async def test_a_claimed_message_comes_again_after_its_lease_and_a_done_one_never(
    empty: Database, servers: Servers
) -> None:
    await tell(empty)
    (message,) = await claimed(empty, lease=timedelta(0))
    (again,) = await claimed(empty, lease=timedelta(0))
    assert (again.id, again.tries) == (message.id, 2)
    async with empty.writer() as writer:
        assert await outbox.receive(writer, message, "only")
        await outbox.settle(writer, message, parts=1)
        # The relay's note and a worker's may come in any order: done stays done.
        await outbox.sent(writer, [message], again_after=timedelta(0))
        await outbox.defer(writer, message, delay=timedelta(0))
    assert not await claimed(empty)
    assert (await row_of(servers, message))["done_at"] is not None


async def test_a_sent_message_that_nobody_finishes_is_due_again(empty: Database) -> None:
    await tell(empty)
    (message,) = await claimed(empty)
    async with empty.writer() as writer:
        await outbox.sent(writer, [message], again_after=MINUTE)
    assert not await claimed(empty)
    async with empty.writer() as writer:
        await outbox.sent(writer, [message], again_after=timedelta(0))
    assert [each.id for each in await claimed(empty)] == [message.id]


@pytest.mark.sabotage(
    path="app/scaling/outbox.py", take_out="            insert_ignore(receipts)", put="            insert(outbox)"
)
async def test_a_task_is_received_once_however_often_it_is_delivered(empty: Database) -> None:
    await tell(empty)
    (message,) = await claimed(empty)

    async def deliver() -> bool:
        async with empty.writer() as writer:
            return await outbox.receive(writer, message, "task")

    assert sorted(await asyncio.gather(*(deliver() for _ in range(5)))) == [False] * 4 + [True]
    async with empty.writer() as writer:
        assert await outbox.receive(writer, message, "other task")
        assert await outbox.receipted(writer, [message]) == {(message.id, "task"), (message.id, "other task")}


async def test_a_task_that_rolled_back_is_received_again(empty: Database) -> None:
    await tell(empty)
    (message,) = await claimed(empty)
    with pytest.raises(RuntimeError):  # noqa: PT012  # where in the block it is raised is the point
        async with empty.writer() as writer:
            assert await outbox.receive(writer, message, "task")
            raise RuntimeError("failed")
    async with empty.writer() as writer:
        assert await outbox.receive(writer, message, "task")


@pytest.mark.sabotage(
    path="app/scaling/outbox.py",
    take_out="await writer.all(select(outbox.c.id).where(*key).with_for_update())",
    put="await writer.all(select(outbox.c.id).where(*key))",
)
async def test_of_two_last_tasks_that_end_at_once_one_marks_the_message_done(empty: Database, servers: Servers) -> None:
    await tell(empty)
    (message,) = await claimed(empty)
    first_counted, second_asked = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        async with empty.writer() as writer:
            await outbox.receive(writer, message, "first")
            await outbox.settle(writer, message, parts=2)
            first_counted.set()
            await second_asked.wait()

    async def second() -> None:
        async with empty.writer() as writer:
            await outbox.receive(writer, message, "second")
            await first_counted.wait()
            settling = asyncio.create_task(outbox.settle(writer, message, parts=2))
            # It either waits for the first's lock, or has counted without it.
            await until(counted_or_waits, settling)
            second_asked.set()
            await settling

    async def counted_or_waits(settling: asyncio.Task[None]) -> bool:
        return settling.done() or bool(await servers.sql("primary", WORDS.waits_for_row))

    await asyncio.gather(first(), second())
    assert (await row_of(servers, message))["done_at"] is not None


async def test_a_message_with_a_task_to_go_is_not_done(empty: Database, servers: Servers) -> None:
    await tell(empty)
    (message,) = await claimed(empty)
    async with empty.writer() as writer:
        await outbox.receive(writer, message, "first")
        await outbox.settle(writer, message, parts=2)
    assert (await row_of(servers, message))["done_at"] is None


async def test_a_message_given_up_is_kept_with_its_reason(empty: Database, servers: Servers) -> None:
    await tell(empty)
    (message,) = await claimed(empty)
    async with empty.writer() as writer:
        await outbox.bury(writer, message, "task", "it is broken")
    (letter,) = await servers.sql("primary", "SELECT * FROM dead_letters")
    assert (letter["message_id"], letter["task"], letter["error"]) == (message.id, "task", "it is broken")


def claim(profile_id: UUID, key: str, body: Any = None) -> Claim:
    return Claim.of(profile_id, "test.route", key, body)


async def take(database: Database, wanted: Claim, reply: dict[str, Any]) -> dict[str, Any] | None:
    """Claim a key with an effect, as a use case does, and return the reply of an earlier call."""
    effect = outbox.message_row("effect", profile_id=wanted.profile_id, subject_id=wanted.profile_id)
    return await wanted.take(database, reply, effect)


@pytest.mark.sabotage(
    path="app/scaling/idempotency.py",
    take_out="        if fresh:\n            return None\n",
    put="        return None\n",
)
async def test_concurrent_calls_with_one_key_have_one_effect_and_one_reply(empty: Database) -> None:
    wanted = claim(new_id(), uuid4().hex)
    replies = await asyncio.gather(*(take(empty, wanted, {"id": number}) for number in range(5)))
    (first,) = [number for number, reply in enumerate(replies) if reply is None]
    assert [reply for reply in replies if reply] == [{"id": first}] * 4
    assert len(await claimed(empty)) == 1


@pytest.mark.sabotage(
    path="app/scaling/idempotency.py", take_out="row.fingerprint != self.fingerprint", put="not row.fingerprint"
)
async def test_a_key_with_another_body_is_refused_and_spelling_the_same_body_differently_is_not(
    empty: Database,
) -> None:
    profile_id, key = new_id(), uuid4().hex
    assert await take(empty, claim(profile_id, key, {"a": 1, "b": 2}), {"id": 1}) is None
    assert await take(empty, claim(profile_id, key, {"b": 2, "a": 1}), {"id": 2}) == {"id": 1}
    with pytest.raises(Invalid) as refusal:
        await take(empty, claim(profile_id, key, {"a": 1, "b": 3}), {"id": 3})
    assert (refusal.value.code, refusal.value.fields[0].pointer) == ("idempotency_key_reused", "header/Idempotency-Key")
    assert await take(empty, Claim.of(profile_id, "other.route", key, None), {"id": 4}) is None
    assert await take(empty, claim(new_id(), key), {"id": 5}) is None


@pytest.mark.sabotage(
    path="app/scaling/idempotency.py",
    take_out="if error.__cause__ is None or trouble(error.__cause__) is not Trouble.BUSY:",
    put="if True:",
)
async def test_a_key_whose_first_call_does_not_end_is_in_flight(
    quiet: Resources, empty: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialect, "LOCK_TIMEOUT", 100)
    wanted = claim(new_id(), uuid4().hex)
    async with started(quiet) as impatient:
        async with empty.writer(wanted.profile_id) as holder:
            assert await holder.insert_once(wanted.row({"id": 1}))
            with pytest.raises(Conflict) as refusal:
                await take(impatient, wanted, {"id": 2})
        assert refusal.value.code == "idempotency_in_flight"
        assert await take(impatient, wanted, {"id": 3}) == {"id": 1}


async def test_a_holder_that_crashed_leaves_no_key_behind(empty: Database, servers: Servers) -> None:
    wanted = claim(new_id(), uuid4().hex)
    with pytest.raises(Unavailable):  # noqa: PT012  # where in the block it is raised is the point
        async with empty.writer(wanted.profile_id) as writer:
            assert await writer.insert_once(wanted.row({"id": 1}))
            row = await writer.first(text(WORDS.own_id))
            await servers.sql("primary", WORDS.end, row and row.id)
    assert await take(empty, wanted, {"id": 2}) is None
