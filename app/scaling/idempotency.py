"""Idempotency keys: the same call again gets the same reply, and happens once.

Claiming the key, the effect and the stored reply are one transaction. So a crashed holder leaves no key behind, and a
concurrent duplicate waits for the first to end and then replays it.
"""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    CHAR,
    JSON,
    Column,
    DateTime,
    Index,
    PrimaryKeyConstraint,
    String,
    Table,
    Uuid,
    select,
)

from app.core import wire
from app.core.errors import Conflict, Invalid, Unavailable
from app.scaling.database import Database, metadata
from app.scaling.dialect import Rows, Trouble, trouble

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("profile_id", Uuid, nullable=False),
    Column("route", String(64), nullable=False),
    Column("key", String(255), nullable=False),
    Column("fingerprint", CHAR(64), nullable=False),
    Column("reply", JSON, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    PrimaryKeyConstraint("profile_id", "route", "key"),
    Index("ix_idempotency_keys_created_at", "created_at"),  # the sweep's question
)


@dataclass(frozen=True, slots=True)
class Claim:
    """A caller's key for one call of one route.

    Attributes:
        profile_id: the caller.
        route: the operation's name; the same key elsewhere is another key.
        key: what the caller chose, 1..255 printable characters.
        fingerprint: of the request's body.
    """

    profile_id: UUID
    route: str
    key: str
    fingerprint: str

    @classmethod
    def of(cls, profile_id: UUID, route: str, key: str, body: Any) -> "Claim":
        """Fingerprint `body` as JSON with sorted keys, so that spacing and order do not matter."""
        canonical = wire.encode(body, sort=True)
        return cls(profile_id, route, key, hashlib.sha256(canonical).hexdigest())

    def row(self, reply: dict[str, Any]) -> Rows:
        """Return the row that holds the key, and what later calls with it get."""
        values = {
            "profile_id": self.profile_id,
            "route": self.route,
            "key": self.key,
            "fingerprint": self.fingerprint,
            "reply": reply,
            "created_at": datetime.now(UTC),
        }
        return Rows(idempotency_keys, [values])

    async def take(self, database: Database, reply: dict[str, Any], *effects: Rows) -> dict[str, Any] | None:
        """Claim the key for `reply`, in one transaction with its effects; return None, or the reply of the first call.

        Args:
            database: holds the keys of the caller.
            reply: what later calls with this key get.
            effects: rows to insert with the key if it is fresh, and not at all otherwise.

        Raises:
            Conflict: `idempotency_in_flight`, if the first call with this key does not end in time.
            Invalid: `idempotency_key_reused`, if the key came with another body.
            Unavailable: if the database takes no writes.
        """
        try:
            fresh = await database.insert_once(self.profile_id, self.row(reply), *effects)
        except Unavailable as error:
            if error.__cause__ is None or trouble(error.__cause__) is not Trouble.BUSY:
                raise
            raise Conflict(
                "A request with this Idempotency-Key is still under way; try again with the same key.",
                code="idempotency_in_flight",
            ) from error
        if fresh:
            return None
        row = await database.reader(self.profile_id, newest=True).first(
            select(idempotency_keys.c.fingerprint, idempotency_keys.c.reply).where(
                idempotency_keys.c.profile_id == self.profile_id,
                idempotency_keys.c.route == self.route,
                idempotency_keys.c.key == self.key,
            )
        )
        if row is None or row.fingerprint != self.fingerprint:
            raise Invalid.field(
                "header/Idempotency-Key",
                "This Idempotency-Key was used with another body; use a new key for a new request.",
                code="idempotency_key_reused",
            )
        stored: dict[str, Any] = row.reply
        return stored
