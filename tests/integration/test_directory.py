"""Addresses stay unique over shards, and a sign-up that comes to nothing, wherever it is cut off, leaves none taken."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from halves import HALF, Halves

from app.core.errors import Conflict, Unavailable
from app.core.ids import logical_shard, new_id
from app.domain.profiles import directory, service
from app.domain.profiles.rules import NewProfile, Profile
from app.scaling.database import Database

pytest_plugins = ("halves", "quiet")

PASSWORD = "a long enough pass phrase"


@pytest.fixture
def new() -> NewProfile:
    return NewProfile(f"{uuid4().hex}@example.com", PASSWORD, "Somebody")


async def rows_of(halves: Halves, new: NewProfile) -> list[UUID]:
    """Return the profiles with the address, over both shards."""
    found = [await halves.sql(shard, "SELECT profile_id FROM profiles WHERE email = $1", new.email) for shard in (0, 1)]
    return [row["profile_id"] for rows in found for row in rows]


async def age(halves: Halves, profile_id: UUID) -> None:
    """Let the time pass after which a sign-up is given up."""
    statement = "UPDATE email_directory SET reserved_at = $1 WHERE profile_id = $2"
    await halves.sql(0, statement, datetime.now(UTC) - directory.ABANDONED_AFTER * 2, profile_id)


async def test_of_many_sign_ups_of_one_address_on_two_instances_and_shards_one_wins_and_leaves_nothing_of_the_others(
    halves: Halves, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = NewProfile(f"{uuid4().hex}@example.com", PASSWORD, "Twin")
    shards = iter((0, 1) * 3)

    def spread() -> UUID:
        half = next(shards)
        while True:
            identifier = new_id()
            if logical_shard(identifier) // HALF == half:
                return identifier

    monkeypatch.setattr(service, "new_id", spread)
    outcomes = await asyncio.gather(
        *(instance.profiles.sign_up(new) for instance in (halves.one, halves.other) for _ in range(3)),
        return_exceptions=True,
    )
    (winner,) = [outcome for outcome in outcomes if isinstance(outcome, Profile)]
    assert [outcome.code for outcome in outcomes if isinstance(outcome, Conflict)] == ["email_taken"] * 5
    assert await rows_of(halves, new) == [winner.id] == [await halves.one.directory.find(new.email)]


@pytest.mark.sabotage(
    path="app/domain/profiles/service.py", take_out="if writer is None or writer.position == 0:", put="if False:"
)
async def test_a_sign_up_that_fails_for_certain_gives_the_address_back_at_once(
    halves: Halves, new: NewProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Database.writer

    @asynccontextmanager
    async def no_profiles(self: Database, profile_id: UUID | None = None) -> AsyncIterator[Any]:
        if profile_id is not None:
            raise Unavailable("The primary is down.", code="database_down")
        async with original(self) as writer:
            yield writer

    with monkeypatch.context() as down:
        down.setattr(Database, "writer", no_profiles)
        with pytest.raises(Unavailable):
            await halves.one.profiles.sign_up(new)
    profile = await halves.other.profiles.sign_up(new)
    assert await rows_of(halves, new) == [profile.id]


@pytest.mark.sabotage(
    path="app/domain/profiles/directory.py",
    take_out="            await self._settled(key) and await self._insert(key, profile_id)",
    put="            False",
)
async def test_the_address_of_a_sign_up_that_died_is_taken_over_and_of_one_that_lives_it_is_not(
    halves: Halves, new: NewProfile
) -> None:
    dead = new_id()
    await halves.one.directory.reserve(new.email, dead)  # and then its process dies
    with pytest.raises(Conflict):
        await halves.other.profiles.sign_up(new)
    await age(halves, dead)
    profile = await halves.other.profiles.sign_up(new)
    assert await rows_of(halves, new) == [profile.id]


@pytest.mark.sabotage(
    path="app/domain/profiles/service.py", take_out="            kept = True  #", put="            raise  #"
)
async def test_a_sign_up_that_cannot_confirm_has_its_profile_and_nobody_takes_its_address(
    halves: Halves, new: NewProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def down(_email: str, _profile_id: UUID) -> bool:
        raise Unavailable("The catalog is down.", code="database_down")

    with monkeypatch.context() as patched:
        patched.setattr(halves.one.directory, "confirm", down)
        profile = await halves.one.profiles.sign_up(new)
    await age(halves, profile.id)
    with pytest.raises(Conflict):
        await halves.other.profiles.sign_up(new)
    (row,) = await halves.sql(0, "SELECT confirmed FROM email_directory WHERE profile_id = $1", profile.id)
    assert row["confirmed"] == 1


@pytest.mark.sabotage(
    path="app/domain/profiles/service.py", take_out="        if not kept:\n", put="        if False:\n"
)
async def test_a_sign_up_that_stood_still_while_its_address_went_to_another_takes_its_profile_back(
    halves: Halves, new: NewProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = halves.one.directory.confirm
    faster: list[Profile] = []

    async def slow(email: str, profile_id: UUID) -> bool:
        # The profile does not show yet: as if it came to its shard only now.
        await halves.sql(
            logical_shard(profile_id) // HALF, "UPDATE profiles SET erased_at = now() WHERE profile_id = $1", profile_id
        )
        await age(halves, profile_id)
        faster.append(await halves.other.profiles.sign_up(new))
        await halves.sql(
            logical_shard(profile_id) // HALF, "UPDATE profiles SET erased_at = NULL WHERE profile_id = $1", profile_id
        )
        return await original(email, profile_id)

    monkeypatch.setattr(halves.one.directory, "confirm", slow)
    with pytest.raises(Conflict):
        await halves.one.profiles.sign_up(new)
    assert await rows_of(halves, new) == [faster[0].id] == [await halves.one.directory.find(new.email)]
