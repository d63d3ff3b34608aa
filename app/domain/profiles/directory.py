"""The e-mail directory: reserve, create, confirm, sweep. It keeps addresses unique although profiles are sharded.

No transaction spans the directory and a shard. So sign-up reserves the address here, creates the profile there and
confirms here; a sign-up that dies in between leaves a reservation, which the sweep confirms or frees.
"""

from datetime import UTC, datetime, timedelta
from uuid import UUID

from sqlalchemy import delete, select, update

from app.core.errors import Conflict
from app.domain.profiles.rules import email_key
from app.domain.profiles.tables import email_directory, profiles
from app.scaling.database import Database
from app.scaling.dialect import insert_ignore

# A sign-up takes well under a minute from reserve to confirm; after ten it is dead.
ABANDONED_AFTER = timedelta(minutes=10)


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
        async with self._database.writer() as writer:
            taken = await writer.run(
                insert_ignore(email_directory).values(
                    email_key=email_key(self._secret, email),
                    profile_id=profile_id,
                    confirmed=0,
                    reserved_at=datetime.now(UTC),
                )
            )
        if not taken:
            raise Conflict("There is a profile with this e-mail address already; sign in instead.", code="email_taken")

    async def confirm(self, email: str) -> None:
        """Make the reservation last, now that the profile exists."""
        async with self._database.writer() as writer:
            await writer.run(
                update(email_directory)
                .where(email_directory.c.email_key == email_key(self._secret, email))
                .values(confirmed=1)
            )

    async def doubt(self, email: str) -> None:
        """Turn the address back into a reservation, before its profile is erased.

        Should that be cut off, the sweep finds out whether the profile is still there.
        """
        async with self._database.writer() as writer:
            await writer.run(
                update(email_directory)
                .where(email_directory.c.email_key == email_key(self._secret, email))
                .values(confirmed=0, reserved_at=datetime.now(UTC))
            )

    async def release(self, email: str) -> None:
        """Free the address: its profile was not created, or is erased."""
        async with self._database.writer() as writer:
            await writer.run(
                delete(email_directory).where(email_directory.c.email_key == email_key(self._secret, email))
            )

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
        """Settle abandoned reservations: confirm those whose profile exists, free the others; return how many."""
        stale = await self._database.reader().all(
            select(email_directory.c.email_key, email_directory.c.profile_id)
            .where(
                email_directory.c.confirmed == 0,
                email_directory.c.reserved_at < datetime.now(UTC) - ABANDONED_AFTER,
            )
            .limit(1000)
        )
        for row in stale:
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
        return len(stale)
