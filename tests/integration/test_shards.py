"""Two shards: everything of a profile is on its own, and what goes over both shows each thing once, in order."""

import asyncio
import json
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import orjson
import pytest
from conftest import settings_from
from halves import HALF, Halves, on_half
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from sqlalchemy import Uuid, literal, select

from app.core.ids import LOGICAL_SHARDS, logical_shard
from app.core.settings import SettingsError
from app.scaling import outbox
from app.scaling.dialect import logical_shard_of
from app.wiring import Resources
from migrations import runner

pytest_plugins = ("halves", "quiet")

START = 1_760_000_000_000  # milliseconds since 1970; later ones sort later


async def page(instance: Resources, prefix: str, limit: int, cursor: str | None) -> dict[str, Any]:
    """Return a page as clients get it, read anew and not from the cache."""
    await instance.redis.client.flushdb()
    return orjson.loads(await instance.cache.page(instance.profiles.listed(prefix, None, limit, cursor)))


# Each a half and how many milliseconds after the one before; and how many come in while the list is read.
rows = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3)), max_size=12)


@pytest.mark.sabotage(
    path="app/domain/profiles/service.py",
    take_out="return sorted(rows, key=lambda row: row.profile_id, reverse=True)[: limit + 1]",
    put="return rows[: limit + 1]",
)
@examples(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(there=rows, late=rows, limit=st.integers(1, 5))
async def test_pages_over_two_shards_show_each_profile_once_in_order_while_others_come_in(
    halves: Halves, there: list[tuple[int, int]], late: list[tuple[int, int]], limit: int
) -> None:
    mark, moment = uuid4().hex, START
    expected = []
    for half, later in there:
        moment += later
        expected.append(on_half(half, moment))
        await halves.put(expected[-1], f"{mark} there")
    shown: list[str] = []
    cursor = None
    while True:
        answer = await page(halves.other, mark, limit, cursor)
        shown += [item["id"] for item in answer["items"]]
        cursor = answer["next_cursor"]
        if cursor is None:
            break
        assert len(answer["items"]) == limit
        if late:
            half, later = late.pop()
            moment += 1 + later
            await halves.put(on_half(half, moment), f"{mark} late")
    assert shown == [str(identifier) for identifier in sorted(expected, reverse=True)]


async def test_everything_of_a_profile_is_on_its_own_shard(halves: Halves) -> None:
    for half in (0, 1):
        profile = await halves.sign_up(half)
        await halves.one.sessions.sign_in(profile.email, "a long enough pass phrase", "browser")
        for table in ("profiles", "sessions", "outbox"):
            statement = f"SELECT 1 FROM {table} WHERE profile_id = $1"  # noqa: S608  # our own tables
            assert [len(await halves.sql(shard, statement, profile.id)) for shard in (0, 1)] == [1 - half, half], table
        assert (await halves.other.profiles.own(profile.id)).id == profile.id


async def test_relays_reconciliation_and_dead_letters_look_at_every_shard(halves: Halves) -> None:
    claimed = set()
    told = [await halves.sign_up(half) for half in (0, 1)]
    for shard in (0, 1):
        async with halves.one.database.writer_of(shard) as writer:
            messages = await outbox.claim(writer, batch=10_000, lease=timedelta(seconds=60))
            claimed |= {message.profile_id for message in messages}
            for message in messages:
                if message.profile_id in {profile.id for profile in told}:
                    await outbox.bury(writer, message, "a.task", "because")
    assert {profile.id for profile in told} <= claimed
    listed = await halves.other.dead_letters.listed(1, None)
    again = await halves.other.dead_letters.listed(1, listed.next_cursor)
    ids = [page.items[0]["id"] for page in (listed, again)]
    assert {logical_shard(identifier) // HALF for identifier in ids} == {0, 1}
    assert ids == sorted(ids, reverse=True)


async def test_the_database_reads_the_same_logical_shard_from_an_id_as_we_do(halves: Halves) -> None:
    for identifier in (on_half(0, START), on_half(1, START), UUID(int=0), UUID(int=2**128 - 1)):
        asked = select(logical_shard_of(literal(identifier, Uuid())).label("logical"))
        row = await halves.one.database.reader(newest=True).first(asked)
        assert row is not None
        assert row.logical == logical_shard(identifier)


async def test_settings_never_put_elsewhere_what_the_map_says(halves: Halves) -> None:
    one = json.dumps([{"primary": halves.urls[0], "first": 0, "last": LOGICAL_SHARDS - 1}])
    with pytest.raises(SettingsError, match="names 1 shards, but logical shards 512 to 1023 are on shard 1"):
        await asyncio.to_thread(runner.upgrade, settings_from(halves.environment | {"SHARDS": one}))
