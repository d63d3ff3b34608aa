"""Redis as a dependency: down, full and misused; locks over two instances; the stream for other services."""

import asyncio
from time import perf_counter
from typing import Any
from uuid import uuid4

import pytest
from conftest import PATIENCE, until
from quiet import Servers
from redis.exceptions import ResponseError

from app.core.ids import created_at, new_id
from app.scaling import locks as room
from app.scaling.cache import PROFILE, Entry
from app.scaling.events import STREAM
from app.scaling.outbox import Message
from app.scaling.ratelimit import Policy
from app.scaling.redis_link import RedisDown
from app.wiring import Resources

pytest_plugins = ("quiet",)


async def ping(resources: Resources) -> Any:
    async with resources.redis.calling("test") as client:
        return await client.ping()


@pytest.mark.sabotage(
    path="app/scaling/redis_link.py",
    take_out="self.breaker.guard(RedisDown)",
    put="self.breaker.guard(ZeroDivisionError)",
)
async def test_a_redis_that_is_down_is_soon_not_asked_any_more_and_is_back_by_itself(
    quiet: Resources, servers: Servers
) -> None:
    async with servers.down("redis"):
        for _ in range(3):
            with pytest.raises(RedisDown):
                await ping(quiet)
        assert quiet.redis.breaker.state == "open"
        with pytest.raises(RedisDown, match="refused by the breaker"):
            await ping(quiet)
        # Every user of Redis has its own answer: the cache loads, limits are held locally, nobody fails.
        assert (await quiet.cache.put(PROFILE, "x", Entry(1, b"{}"))).body == b"{}"
        assert (await quiet.limiter.take(Policy("down", 100, 60), "x")).allowed
    assert await ping(quiet)
    assert quiet.redis.breaker.state == "closed"


async def test_a_dead_redis_costs_a_request_less_than_5_ms_after_the_first(quiet: Resources, servers: Servers) -> None:
    entry, policy = Entry(1, b"{}"), Policy("dead", 10_000, 60)

    async def load() -> Entry:
        return entry

    async def median() -> float:
        """Do all that a request asks of Redis, one after the other, after a first time that is not counted."""
        costs = []
        for _ in range(51):
            began = perf_counter()
            async with asyncio.timeout(PATIENCE):
                await quiet.cache.read(PROFILE, uuid4().hex, load)
                assert (await quiet.limiter.take(policy, "x")).allowed
                await quiet.positions.settle(await quiet.positions.mark(new_id(), 0), 1)
            costs.append(perf_counter() - began)
        # Not all, because this machine does other things too.
        return sorted(costs[1:])[25]

    alive = await median()
    async with servers.down("redis"):
        # Where the same takes longer than that of a Redis that answers, the machine is to blame.
        assert await median() < max(0.005, 2 * alive)


async def test_a_mistake_of_ours_is_raised_and_does_not_trip_the_breaker(quiet: Resources) -> None:
    await quiet.redis.client.set("text", "x")
    for _ in range(5):
        with pytest.raises(ResponseError, match="wrong kind"):
            async with quiet.redis.calling("test") as client:
                await client.hgetall("text")
    assert quiet.redis.breaker.state == "closed"


@pytest.mark.sabotage(
    path="app/scaling/redis_link.py", take_out="LockError) and not _refuses(error):", put="LockError):"
)
async def test_a_redis_that_is_full_counts_as_down_for_writes(quiet: Resources) -> None:
    client, before = quiet.redis.client, quiet.redis.breaker
    try:
        await client.config_set("maxmemory", "1")
        assert (await quiet.cache.put(PROFILE, "full", Entry(1, b"{}"))).body == b"{}"
        with pytest.raises(RedisDown):
            async with quiet.redis.calling("test"):
                await client.set("full", "x")
        assert (await quiet.limiter.take(Policy("full", 100, 60), "x")).allowed
    finally:
        await client.config_set("maxmemory", str(256 * 1024 * 1024))
    assert before.state in {"open", "closed"}

    async def back() -> bool:
        try:
            return bool(await ping(quiet))
        except RedisDown:
            return False

    await until(back)


async def test_a_caller_that_goes_away_never_leaves_its_answer_to_the_next(quiet: Resources) -> None:
    client = quiet.redis.client
    await client.mset({f"own:{number}": number for number in range(50)})

    async def own(number: int) -> bool:
        return bool(await client.get(f"own:{number}") == str(number).encode())

    for round_ in range(20):
        leaving = [asyncio.create_task(own(number)) for number in range(50)]
        for _ in range(round_):
            await asyncio.sleep(0)
        for task in leaving:
            task.cancel()
        await asyncio.wait(leaving)
        assert all(await asyncio.gather(*(own(number) for number in range(50))))


@pytest.mark.sabotage(
    path="app/scaling/locks.py",
    take_out="            if not await lock.acquire():\n                return False\n",
    put="            await lock.acquire()\n",
)
async def test_of_all_instances_one_runs_what_is_to_run_alone(quiet: Resources, other: Resources) -> None:
    name, fences, inside, leave = uuid4().hex, [], asyncio.Event(), asyncio.Event()

    async def work(fence: int) -> None:
        fences.append(fence)
        inside.set()
        await leave.wait()

    first = asyncio.create_task(quiet.locks.run_alone(name, work))
    await inside.wait()
    assert not await other.locks.run_alone(name, work)
    leave.set()
    assert await first
    assert await other.locks.run_alone(name, work)
    assert fences == [1, 2]


async def test_work_that_fails_says_so_and_frees_its_lock(quiet: Resources, other: Resources) -> None:
    name = uuid4().hex

    async def fail(_: int) -> None:
        raise ValueError("broken")

    async def succeed(_: int) -> None:
        return

    with pytest.raises(ValueError, match="broken"):
        await quiet.locks.run_alone(name, fail)
    assert await other.locks.run_alone(name, succeed)


@pytest.mark.sabotage(
    path="app/scaling/locks.py",
    take_out="            await asyncio.gather(working, renewing, return_exceptions=True)\n            with",
    put="            with",
)
async def test_a_lock_is_held_until_cancelled_work_has_ended(quiet: Resources, other: Resources) -> None:
    name, inside, cleaning, leave = uuid4().hex, asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work(_: int) -> None:
        try:
            inside.set()
            await asyncio.Event().wait()
        finally:
            cleaning.set()
            await leave.wait()

    async def nothing(_: int) -> None:
        return

    holder = asyncio.create_task(quiet.locks.run_alone(name, work))
    await inside.wait()
    holder.cancel()
    await cleaning.wait()
    assert not await other.locks.run_alone(name, nothing)
    leave.set()
    await asyncio.wait({holder})
    assert await other.locks.run_alone(name, nothing)


async def test_losing_the_lock_stops_the_work(quiet: Resources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LEASE", 0.6)
    name, inside, stopped = uuid4().hex, asyncio.Event(), asyncio.Event()

    async def work(_: int) -> None:
        inside.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    holder = asyncio.create_task(quiet.locks.run_alone(name, work))
    await inside.wait()
    await quiet.redis.client.delete(f"lock:{name}")
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(room.LockLost):
            await holder
    assert stopped.is_set()


async def test_a_message_in_the_stream_says_what_happened_to_what(quiet: Resources) -> None:
    subject = new_id()
    message = Message(subject, new_id(subject), "order.placed", subject, {"lines": 2}, "req-12345678", 1)
    await quiet.events.publish([message, message])
    entries = await quiet.redis.client.xrevrange(STREAM, count=2)
    assert [fields for _, fields in entries or ()] == [
        {
            b"schema": b"1",
            b"id": str(message.id).encode(),
            b"event": b"order.placed",
            b"at": created_at(message.id).isoformat(timespec="milliseconds").replace("+00:00", "Z").encode(),
            b"profile_id": str(subject).encode(),
            b"subject_id": str(subject).encode(),
            b"payload": b'{"lines":2}',
        }
    ] * 2
