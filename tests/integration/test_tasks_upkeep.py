"""Chores delete only what has been kept long enough, and run once however many start them."""

import asyncio
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from apart import Apart
from conftest import settings_from
from sqlalchemy import func, insert, select, update

from app.core.ids import new_id
from app.scaling import locks, outbox
from app.scaling.idempotency import Claim, idempotency_keys
from app.wiring import Resources, open_resources
from workers.schedule import SCHEDULE
from workers.task import Outcome
from workers.tasks import CHORES
from workers.tasks.upkeep import Chore, attend, purge

pytest_plugins = ("apart",)

NOBODY = "redis://127.0.0.1:1/0"  # nothing listens on port 1


def test_every_chore_is_scheduled_and_ends_before_its_next_time() -> None:
    assert {chore.name for chore in CHORES} == set(SCHEDULE)
    assert all(chore.seconds <= SCHEDULE[chore.name] for chore in CHORES)


@pytest.mark.sabotage(
    "workers/tasks/upkeep.py", "kept.since < datetime.now(UTC) - kept.period", "kept.since.is_not(None)"
)
async def test_the_purge_takes_what_is_old_and_leaves_the_rest(apart: Apart) -> None:
    old, young, waiting = [await apart.message("order.placed") for _ in range(3)]
    now = datetime.now(UTC)
    async with apart.resources.database.writer() as writer:
        for message, done_at in ((old, now - timedelta(days=2)), (young, now - timedelta(hours=1))):
            await outbox.receive(writer, message, "orders.test")
            await writer.run(
                update(outbox.outbox).where(outbox.outbox.c.id == message.id).values(done_at=done_at, due_at=None)
            )
        # Waiting for longer than anything is kept: a message that is not done is never deleted.
        await writer.run(
            update(outbox.outbox).where(outbox.outbox.c.id == waiting.id).values(created_at=now - timedelta(days=400))
        )
    assert await attend(purge, apart.resources) is Outcome.DONE
    async with apart.resources.database.writer() as writer:
        left = {row.id for row in await writer.all(select(outbox.outbox.c.id))}
        receipts = {row.message_id for row in await writer.all(select(outbox.receipts.c.message_id))}
    assert left == {young.id, waiting.id}
    assert receipts == {old.id, young.id}, "a receipt outlives every copy of its message"


@pytest.mark.sabotage(
    "workers/tasks/upkeep.py",
    """        _not_done(receipts.c.profile_id, receipts.c.message_id)
        | _open_letter(""",
    """        _open_letter(""",
)
async def test_the_receipts_of_a_message_that_is_not_done_are_kept_however_long(apart: Apart) -> None:
    waiting, done = [await apart.message("order.confirmed") for _ in range(2)]
    long_ago = datetime.now(UTC) - timedelta(days=400)
    async with apart.resources.database.writer() as writer:
        for message in (waiting, done):
            await outbox.receive(writer, message, "orders.test")
        await outbox.finish(writer, [done])
        await writer.run(update(outbox.receipts).values(done_at=long_ago))
    assert await attend(purge, apart.resources) is Outcome.DONE
    async with apart.resources.database.writer() as writer:
        left = {row.message_id for row in await writer.all(select(outbox.receipts.c.message_id))}
    assert left == {waiting.id}


async def test_the_purge_goes_through_more_than_one_batch(apart: Apart) -> None:
    profile_id, long_ago = new_id(), datetime.now(UTC) - timedelta(days=3)
    async with apart.resources.database.writer() as writer:
        await writer.run(
            insert(idempotency_keys),
            [
                {
                    "profile_id": profile_id,
                    "route": "orders.place",
                    "key": str(number),
                    "fingerprint": "0" * 64,
                    "reply": {},
                    "created_at": long_ago,
                }
                for number in range(2500)
            ],
        )
    assert await attend(purge, apart.resources) is Outcome.DONE
    async with apart.resources.database.writer() as writer:
        row = await writer.first(select(func.count().label("left")).select_from(idempotency_keys))
    assert row is not None
    assert row.left == 0


@pytest.mark.sabotage("workers/tasks/upkeep.py", "timedelta(hours=24)", "timedelta(hours=22)")
async def test_an_idempotency_key_is_kept_for_a_day_and_then_swept(apart: Apart) -> None:
    owner, now = new_id(), datetime.now(UTC)
    hours = (1, 23, 25, 100)
    async with apart.resources.database.writer(owner) as writer:
        for hour in hours:
            await writer.insert_once(Claim.of(owner, "orders.place", f"{hour} hours old", {}).row({}))
            old = (idempotency_keys.c.profile_id == owner) & (idempotency_keys.c.key == f"{hour} hours old")
            await writer.run(update(idempotency_keys).where(old).values(created_at=now - timedelta(hours=hour)))
    assert await attend(purge, apart.resources) is Outcome.DONE
    async with apart.resources.database.writer(owner) as writer:
        left = await writer.all(select(idempotency_keys.c.key).where(idempotency_keys.c.profile_id == owner))
    assert {row.key for row in left} == {"1 hours old", "23 hours old"}


@pytest.mark.sabotage(
    "workers/tasks/upkeep.py", "await resources.locks.run_alone(chore.name, work)", "await work(0) is None"
)
async def test_a_chore_runs_once_however_many_start_it(apart: Apart) -> None:
    runs = []
    began, release = asyncio.Event(), asyncio.Event()

    async def count(_resources: Resources) -> None:
        runs.append(1)
        began.set()
        await release.wait()

    chore = Chore("upkeep.test", seconds=20, work=count)
    first = asyncio.create_task(attend(chore, apart.resources))
    await began.wait()
    assert [await attend(chore, apart.resources) for _ in range(3)] == [Outcome.DROPPED] * 3
    release.set()
    assert await first is Outcome.DONE
    assert len(runs) == 1


async def test_a_chore_whose_lock_cannot_be_asked_for_does_not_run(apart: Apart) -> None:
    async def fail(_resources: Resources) -> None:
        pytest.fail("it must not run")

    async with open_resources(settings_from(apart.environment | {"REDIS_URL": NOBODY})) as cut_off:
        assert await attend(Chore("upkeep.test", seconds=5, work=fail), cut_off) is Outcome.DEFERRED


@pytest.mark.sabotage(
    "app/scaling/locks.py", "                working.cancel()\n                await", "                await"
)
async def test_a_lost_lock_stops_the_work_and_the_next_holder_has_a_higher_fence(
    apart: Apart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LEASE", 0.3)
    fences, stopped = [], asyncio.Event()

    async def hold(fence: int) -> None:
        fences.append(fence)
        await apart.broker.delete("lock:upkeep.test")
        try:
            async with asyncio.timeout(5):
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            stopped.set()
            raise

    with pytest.raises(locks.LockLost):
        await apart.resources.locks.run_alone("upkeep.test", hold)
    assert stopped.is_set()

    async def note(fence: int) -> None:
        fences.append(fence)

    assert await apart.resources.locks.run_alone("upkeep.test", note)
    assert fences[1] > fences[0]


async def test_a_chore_is_a_command_for_cron(apart: Apart) -> None:
    async def scaleout(name: str) -> "subprocess.CompletedProcess[str]":
        return await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "app.cli", "run", name],
            env=apart.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    done = await scaleout("purge")
    assert (done.returncode, done.stdout) == (0, "purge: done.\n"), done.stderr
    async with apart.resources.redis.client.lock("lock:upkeep.purge", timeout=30):
        assert (await scaleout("purge")).stdout == "purge: somebody else is at it.\n"
    unknown = await scaleout("dance")
    assert unknown.returncode == 2
    assert "sweep_directory" in unknown.stderr
