"""What was written for a profile is seen by it on every instance, whoever wrote it, and never goes back."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import pytest
from quiet import REPLICAS, Servers, stranger
from sqlalchemy import select, update
from sqlalchemy.engine.default import DefaultDialect

from app.core import context
from app.core.errors import Conflict, Unavailable
from app.core.ids import new_id
from app.domain.profiles.rules import NewProfile, Profile
from app.domain.profiles.tables import profiles
from app.domain.sessions.rules import SignedIn
from app.scaling import positions as room
from app.scaling.cache import PROFILE
from app.wiring import Resources

pytest_plugins = ("quiet",)

PASSWORD = "a long enough pass phrase"
READS = 20


@pytest.fixture
async def signed_in(quiet: Resources, servers: Servers) -> SignedIn:
    """Somebody whose replicas know them and who has written nothing since."""
    email = f"{uuid4().hex}@example.com"
    with context.working(stranger()):
        await quiet.profiles.sign_up(NewProfile(email=email, password=PASSWORD, name="before"))
        session = await quiet.sessions.sign_in(email, PASSWORD, "")
    async with servers.paused():
        pass
    await quiet.redis.client.delete(f"positions:{{{session.session.profile_id}}}")
    return session


@asynccontextmanager
async def request(instance: Resources, signed_in: SignedIn) -> AsyncIterator[context.Work]:
    """A request of theirs to an instance."""
    with context.working(stranger()) as work:
        assert await instance.sessions.find(signed_in.token)
        work.profile_id = signed_in.session.profile_id
        yield work


async def name_seen(instance: Resources, signed_in: SignedIn) -> tuple[str, str]:
    """Return the name that a request of theirs reads, and the node that it read from."""
    async with request(instance, signed_in) as work:
        found: Profile = await instance.profiles.own(signed_in.session.profile_id)
        return found.name, work.spans["db"].description


async def public_name(instance: Resources, signed_in: SignedIn) -> str:
    """Return the name in their public view as a request of theirs is shown it."""
    async with request(instance, signed_in):
        entry = await instance.profiles.public(signed_in.session.profile_id)
        return str(json.loads(entry.body or b"{}")["name"])


async def rename(instance: Resources, profile_id: UUID, inside: Any = None) -> None:
    """Write for the profile as a worker does, which is not the profile's own work."""
    with context.working(stranger()):
        async with instance.database.writer(profile_id) as writer:
            await writer.run(update(profiles).where(profiles.c.profile_id == profile_id).values(name="after"))
            if inside is not None:
                await inside()


@pytest.mark.sabotage(  # any replica
    path="app/scaling/replicas.py",
    take_out="if replica.healthy and replica.position >= position and replica not in besides",
    put="if replica.healthy and replica not in besides",
)
@pytest.mark.sabotage(
    path="app/scaling/database/__init__.py",
    take_out="        reading = profile_id or context.current().profile_id",
    put="        reading = context.current().profile_id",
)
async def test_what_a_worker_wrote_for_me_never_goes_back(
    quiet: Resources, other: Resources, servers: Servers, signed_in: SignedIn
) -> None:
    async with servers.paused("replica-1"):
        await rename(quiet, signed_in.session.profile_id)
        seen = {await name_seen(instance, signed_in) for instance in (quiet, other) for _ in range(READS)}
        assert {name for name, _ in seen} == {"after"}
        assert "replica-1" not in {node for _, node in seen}
    seen = {await name_seen(instance, signed_in) for instance in (quiet, other) for _ in range(READS)}
    assert seen == {("after", node) for node in REPLICAS}


@pytest.mark.sabotage(
    path="app/scaling/positions.py",
    take_out="                work.unsettled.add(int(shard))",
    put="                pass",
)
async def test_between_a_commit_and_its_position_nobody_sees_it_and_then_misses_it(
    quiet: Resources, other: Resources, servers: Servers, signed_in: SignedIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed, told = asyncio.Event(), asyncio.Event()
    real = quiet.database._positions.settle

    async def late(mark: room.Mark, position: int) -> None:
        committed.set()
        await told.wait()
        await real(mark, position)

    monkeypatch.setattr(quiet.database._positions, "settle", late)
    async with servers.paused("replica-1"):
        writing = asyncio.create_task(rename(quiet, signed_in.session.profile_id))
        await committed.wait()
        assert {await name_seen(other, signed_in) for _ in range(READS)} == {("after", "primary")}
        told.set()
        await writing
        assert {name for name, _ in [await name_seen(other, signed_in) for _ in range(READS)]} == {"after"}


async def test_what_is_rolled_back_leaves_the_reads_on_the_replicas(
    quiet: Resources, servers: Servers, signed_in: SignedIn
) -> None:
    async def refuse() -> None:
        raise Conflict("no")

    async with servers.paused(*REPLICAS):
        with pytest.raises(Conflict):
            await rename(quiet, signed_in.session.profile_id, refuse)
        async with request(quiet, signed_in) as work:
            assert (work.positions.get(0, 0), work.unsettled) == (0, set())
        assert {node for _, node in [await name_seen(quiet, signed_in) for _ in range(READS)]} == set(REPLICAS)


@pytest.mark.sabotage(
    path="app/domain/profiles/service.py",
    take_out="if work.changing and work.profile_id == profile_id:",
    put="if False:",
)
@pytest.mark.sabotage("app/scaling/database/__init__.py", "await opened.show()", "pass")
async def test_what_i_have_seen_of_my_profile_its_public_view_does_not_undo(
    quiet: Resources, other: Resources, servers: Servers, signed_in: SignedIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile_id = signed_in.session.profile_id
    assert await public_name(other, signed_in) == "before"
    real = quiet.cache.put
    committed, told = asyncio.Event(), asyncio.Event()

    async def late(*told_of: Any) -> Any:
        committed.set()
        await told.wait()
        return await real(*told_of)

    async def change() -> None:
        async with request(quiet, signed_in):
            await quiet.profiles.change(profile_id, 1, {"name": "after"})

    monkeypatch.setattr(quiet.cache, "put", late)
    async with servers.paused("replica-1"):
        writing = asyncio.create_task(change())
        await committed.wait()
        assert await name_seen(other, signed_in) == ("after", "primary")
        assert await public_name(other, signed_in) == "after"
        told.set()
        await writing
        assert {await public_name(instance, signed_in) for instance in (quiet, other)} == {"after"}


@pytest.mark.sabotage("app/scaling/positions.py", "int(until) + STALE_SECONDS * 1000 > now", "int(until) > now")
@pytest.mark.sabotage(
    path="app/scaling/database/writer.py",
    take_out="position, self.position = self.position, NEWEST",
    put="position = self.position",
)
@pytest.mark.parametrize("learns", [True, False], ids=["dies before it tells", "never learns of its commit"])
async def test_a_change_that_the_cache_is_not_told_of_never_has_me_see_the_old_profile_again(
    quiet: Resources,
    other: Resources,
    servers: Servers,
    signed_in: SignedIn,
    monkeypatch: pytest.MonkeyPatch,
    *,
    learns: bool,
) -> None:
    profile_id = signed_in.session.profile_id
    assert await public_name(other, signed_in) == "before"
    commit = DefaultDialect.do_commit

    async def dies(*_: Any) -> None:
        raise asyncio.CancelledError

    def loses_the_answer(self: DefaultDialect, connection: Any) -> None:
        commit(self, connection)
        raise ConnectionResetError

    async def public_on_both() -> set[str]:
        return {await public_name(instance, signed_in) for instance in (quiet, other)}

    async with request(quiet, signed_in):
        with monkeypatch.context() as patched:
            if learns:
                patched.setattr(quiet.cache, "put", dies)
            else:
                patched.setattr(DefaultDialect, "do_commit", loses_the_answer)
            with pytest.raises(asyncio.CancelledError if learns else Unavailable):
                await quiet.profiles.change(profile_id, 1, {"name": "after"})
    # What everybody else is shown until a worker tells the cache.
    held = await quiet.redis.client.get(quiet.cache.names_of(PROFILE, str(profile_id))[0])
    assert b"before" in held
    assert await public_on_both() == {"after"}
    # Nor once the replicas are trusted again, as long as the old value can be there.
    async with servers.paused():
        pass
    await quiet.redis.client.set(quiet.cache.names_of(PROFILE, str(profile_id))[0], held, ex=60)
    now, settled = room.time(), quiet.settings.database.replica_max_lag + room.MARK_SECONDS + 1
    monkeypatch.setattr(room, "time", lambda: now + settled)
    assert {name for name, _ in [await name_seen(quiet, signed_in) for _ in range(READS)]} == {"after"}
    assert await public_on_both() == {"after"}


async def test_a_writer_that_died_keeps_its_profile_on_the_primary_until_no_replica_can_lack_the_commit(
    quiet: Resources, signed_in: SignedIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    await quiet.database._positions.mark(signed_in.session.profile_id, 0)
    assert {await name_seen(quiet, signed_in) for _ in range(READS)} == {("before", "primary")}
    now = room.time()
    lag = quiet.settings.database.replica_max_lag
    monkeypatch.setattr(room, "time", lambda: now + lag)
    assert {node for _, node in [await name_seen(quiet, signed_in) for _ in range(READS)]} == {"primary"}
    monkeypatch.setattr(room, "time", lambda: now + lag + room.MARK_SECONDS + 1)
    assert {node for _, node in [await name_seen(quiet, signed_in) for _ in range(READS)]} == set(REPLICAS)


@pytest.mark.sabotage(
    path="app/scaling/positions.py", take_out="if tonumber(ARGV[2]) > tonumber(", put="if 0 <= tonumber("
)
async def test_a_position_is_never_lowered(quiet: Resources) -> None:
    kept = quiet.database._positions
    profile_id = new_id()
    for shard, position in ((0, 50), (1, 7), (0, 40), (1, 9)):
        await kept.settle(await kept.mark(profile_id, shard), position)
    answer = await quiet.pipe.ask(room.name_of(profile_id), "HGETALL", room.name_of(profile_id))
    with context.working(stranger()) as work:
        kept.heed(answer)
        assert (work.positions, work.unsettled) == ({0: 50, 1: 9}, set())


async def test_nobody_elses_reads_move_to_the_primary(quiet: Resources, servers: Servers, signed_in: SignedIn) -> None:
    async with servers.paused(*REPLICAS):
        await rename(quiet, signed_in.session.profile_id)
        assert await name_seen(quiet, signed_in) == ("after", "primary")
        nodes = set()
        for _ in range(READS):
            with context.working(stranger()) as work:
                await quiet.database.reader().first(select(profiles.c.name).limit(1))
                nodes.add(work.spans["db"].description)
        assert nodes == set(REPLICAS)
