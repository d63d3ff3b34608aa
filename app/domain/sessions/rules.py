"""Tokens: what a client holds, and what we keep of it.

    sct_<base64url of 16 bytes profile id + 32 random bytes>

The profile id leads to the shard and lets one Redis slot hold all that a request needs; it is no secret. The 256 random
bits are, and only their SHA-256 is kept.
"""

import base64
import binascii
import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from app.core import wire

PREFIX = "sct_"
_RANDOM_BYTES = 32
_LENGTH = 16 + _RANDOM_BYTES
_TEXT_LENGTH = len(PREFIX) + _LENGTH * 4 // 3


@dataclass(frozen=True, slots=True)
class Session:
    """A signed-in caller.

    Attributes:
        profile_id: who.
        key: SHA-256 of the token, in hex; names the session without opening it.
        tier: which rate limit applies.
        role: `member` or `admin`.
        created_at: when it began.
        seen_at: when the copy on the shard last learnt that it is in use.
        expires_at: when it ends at the latest.
    """

    profile_id: UUID
    key: str
    tier: str
    role: str
    created_at: datetime
    seen_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class SignedIn:
    """A fresh session and its token, which exists only here and at the client.

    Attributes:
        token: the token.
        session: what we keep of it.
        ended: the sessions that had to go for it, by the ids under which they are listed.
    """

    token: str
    session: Session
    ended: tuple[UUID, ...] = ()


def new_token(profile_id: UUID) -> tuple[str, str]:
    """Return a fresh token for the profile, and its key."""
    token = PREFIX + base64.urlsafe_b64encode(profile_id.bytes + secrets.token_bytes(_RANDOM_BYTES)).decode()
    return token, _key(token)


def read_token(token: str) -> tuple[UUID, str] | None:
    """Return the profile id and the key of a token, or None if it cannot be one of ours."""
    if len(token) != _TEXT_LENGTH or not token.startswith(PREFIX):
        return None
    try:
        raw = base64.b64decode(token[len(PREFIX) :], altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
    return UUID(bytes=raw[:16]), _key(token)


def name_of(profile_id: UUID, key: str) -> str:
    """Return the name under which Redis holds a session."""
    return f"session:{{{profile_id}}}:{key}"


def dump(session: Session) -> bytes:
    """Return a session as Redis holds it; who and which say its name."""
    return wire.encode([session.tier, session.role, session.created_at, session.seen_at, session.expires_at])


def load(profile_id: UUID, key: str, raw: bytes) -> Session:
    """Read a session back."""
    tier, role, *moments = wire.decode(raw)
    created_at, seen_at, expires_at = map(datetime.fromisoformat, moments)
    return Session(profile_id, key, tier, role, created_at, seen_at, expires_at)


def _key(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
