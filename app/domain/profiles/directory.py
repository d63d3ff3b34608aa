"""The e-mail directory: reserve, create, confirm, sweep. It keeps addresses unique although profiles are sharded.

No transaction spans the directory and a shard. So sign-up reserves the address here, creates the profile there and
confirms here. A sign-up that fails for certain gives the address back at once; one that dies in between leaves a
reservation, which the next sign-up with the address, or the sweep, confirms or frees.
"""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Row, delete, select, update

from app.core.errors import Conflict
from app.domain.profiles.rules import email_key
from app.domain.profiles.tables import email_directory, profiles
from app.scaling.database import Database
from app.scaling.dialect import insert_ignore

# A request ends after 10 s and its transaction at most 15 s later. Should a process have stood still for longer, it
# finds its reservation gone when it confirms, and takes its profile back.
ABANDONED_AFTER = timedelta(minutes=1)


class Directory:
    """Who has which address.

    Args:
        database: the directory is in its catalog database.
        secret: keys the addresses.
    """

    def __init__(self, database: Database, secret: bytes) -> None:
        self._database = database
        self._secret = secret

    async def reserve(self, email: str, profile_id: UUID) -> None:
        """Take the address for a profile that is about to be created.

        Raises:
            Conflict: `email_taken`.
        """
        key = email_key(self._secret, email)
        if not await self._insert(key, profile_id) and not (
            await self._settled(key) and await self._insert(key, profile_id)
        ):
            raise taken()

    async def confirm(self, email: str, profile_id: UUID) -> bool:
        """Make the reservation last, now that the profile exists; False if it is not the profile's any more."""
        async with self._database.writer() as writer:
            return bool(
                await writer.run(update(email_directory).where(*self._of(email, profile_id)).values(confirmed=1))
            )

    async def doubt(self, email: str, profile_id: UUID) -> None:
        """Turn the address back into a reservation, before its profile is erased.

        Should that be cut off, the sweep finds out whether the profile is still there.
        """
        async with self._database.writer() as writer:
            await writer.run(
                update(email_directory)
                .where(*self._of(email, profile_id))
                .values(confirmed=0, reserved_at=datetime.now(UTC))
            )

    async def release(self, email: str, profile_id: UUID) -> None:
        """Free the address: its profile was not created, or is erased."""
        async with self._database.writer() as writer:
            await writer.run(delete(email_directory).where(*self._of(email, profile_id)))

    async def find(self, email: str) -> UUID | None:
        """Return the profile that has the address.

        It also finds a reservation: the profile may exist already, its confirmation under way. It asks for the newest
        state: who has just signed up signs in next, as a stranger whose writes nobody knows of.
        """
        reader = self._database.reader(newest=True)
        row = await reader.first(
            select(email_directory.c.profile_id).where(email_directory.c.email_key == email_key(self._secret, email))
        )
        return None if row is None else row.profile_id

    async def sweep(self) -> int:
        """Settle abandoned reservations; return how many."""
        stale = await self._database.reader().all(_abandoned().limit(1000))
        for row in stale:
            await self._settle(row)
        return len(stale)

    async def _insert(self, key: str, profile_id: UUID) -> bool:
        async with self._database.writer() as writer:
            return bool(
                await writer.run(
                    insert_ignore(email_directory).values(
                        email_key=key, profile_id=profile_id, confirmed=0, reserved_at=datetime.now(UTC)
                    )
                )
            )

    async def _settled(self, key: str) -> bool:
        """Return whether the address was reserved by a sign-up that is dead, and settle that."""
        reader = self._database.reader(newest=True)
        row = await reader.first(_abandoned().where(email_directory.c.email_key == key))
        if row is not None:
            await self._settle(row)
        return row is not None

    async def _settle(self, row: Row[Any]) -> None:
        """Confirm the reservation if its profile exists, else free the address."""
        # On the primary: a lagging replica must not make a profile look as if it did not exist.
        async with self._database.writer(row.profile_id) as writer:
            exists = await writer.first(
                select(profiles.c.profile_id).where(
                    profiles.c.profile_id == row.profile_id, profiles.c.erased_at.is_(None)
                )
            )
        mine = (
            email_directory.c.email_key == row.email_key,
            email_directory.c.profile_id == row.profile_id,
            email_directory.c.confirmed == 0,
        )
        async with self._database.writer() as writer:
            if exists:
                await writer.run(update(email_directory).where(*mine).values(confirmed=1))
            else:
                await writer.run(delete(email_directory).where(*mine))

    def _of(self, email: str, profile_id: UUID) -> tuple[ColumnElement[bool], ...]:
        key = email_key(self._secret, email)
        return (email_directory.c.email_key == key, email_directory.c.profile_id == profile_id)


def taken() -> Conflict:
    """Return the error that says so."""
    return Conflict("There is a profile with this e-mail address already; sign in instead.", code="email_taken")


def _abandoned() -> Any:
    return select(email_directory.c.email_key, email_directory.c.profile_id).where(
        email_directory.c.confirmed == 0, email_directory.c.reserved_at < datetime.now(UTC) - ABANDONED_AFTER
    )
