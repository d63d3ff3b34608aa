"""Pulses and the census of them, on a Redis database of its own: who is there, who is gone, and what it costs."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest
from apart import REDIS_DATABASE
from conftest import until
from engines import elsewhere

from app.api.metrics import meters_of
from app.core import wire
from app.core.ids import new_id
from app.core.settings import Settings
from app.scaling.census import Census
from app.scaling.events import STREAM
from app.scaling.outbox import Message
from app.scaling.pulse import GONE_AFTER, MOST_VALUES, PULSES, Pulse, figures
from app.wiring import Resources, open_resources

NOBODY = "redis://127.0.0.1:1/0"  # nothing listens on port 1
OTHER_DATABASE = str(REDIS_DATABASE + 1)


class Counting(Census):
    """A census that counts how often it is taken."""

    taken = 0

    async def take(self) -> dict[str, Any]:
        """Count, and take it."""
        self.taken += 1
        return await super().take()


@pytest.fixture
async def here(settings: Settings) -> AsyncIterator[Resources]:
    """Resources on a Redis database that nobody else uses."""
    url = elsewhere(settings.redis.url.get_secret_value(), OTHER_DATABASE)
    redis = settings.redis.model_copy(update={"url": type(settings.redis.url)(url)})
    async with open_resources(settings.model_copy(update={"redis": redis})) as resources:
        yield resources
        await resources.redis.client.flushdb()


@pytest.fixture
async def census(here: Resources) -> AsyncIterator[Census]:
    made = Census(here.pipe, pulse(here, "watcher").view)
    yield made
    await made.stop()


def pulse(resources: Resources, name: str) -> Pulse:
    """Return the pulse of a process of that name."""
    service = resources.settings.service.model_copy(update={"instance": name})
    return Pulse("api", service, resources.pipe, resources.database, resources.lifecycle)


async def found(census: Census, name: str, true: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Take the census until something is true of a process, and return what is told of it."""

    async def look() -> dict[str, Any] | None:
        told = {each["name"]: each for each in (await census.take())["processes"]}
        return told[name] if name in told and true(told[name]) else None

    return await until(look)


@pytest.mark.sabotage("app/scaling/census.py", '"gone": age > GONE_AFTER})', '"gone": False})')
async def test_a_process_that_tells_no_more_is_gone_and_one_that_leaves_is_forgotten(
    here: Resources, census: Census
) -> None:
    async with pulse(here, "leaver").beating():
        dying = asyncio.create_task(pulse(here, "victim")._beat())
        try:
            assert (await found(census, "victim", lambda told: not told["gone"]))["age"] <= GONE_AFTER
            assert await found(census, "leaver", lambda told: not told["gone"])
        finally:
            dying.cancel()  # as if it were killed: it says nothing of it
        assert (await found(census, "victim", lambda told: told["gone"]))["age"] > GONE_AFTER
        assert await found(census, "leaver", lambda told: not told["gone"]), "who goes on telling is there"
    assert "leaver" not in {told["name"] for told in (await census.take())["processes"]}


@pytest.mark.sabotage(
    "app/scaling/census.py", "    redis.call('HDEL', KEYS[1], found[i])\n", "    kept[1] = found[i + 1]\n"
)
async def test_who_is_long_silent_is_forgotten(here: Resources, census: Census) -> None:
    old = b"1000000000000 " + wire.encode(pulse(here, "ancient").view())
    await here.redis.client.hset(PULSES, "ancient/1", old)
    assert (await census.take())["processes"] == []
    assert await here.redis.client.hlen(PULSES) == 0


@pytest.mark.sabotage(
    "app/scaling/census.py",
    "            with suppress(ValueError):  # of a release",
    "            if True:  # of a release",
)
async def test_a_pulse_that_another_release_tells_in_another_way_does_no_harm(here: Resources, census: Census) -> None:
    seconds, _ = await here.redis.client.time()
    await here.redis.client.hset(PULSES, "newer/1", f"{seconds}000 not JSON at all")
    async with pulse(here, "usual").beating():
        assert await found(census, "usual", lambda told: not told["gone"])


@pytest.mark.sabotage(
    "app/scaling/census.py",
    "if self._working is None or self._working.done():",
    "if self._watchers:",
)
async def test_many_who_watch_cost_one_census_and_nobody_costs_none(here: Resources) -> None:
    census = Counting(here.pipe, pulse(here, "watcher").view)
    try:
        async with aclosing(census.follow()) as first, aclosing(census.follow()) as second:
            seen = [await asyncio.gather(anext(first), anext(second)) for _ in range(3)]
            assert all(one is other for one, other in seen)
            assert census.taken == 3

        async def at_rest() -> bool:
            return not census.watched

        assert await until(at_rest)
    finally:
        await census.stop()


@pytest.mark.sabotage(
    "app/scaling/census.py", "                    self._tell(self.alone())", "                    pass"
)
async def test_without_redis_it_shows_what_the_process_knows_by_itself(settings: Settings) -> None:
    redis = settings.redis.model_copy(update={"url": type(settings.redis.url)(NOBODY)})
    async with open_resources(settings.model_copy(update={"redis": redis})) as resources:
        census = Census(resources.pipe, pulse(resources, "alone").view)
        try:
            async with asyncio.timeout(10), aclosing(census.follow()) as following:
                told = wire.decode(await anext(following))
        finally:
            await census.stop()
    assert told["redis"] is None
    assert [each["name"] for each in told["processes"]] == ["alone"]
    assert [node["answers"] for node in told["processes"][0]["shards"][0]["nodes"]].count(True) >= 1


@pytest.mark.sabotage("app/scaling/census.py", 'f"({self._happened[-1].id}"', '"-"')
async def test_events_are_counted_once_in_their_window_and_the_newest_are_told(here: Resources, census: Census) -> None:
    subjects = [new_id() for _ in range(3)]

    async def happen(event: str, subject: Any) -> None:
        message = Message(subject, new_id(), event, subject, {"version": 1}, "-", 1)
        await here.events.publish([message])

    await happen("order.placed", subjects[0])
    await happen("order.placed", subjects[1])
    first = await census.take()
    assert first["counts"] == {"order.placed": 2}
    assert [event["subject"] for event in first["events"]] == [str(subject)[-6:] for subject in subjects[:2]]
    await happen("order.confirmed", subjects[0])
    await happen("profile.created", subjects[2])
    second = await census.take()
    assert second["counts"] == {"order.placed": 2, "order.confirmed": 1, "profile.created": 1}
    assert [event["event"] for event in second["events"]][2:] == ["order.confirmed", "profile.created"]
    assert set(second["events"][0]) == {"id", "at", "event", "subject"}


@pytest.mark.sabotage("app/scaling/census.py", "now - WINDOW_SECONDS * 1000", "0")
async def test_events_that_are_older_than_the_window_no_longer_count(here: Resources, census: Census) -> None:
    seconds, _ = await here.redis.client.time()
    fields = {"event": "order.placed", "subject_id": str(new_id())}
    await here.redis.client.xadd(STREAM, fields, id=f"{(seconds - 400) * 1000}-0")
    await here.redis.client.xadd(STREAM, fields, id=f"{(seconds - 200) * 1000}-0")
    assert (await census.take())["counts"] == {"order.placed": 1}


def test_a_pulse_is_small_and_costs_little(resources: Resources) -> None:
    for template in range(30):
        for status in (2, 4):
            meters_of(f"/pulse/{template}", "GET", status).record(0.001, 0, 0)
    own = pulse(resources, "any")
    assert all(len(values) <= MOST_VALUES for values in figures().values())
    assert len(wire.encode(own.view())) < 4000
    begun = time.process_time()
    for _ in range(50):
        wire.encode(own.view())
    assert (time.process_time() - begun) / 50 < 0.005
