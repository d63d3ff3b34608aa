"""Moving logical shards between two databases: what is refused where, what moves along, and that nobody is misled."""

import asyncio
from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import asyncpg
import orjson
import pytest
from conftest import until
from halves import HALF, Halves, on_half
from moving import HANDED_OVER, POINTS, arm

from app.core import context
from app.core.errors import Conflict, Unavailable
from app.core.ids import LOGICAL_SHARDS, logical_shard, new_id
from app.domain.profiles.rules import Profile
from app.domain.tables import metadata
from app.scaling import live_map, mover
from app.scaling.idempotency import Claim
from app.scaling.mover import Mover
from app.scaling.sharding import Phase, Range

pytest_plugins = ("halves", "quiet")
pytestmark = pytest.mark.postgresql("only there a range can be moved")

PASSWORD = "a long enough pass phrase"
PATIENCE = 0.2  # no read of these tests takes longer
TABLES = [table.name for table in metadata.sorted_tables if "profile_id" in table.primary_key.columns]


@pytest.fixture(autouse=True)
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every lease run out soon: both instances and the mover read the same constant."""
    monkeypatch.setattr(live_map, "LEASE", 0.3)
    monkeypatch.setattr(mover, "LEASE", 0.3)


@pytest.fixture
async def moving(halves: Halves) -> AsyncIterator[Mover]:
    """A mover; what a test has moved goes back."""
    made = Mover(halves.one.database, PATIENCE, lambda _line: None)
    yield made
    await made.move(0, HALF - 1, 0)
    await made.move(HALF, LOGICAL_SHARDS - 1, 1)


async def rows(halves: Halves, shard: int, profile_id: UUID) -> dict[str, int]:
    """Return how many rows of a profile each table of a shard holds."""
    counts = {}
    for table in TABLES:
        statement = f"SELECT count(*) AS n FROM {table} WHERE profile_id = $1"  # noqa: S608  # our own tables
        (row,) = await halves.sql(shard, statement, profile_id)
        counts[table] = row["n"]
    return counts


async def test_the_fence_stands_around_every_table_of_a_shard(halves: Halves) -> None:
    for shard in (0, 1):
        fenced = await halves.sql(
            shard,
            "SELECT tgrelid::regclass::text AS name FROM pg_trigger WHERE tgname = 'fence_shard' AND tgenabled = 'O'",
        )
        assert {row["name"] for row in fenced} == set(TABLES)


@pytest.mark.sabotage(
    path="migrations/fence.py",
    take_out="RAISE EXCEPTION 'logical shard % is not written here', here USING ERRCODE = 'SH001';",
    put="NULL;",
)
async def test_a_write_with_an_old_map_is_refused_and_the_next_one_goes_where_it_belongs(
    halves: Halves, moving: Mover, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = await halves.sign_up(0)
    here = logical_shard(profile.id)
    old = await halves.other.database.map.now()
    with monkeypatch.context() as asleep:
        # An instance that stood still for longer than any lease, and believes what it knew.
        asleep.setattr(halves.other.database.map, "_ask", _nobody)
        await moving.move(here, here, 1)
        assert halves.other.database.map.latest is old
        with pytest.raises(Unavailable) as refused:
            await halves.put(new_id(profile.id), "Astray", halves.other)
        assert refused.value.code == "shard_moving"
    changed = await halves.other.profiles.change(profile.id, 1, {"bio": "at home"})
    assert changed.bio == "at home"
    assert (await rows(halves, 0, profile.id))["profiles"] == 0
    assert (await rows(halves, 1, profile.id))["profiles"] == 1


async def test_everything_of_a_profile_moves_along_and_nothing_of_others(halves: Halves, moving: Mover) -> None:
    profile, neighbour = await halves.sign_up(1), await halves.sign_up(1)
    while logical_shard(neighbour.id) == logical_shard(profile.id):
        neighbour = await halves.sign_up(1)
    signed_in = await halves.one.sessions.sign_in(profile.email, PASSWORD, "browser")
    claim = Claim.of(profile.id, "test", "key", {})
    assert await claim.take(halves.one.database, {"answer": 42}) is None
    before, there = await rows(halves, 1, profile.id), await rows(halves, 1, neighbour.id)
    assert min(before[name] for name in ("profiles", "sessions", "outbox", "idempotency_keys")) >= 1
    here = logical_shard(profile.id)
    assert await moving.move(here, here, 0) == 1
    assert await rows(halves, 0, profile.id) == before
    assert set((await rows(halves, 1, profile.id)).values()) == {0}
    assert await rows(halves, 1, neighbour.id) == there
    assert await claim.take(halves.other.database, {"answer": 43}) == {"answer": 42}
    await halves.one.redis.client.flushdb()
    found = await halves.other.sessions.find(signed_in.token)
    assert found is not None
    assert found.profile_id == profile.id
    assert (await halves.other.directory.find(profile.email)) == profile.id


@pytest.mark.sabotage(
    path="app/scaling/mover.py",
    take_out="        while await self._catch_up(ends):\n",
    put="        while False:\n",
)
@pytest.mark.sabotage(
    path="migrations/fence.py",
    take_out="      INSERT INTO shard_changes (profile_id) VALUES (owner);\n",
    put="      NULL;\n",
)
async def test_writers_on_two_instances_lose_nothing_while_their_shard_goes_to_and_fro(
    halves: Halves, moving: Mover, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mover.GRACE + mover.HOLD < live_map.LONGEST_HOLD
    # On a busy machine all of it takes longer, and that is not what is asked: neither reads nor writes that are under
    # way are overtaken, no hold runs out, and who waits for one waits longer than it lasts.
    monkeypatch.setattr(moving, "_patience", 10 * PATIENCE)
    monkeypatch.setattr(mover, "GRACE", 0.5)
    monkeypatch.setattr(mover, "HOLD", 20.0)
    monkeypatch.setattr(live_map, "LONGEST_HOLD", 40.0)
    people = [await halves.sign_up(0) for _ in range(4)]
    longest = 0.0
    done = asyncio.Event()

    async def write(profile: Profile, number: int) -> tuple[UUID, int]:
        nonlocal longest
        instances = (halves.one, halves.other)
        version, loop = 1, asyncio.get_running_loop()
        with context.working(context.Work(request_id=context.new_request_id(), profile_id=profile.id)):
            while not done.is_set():
                began = loop.time()
                changed = await instances[(version + number) % 2].profiles.change(
                    profile.id, version, {"bio": str(version)}
                )
                longest = max(longest, loop.time() - began)
                version = changed.version
                seen = await instances[(version + number + 1) % 2].profiles.own(profile.id)
                assert (seen.version, seen.bio) == (version, str(version - 1))
        return profile.id, version

    writing = [asyncio.create_task(write(profile, number)) for number, profile in enumerate(people)]
    try:
        for target in (1, 0, 1):
            await moving.move(0, HALF - 1, target)
    finally:
        done.set()
        versions = dict(await asyncio.gather(*writing))
    for profile in people:
        there = await halves.sql(1, "SELECT version, bio FROM profiles WHERE profile_id = $1", profile.id)
        assert [(row["version"], row["bio"]) for row in there] == [
            (versions[profile.id], str(versions[profile.id] - 1))
        ]
        (told,) = await halves.sql(1, "SELECT count(*) AS n FROM outbox WHERE profile_id = $1", profile.id)
        assert told["n"] == versions[profile.id]
        assert set((await rows(halves, 0, profile.id)).values()) == {0}
    assert longest < live_map.LONGEST_HOLD


class Died(BaseException):
    """Stands in for the end of the mover's process, which no handler sees either."""


@pytest.mark.sabotage(
    path="app/scaling/mover.py",
    take_out="        while await self._catch_up(ends):\n",
    put="        while False:\n",
)
async def test_a_mover_that_dies_at_any_point_goes_on_where_it_was_and_nothing_is_lost(
    halves: Halves, moving: Mover, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = await halves.sign_up(0)
    version = 1
    for wanted in POINTS:

        def die(point: str, wanted: str = wanted) -> None:
            if point == wanted:
                raise Died

        with monkeypatch.context() as armed:
            arm(die, armed.setattr)
            with pytest.raises(Died):
                await moving.move(0, HALF - 1, 1)
        if wanted == HANDED_OVER:
            with pytest.raises(Unavailable):
                await halves.other.profiles.change(profile.id, version, {"bio": "nobody takes it"})
        else:
            changed = await halves.other.profiles.change(profile.id, version, {"bio": f"while {wanted}"})
            version = changed.version
        assert (await halves.one.profiles.own(profile.id)).version == version
    await moving.move(0, HALF - 1, 1)
    assert (await halves.other.profiles.own(profile.id)).version == version
    assert (await rows(halves, 1, profile.id))["outbox"] == version
    assert set((await rows(halves, 0, profile.id)).values()) == {0}


@pytest.mark.sabotage(
    path="app/scaling/database/shard.py", take_out="    if places.move is None:\n", put="    if places:\n"
)
async def test_lists_show_each_profile_once_in_every_phase_of_a_move(
    halves: Halves, monkeypatch: pytest.MonkeyPatch, moving: Mover
) -> None:
    mark = uuid4().hex
    there = [on_half(half, 1_760_000_000_000 + number) for number, half in enumerate((0, 1, 0, 1, 0))]
    for identifier in there:
        await halves.put(identifier, mark)
    expected = [str(identifier) for identifier in reversed(there)]
    seen: dict[Phase, list[str]] = {}
    publish = Mover._publish

    async def look_first(self: Mover, catalog: asyncpg.Connection, places: mover.ShardMap) -> mover.ShardMap:
        phase = (await halves.one.database.map.now()).move
        shown: list[str] = []
        cursor = None
        while True:
            await halves.one.redis.client.flushdb()
            page = orjson.loads(await halves.other.cache.page(halves.other.profiles.listed(mark, None, 2, cursor)))
            shown += [item["id"] for item in page["items"]]
            cursor = page["next_cursor"]
            if cursor is None:
                break
        if phase is not None:
            seen[phase.phase] = shown
        return await publish(self, catalog, places)

    monkeypatch.setattr(Mover, "_publish", look_first)
    await moving.move(0, HALF - 1, 1)
    assert seen == dict.fromkeys(Phase, expected)


async def test_a_hold_that_runs_out_changes_nothing_and_writes_go_on(
    halves: Halves, moving: Mover, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = await halves.sign_up(0)
    here = logical_shard(profile.id)
    monkeypatch.setattr(mover, "HOLD", 0.0)
    monkeypatch.setattr(mover, "TRY_AGAIN", 0.0)
    with pytest.raises(Unavailable, match="run this again later"):
        await moving.move(here, here, 1)
    assert (await halves.other.profiles.change(profile.id, 1, {"bio": "still here"})).version == 2
    assert (await rows(halves, 0, profile.id))["profiles"] == 1
    monkeypatch.undo()
    monkeypatch.setattr(mover, "LEASE", 0.3)
    await moving.move(here, here, 1)
    assert (await halves.other.profiles.own(profile.id)).bio == "still here"


async def test_two_movers_never_work_at_once_and_a_shard_that_is_not_there_is_refused(
    halves: Halves, moving: Mover
) -> None:
    held = await asyncpg.connect(halves.urls[0])
    try:
        await held.execute("SELECT pg_advisory_lock($1)", mover.LOCK)
        with pytest.raises(Conflict, match="Another"):
            await moving.move(0, 0, 1)
    finally:
        await held.close()
    with pytest.raises(Conflict, match="There is no shard 2; SHARDS names 2"):
        await moving.move(0, 0, 2)

    async def free() -> bool:
        return await moving.move(0, 0, 0) == 0

    await until(free)
    assert Range(0, HALF - 1, 0) in (await halves.one.database.map.now()).ranges


async def _nobody(_began: float) -> None:
    return None
