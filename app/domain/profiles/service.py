"""The use cases of profiles. Public views come from the cache; every write goes through it."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Row, bindparam, insert, or_, select, update

from app.core import context, wire
from app.core.errors import NotFound, PreconditionFailed, Unavailable
from app.core.ids import new_id
from app.core.telemetry import BUSINESS_EVENTS
from app.domain.profiles.directory import Directory, taken
from app.domain.profiles.passwords import Passwords
from app.domain.profiles.rules import MEMBER, TIERS, Location, NewProfile, Profile, PublicProfile, normalise_email
from app.domain.profiles.tables import profiles
from app.scaling import outbox
from app.scaling.cache import ABSENT, LIST, PROFILE, Cache, Entry, Listing, Load
from app.scaling.database import Database, Writer
from app.scaling.dialect import begins_with, json_has
from app.scaling.lookup import Lookup
from app.scaling.paging import Cursors

GENERATION = "profiles"
STALE = "The profile has changed since you read it; read it again, then change it."
# What the public view shows.
_PUBLIC = [
    profiles.c[name]
    for name in ("profile_id", "name", "bio", "tier", "avatar_key", "version", "created_at", "updated_at")
]
_PUBLIC_BY_ID = Lookup(
    select(*_PUBLIC).where(profiles.c.profile_id == bindparam("profile_id"), profiles.c.erased_at.is_(None))
)


class Profiles:
    """Profiles over all shards.

    Args:
        database: where they are.
        directory: which address is whose.
        cache: holds public views and list pages.
        cursors: makes the cursors of lists.
        passwords: hashes at sign-up.
    """

    def __init__(
        self, database: Database, directory: Directory, cache: Cache, cursors: Cursors, passwords: Passwords
    ) -> None:
        self._database = database
        self._directory = directory
        self._cache = cache
        self._cursors = cursors
        self._passwords = passwords
        cache.loads(PROFILE, self._loader)

    async def verify(self, email: str, password: str) -> Profile | None:
        """Return the profile that this address and password open, or None; both take as long.

        Raises:
            Unavailable: if hashing is at its bound.
        """
        profile_id = await self._directory.find(email)
        row = (
            None
            if profile_id is None
            else await self._database.reader(profile_id, newest=True).first(_by_id(profile_id))
        )
        known = await self._passwords.matches(None if row is None else row.password_hash, password)
        return _profile(row) if known else None

    async def sign_up(self, new: NewProfile) -> Profile:
        """Create a profile.

        Raises:
            Conflict: `email_taken`.
            Unavailable: if hashing is at its bound, or the database takes no writes.
        """
        password_hash = await self._passwords.hash(new.password)
        now = datetime.now(UTC)
        profile = Profile(
            id=new_id(),
            email=normalise_email(new.email),
            name=new.name,
            bio=new.bio,
            tier=TIERS[0],
            role=MEMBER,
            location=new.location,
            attributes=new.attributes or {},
            avatar_url=None,
            version=1,
            created_at=now,
            updated_at=now,
        )
        await self._directory.reserve(profile.email, profile.id)
        writer: Writer | None = None
        try:
            async with self._database.writer(profile.id) as writer:
                await writer.run(insert(profiles).values(**_columns(profile), password_hash=password_hash))
                await _tell(writer, "profile.created", profile.id, profile.version)
        finally:
            # Nothing has committed, for certain. Where that is not known the directory finds out later.
            if writer is None or writer.position == 0:
                with suppress(Unavailable):
                    await self._directory.release(profile.email, profile.id)
        try:
            kept = await self._directory.confirm(profile.email, profile.id)
        except Unavailable:
            kept = True  # the profile exists, so whoever looks at the reservation next confirms it
        if not kept:
            await self.erase(profile.id, profile.version)
            raise taken()
        await self._written(profile, writer.shard)
        BUSINESS_EVENTS.labels("sign_up", "created").inc()
        return profile

    async def public(self, profile_id: UUID) -> Entry:
        """Return the public view as JSON bytes with its version; no body for an unknown or erased profile.

        To the person themselves it never shows less than `own` has.
        """
        work = context.current()
        if work.changing and work.profile_id == profile_id:
            return await self._cache.read_past(PROFILE, str(profile_id))
        return await self._cache.read(PROFILE, str(profile_id), self._loader(str(profile_id)))

    async def refresh(self, profile_id: UUID) -> None:
        """Have the cache show the profile as it is, whatever it was told of it before.

        Raises:
            RedisDown: if it cannot be told.
        """
        row = await self._database.reader(profile_id, newest=True).first(
            select(profiles).where(profiles.c.profile_id == profile_id)
        )
        if row is not None:
            entry = _entry(_profile(row)) if row.erased_at is None else Entry(row.version, None)
            await self._cache.deliver(PROFILE, str(profile_id), entry)

    async def own(self, profile_id: UUID) -> Profile:
        """Return the whole profile, for the person themselves.

        Raises:
            NotFound: if it is erased.
        """
        row = await self._database.reader(profile_id).first(_by_id(profile_id))
        if row is None:
            raise NotFound("There is no such profile.")
        return _profile(row)

    def listed(
        self, name_prefix: str | None, attribute: tuple[str, str] | None, limit: int, cursor: str | None
    ) -> Listing:
        """Return a page of public views, newest first.

        Args:
            name_prefix: only names that begin so, in any case.
            attribute: only profiles that have this attribute with this value.
            limit: items on the page.
            cursor: where the page starts, from the page before.

        Raises:
            Invalid: if the cursor is not one of this list.
        """
        filters: list[ColumnElement[bool]] = [profiles.c.erased_at.is_(None)]
        if name_prefix:
            filters.append(begins_with(profiles.c.name, name_prefix))
        if attribute:
            key, value = attribute
            filters.append(or_(*(json_has(profiles.c.attributes, key, reading) for reading in _readings(value))))
        scope = f"profiles {wire.encode([name_prefix, attribute]).decode()}"
        after = self._cursors.open_id(scope, cursor)
        if after is not None:
            filters.append(profiles.c.profile_id < after)
        statement = select(*_PUBLIC).where(*filters).order_by(profiles.c.profile_id.desc()).limit(limit + 1)

        def at(generations: Sequence[int]) -> Load:
            async def load() -> Entry:
                page = self._cursors.page(
                    scope,
                    await self._gather(statement, generations, limit),
                    limit,
                    key=lambda row: str(row.profile_id),
                    item=lambda row: _public(row).public_view(),
                )
                return Entry(1, wire.encode(page))

            return load

        families = tuple(f"{GENERATION}:{shard.number}" for shard in self._database.shards)
        return Listing(LIST, families, f"{GENERATION}:{scope}:{limit}:{after}", at)

    async def change(self, profile_id: UUID, version: int, changes: dict[str, Any]) -> Profile:
        """Apply `changes` (of name, bio, location, attributes) to the profile at `version`.

        Raises:
            NotFound: if it is erased.
            PreconditionFailed: if it is not at `version` any more.
        """
        values = dict(changes)
        if "location" in values:
            location: Location | None = values.pop("location")
            values |= {"lat": location.lat if location else None, "lon": location.lon if location else None}
        async with self._database.writer(profile_id, shown=True) as writer:
            changed = await writer.run(
                update(profiles)
                .where(*_current(profile_id, version))
                .values(**values, version=version + 1, updated_at=datetime.now(UTC))
            )
            row = await writer.first(_by_id(profile_id))
            if row is None:
                raise NotFound("There is no such profile.")
            if not changed:
                raise PreconditionFailed(STALE)
            await _tell(writer, "profile.updated", profile_id, version + 1)
            profile = _profile(row)
            writer.shows(lambda: self._written(profile, writer.shard))
        return profile

    async def wear(self, profile_id: UUID, avatar_key: str) -> str | None:
        """Show the stored avatar from now on; return the key of the one before, if there was one.

        Raises:
            NotFound: if the profile is erased.
        """
        async with self._database.writer(profile_id, shown=True) as writer:
            before = await writer.first(_by_id(profile_id).with_for_update())
            if before is None:
                raise NotFound("There is no such profile.")
            await writer.run(
                update(profiles)
                .where(*_current(profile_id, before.version))
                .values(avatar_key=avatar_key, version=before.version + 1, updated_at=datetime.now(UTC))
            )
            row = await writer.first(_by_id(profile_id))
            await _tell(writer, "profile.updated", profile_id, before.version + 1)
            writer.shows(lambda: self._written(_profile(row), writer.shard))
        key: str | None = before.avatar_key
        return key

    async def erase(self, profile_id: UUID, version: int) -> None:
        """Erase the personal data of the profile at `version`; its orders stay, without it.

        Ending the sessions is the caller's, `Sessions.end_all`.

        Raises:
            NotFound: if it is erased already.
            PreconditionFailed: if it is not at `version` any more.
        """
        now = datetime.now(UTC)
        known = await self._database.reader(profile_id, newest=True).first(_by_id(profile_id))
        if known is None:
            raise NotFound("There is no such profile.")
        if known.version != version:
            raise PreconditionFailed(STALE)
        await self._directory.doubt(known.email, profile_id)
        async with self._database.writer(profile_id, shown=True) as writer:
            erased = await writer.run(
                update(profiles)
                .where(*_current(profile_id, version))
                .values(
                    email=None,
                    password_hash=None,
                    name="",
                    bio=None,
                    lat=None,
                    lon=None,
                    attributes={},
                    avatar_key=None,
                    version=version + 1,
                    updated_at=now,
                    erased_at=now,
                )
            )
            if erased:
                await _tell(writer, "profile.erased", profile_id, version + 1)
                writer.shows(lambda: self._show(profile_id, Entry(version + 1, None), writer.shard))
        if not erased:
            await self._directory.confirm(known.email, profile_id)
            raise PreconditionFailed(STALE)
        await self._directory.release(known.email, profile_id)

    def _loader(self, key: str) -> Load:
        profile_id = UUID(key)

        async def load() -> Entry:
            row = await self._database.reader(profile_id).find(_PUBLIC_BY_ID, profile_id=profile_id)
            return ABSENT if row is None else _entry(_public(row))

        return load

    async def _written(self, profile: Profile, shard: int) -> None:
        await self._show(profile.id, _entry(profile), shard)

    async def _show(self, profile_id: UUID, entry: Entry, shard: int) -> None:
        position = context.current().positions.get(shard, 0)
        await asyncio.gather(
            self._cache.put(PROFILE, str(profile_id), entry),
            self._cache.raise_generation(f"{GENERATION}:{shard}", position),
        )

    async def _gather(self, statement: Any, generations: Sequence[int], limit: int) -> Sequence[Row[Any]]:
        # Cached under the generations, so it must show at least what they stand for.
        work = context.current()
        for shard, generation in enumerate(generations):
            work.reached(shard, generation)
        rows = await self._database.gather(statement, profiles.c.profile_id)
        return sorted(rows, key=lambda row: row.profile_id, reverse=True)[: limit + 1]


async def _tell(writer: Writer, event: str, profile_id: UUID, version: int) -> None:
    await outbox.append(writer, event, profile_id=profile_id, subject_id=profile_id, payload={"version": version})


def _by_id(profile_id: UUID) -> Any:
    return select(profiles).where(profiles.c.profile_id == profile_id, profiles.c.erased_at.is_(None))


def _current(profile_id: UUID, version: int) -> tuple[ColumnElement[bool], ...]:
    return (profiles.c.profile_id == profile_id, profiles.c.version == version, profiles.c.erased_at.is_(None))


def _readings(value: str) -> list[Any]:
    """Return what `value` of `?attribute=key:value` may mean: the text itself, and the number or boolean it spells."""
    try:
        parsed = wire.decode(value)
    except ValueError:
        return [value]
    return [value, parsed] if isinstance(parsed, int | float | bool) else [value]


def _entry(profile: PublicProfile) -> Entry:
    return Entry(profile.version, wire.encode(profile.public_view()))


def _columns(profile: Profile) -> dict[str, Any]:
    return {
        "profile_id": profile.id,
        "email": profile.email,
        "name": profile.name,
        "bio": profile.bio,
        "tier": profile.tier,
        "role": profile.role,
        "lat": profile.location.lat if profile.location else None,
        "lon": profile.location.lon if profile.location else None,
        "attributes": profile.attributes,
        "version": profile.version,
        "created_at": profile.created_at,
        "updated_at": profile.updated_at,
    }


def _profile(row: Any) -> Profile:
    return Profile(
        **_shown(row),
        email=row.email or "",
        role=row.role,
        location=None if row.lat is None else Location(row.lat, row.lon),
        attributes=row.attributes,
    )


def _public(row: Any) -> PublicProfile:
    return PublicProfile(**_shown(row))


def _shown(row: Any) -> dict[str, Any]:
    """Return the fields of `PublicProfile`."""
    return {
        "id": row.profile_id,
        "name": row.name,
        "bio": row.bio,
        "tier": row.tier,
        "avatar_url": None if row.avatar_key is None else f"/api/v1/assets/{row.avatar_key}",
        "version": row.version,
        "created_at": row.created_at,
        "updated_at": row.updated_at,
    }
