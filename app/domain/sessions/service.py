"""The use cases of sessions. Redis answers every request; the shard keeps a copy, so losing Redis signs nobody out.

Ended means deleted in both, the copy first: a session that is gone from the copy is never taken back into Redis.
"""

import asyncio
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Insert, delete, insert, literal, select, true, update

from app.core import context
from app.core.errors import Unauthenticated, Unavailable
from app.core.ids import new_id
from app.core.settings import SessionSettings
from app.core.telemetry import BUSINESS_EVENTS
from app.domain.profiles.rules import Profile
from app.domain.profiles.service import Profiles
from app.domain.profiles.tables import profiles
from app.domain.sessions.admission import SEEN_EVERY
from app.domain.sessions.rules import Session, SignedIn, dump, load, name_of, new_token, read_token
from app.domain.sessions.tables import sessions
from app.scaling import outbox, positions
from app.scaling.database import Database, Writer
from app.scaling.near import Near
from app.scaling.pipe import Pipe
from app.scaling.positions import Positions
from app.scaling.redis_link import RedisDown


class Sessions:
    """Sessions over all shards.

    Args:
        database: keeps the copies.
        pipe: to the Redis that answers.
        near: what instances keep of it.
        reached: say what a caller's reads must have reached.
        known: knows addresses and passwords.
        settings: how long sessions live.
    """

    def __init__(
        self,
        database: Database,
        pipe: Pipe,
        near: Near,
        reached: Positions,
        *,
        known: Profiles,
        settings: SessionSettings,
    ) -> None:
        self._database = database
        self._pipe = pipe
        self._near = near
        self._positions = reached
        self._profiles = known
        self._settings = settings
        self._recovering: dict[str, asyncio.Task[Session | None]] = {}

    async def sign_in(self, email: str, password: str, user_agent: str) -> SignedIn:
        """Begin a session; where a profile has as many as it may have, the one that was not used for longest ends.

        Raises:
            Unauthenticated: `invalid_credentials`, the same and as slow for an unknown address.
        """
        profile = await self._profiles.verify(email, password)
        if profile is None:
            raise _refused()
        signed_in = self._begin(profile)
        session = signed_in.session
        async with self._database.writer(profile.id) as writer:
            if not await writer.run(_insert_unless_erased(session, user_agent)):
                raise _refused()
            idle = await writer.all(
                select(sessions.c.key, sessions.c.id)
                .where(sessions.c.profile_id == profile.id)
                .order_by(sessions.c.seen_at.desc(), sessions.c.created_at.desc(), sessions.c.key)
                .offset(self._settings.most)
            )
            await self._strike(writer, profile.id, [row.key for row in idle])
        # From here on this is their work: what it wrote, their next request sees.
        context.current().profile_id = profile.id
        await self._keep(session)
        await self._forget_now(profile.id, [row.key for row in idle])
        BUSINESS_EVENTS.labels("sign_in", "accepted").inc()
        return replace(signed_in, ended=tuple(row.id for row in idle))

    async def find(self, token: str) -> Session | None:
        """Return the session of a token, in one round trip to Redis, and note what its reads must have reached.

        Without Redis, or where Redis has lost it, the copy on the shard answers.
        """
        parts = read_token(token)
        if parts is None:
            return None
        profile_id, key = parts
        raw = await self._ask(profile_id, key, "GETEX", "EX", self._settings.idle)
        if raw is None:
            # Callers of one session that miss it at once share one look at the copy.
            looking = self._recovering.get(key)
            if looking is None:
                looking = asyncio.create_task(self._recover(profile_id, key))
                self._recovering[key] = looking
                looking.add_done_callback(lambda _: self._recovering.pop(key, None))
            return await asyncio.shield(looking)
        session = load(profile_id, key, raw)
        return await self._seen(session) if session.expires_at > datetime.now(UTC) else None

    async def lives(self, session: Session) -> bool:
        """Return whether a session has not ended since it was found, for what goes on after its request; it is no use.

        Without Redis, or where Redis has lost it, the copy on the shard answers.
        """
        if await self._ask(session.profile_id, session.key, "EXISTS"):
            return session.expires_at > datetime.now(UTC)
        return await self._recover(session.profile_id, session.key) is not None

    async def listed(self, profile_id: UUID) -> list[dict[str, Any]]:
        """Return the profile's sessions, newest first, as JSON-ready views with their `key`."""
        now = datetime.now(UTC)
        rows = await self._database.reader(profile_id).all(
            select(sessions)
            .where(
                sessions.c.profile_id == profile_id,
                sessions.c.expires_at > now,
                sessions.c.seen_at > now - timedelta(seconds=self._settings.idle) - SEEN_EVERY,
            )
            .order_by(sessions.c.created_at.desc())
            # Sign-ins at the same moment may each have left one too many for a while.
            .limit(self._settings.most)
        )
        return [
            {
                "key": row.key,
                "id": row.id,
                "user_agent": row.user_agent,
                "created_at": row.created_at,
                "last_seen_at": row.seen_at,
                "expires_at": row.expires_at,
            }
            for row in rows
        ]

    async def end(self, session: Session) -> None:
        """End one session, on every instance at once."""
        await self._end(session.profile_id, sessions.c.key == session.key)

    async def end_all(self, profile_id: UUID) -> None:
        """End every session of the profile, on every instance at once."""
        await self._end(profile_id, true())

    async def forget(self, profile_id: UUID, keys: list[str]) -> None:
        """Take ended sessions out of Redis and out of every instance's memory.

        Raises:
            Unavailable: if Redis does not answer; then they must be forgotten later, before it answers with them again.
        """
        try:
            await self._near.forget([name_of(profile_id, key) for key in keys])
        except RedisDown as error:
            raise Unavailable("Redis does not answer.", code="redis_down") from error

    def _begin(self, profile: Profile) -> SignedIn:
        token, key = new_token(profile.id)
        now = datetime.now(UTC)
        expires_at = now + timedelta(seconds=self._settings.absolute)
        return SignedIn(token, Session(profile.id, key, profile.tier, profile.role, now, now, expires_at))

    async def _ask(self, profile_id: UUID, key: str, command: str, *arguments: str | int) -> Any:
        """Ask Redis about a session, None without Redis; what is read next has reached what the profile has written."""
        name, reached = name_of(profile_id, key), positions.name_of(profile_id)
        try:
            answer, known = await asyncio.gather(
                self._pipe.ask(name, command, name, *arguments), self._pipe.ask(reached, "HGETALL", reached)
            )
        except RedisDown:
            return None
        self._positions.heed(known)
        return answer

    async def _seen(self, session: Session) -> Session | None:
        """Tell the copy that the session is in use; what cannot be told now is told by a later request."""
        now = datetime.now(UTC)
        if now - session.seen_at < SEEN_EVERY or not self._database.takes_writes(session.profile_id):
            return session
        try:
            async with self._database.writer(session.profile_id) as writer:
                known = await writer.run(
                    update(sessions)
                    .where(sessions.c.profile_id == session.profile_id, sessions.c.key == session.key)
                    .values(seen_at=now)
                )
        except Unavailable:
            return session
        if not known:
            # It has ended, and Redis has not heard of it: others must not go on with it.
            await self._forget_now(session.profile_id, [session.key])
            return None
        session = replace(session, seen_at=now)
        await self._keep(session, again=True)
        return session

    async def _keep(self, session: Session, *, again: bool = False) -> None:
        seconds = min(self._settings.idle, int((session.expires_at - datetime.now(UTC)).total_seconds()))
        try:
            name = name_of(session.profile_id, session.key)
            # Again means over what is there: a session that is ended at this moment does not come back.
            only = ("XX",) if again else ()
            await self._pipe.ask(name, "SET", name, dump(session), "EX", max(1, seconds), *only)
        except RedisDown:
            return  # the copy answers until it is back

    async def _end(self, profile_id: UUID, which: ColumnElement[bool]) -> None:
        async with self._database.writer(profile_id) as writer:
            rows = await writer.all(select(sessions.c.key).where(sessions.c.profile_id == profile_id, which))
            keys = [row.key for row in rows]
            await self._strike(writer, profile_id, keys)
        await self._forget_now(profile_id, keys)

    async def _strike(self, writer: Writer, profile_id: UUID, keys: list[str]) -> None:
        """Delete sessions from the copy; `_forget_now` must follow once that is committed."""
        if not keys:
            return
        await writer.run(delete(sessions).where(sessions.c.profile_id == profile_id, sessions.c.key.in_(keys)))
        # If Redis is down now it may come back with the session in it: the message forgets it then.
        await outbox.append(
            writer, "session.ended", profile_id=profile_id, subject_id=profile_id, payload={"keys": keys}
        )

    async def _forget_now(self, profile_id: UUID, keys: list[str]) -> None:
        # Its position is known by now: whoever misses the session from here on asks a replica that knows of its end.
        if keys:
            with suppress(Unavailable):
                await self.forget(profile_id, keys)

    async def _recover(self, profile_id: UUID, key: str) -> Session | None:
        now = datetime.now(UTC)
        copy = (
            select(sessions, profiles.c.tier, profiles.c.role)
            .join(profiles, profiles.c.profile_id == sessions.c.profile_id)
            .where(
                sessions.c.profile_id == profile_id,
                sessions.c.key == key,
                sessions.c.expires_at > now,
                sessions.c.seen_at > now - timedelta(seconds=self._settings.idle) - SEEN_EVERY,
                profiles.c.erased_at.is_(None),
            )
        )
        row = await self._database.reader(profile_id).first(copy)
        if row is None:
            # With the session Redis may have lost what a replica must have reached to know it.
            with suppress(Unavailable):
                row = await self._database.reader(profile_id, newest=True).first(copy)
        if row is None:
            return None
        session = Session(profile_id, key, row.tier, row.role, row.created_at, row.seen_at, row.expires_at)
        await self._keep(session)
        # While Redis is down every request comes this way: the copy must learn of use here too.
        return await self._seen(session)


def _refused() -> Unauthenticated:
    BUSINESS_EVENTS.labels("sign_in", "refused").inc()
    return Unauthenticated("The e-mail address or the password is wrong.", code="invalid_credentials")


def _insert_unless_erased(session: Session, user_agent: str) -> Insert:
    """Return the statement that keeps a session of a profile that is there, and has it be there until the commit.

    Whoever erases the profile after that finds the session and ends it.
    """
    row = {
        "profile_id": session.profile_id,
        "key": session.key,
        "id": new_id(session.profile_id),
        "user_agent": user_agent[:200],
        "created_at": session.created_at,
        "seen_at": session.created_at,
        "expires_at": session.expires_at,
    }
    values = select(*(literal(value, sessions.c[name].type) for name, value in row.items())).where(
        profiles.c.profile_id == session.profile_id, profiles.c.erased_at.is_(None)
    )
    return insert(sessions).from_select(list(row), values.with_for_update(read=True))
