"""What is true of profiles whatever they are stored in: addresses that count as one, tiers, the two views."""

import hashlib
import hmac
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from app.core.errors import Invalid

TIERS = ("free", "pro", "enterprise")
MEMBER, ADMIN = "member", "admin"


@dataclass(frozen=True, slots=True)
class Location:
    """A place on Earth, in degrees."""

    lat: float
    lon: float


@dataclass(frozen=True, slots=True)
class NewProfile:
    """What a person gives at sign-up. The password is plain here and nowhere else."""

    email: str
    password: str
    name: str
    bio: str | None = None
    location: Location | None = None
    attributes: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class PublicProfile:
    """What anybody may see of a profile."""

    id: UUID
    name: str
    bio: str | None
    tier: str
    avatar_url: str | None
    version: int
    created_at: datetime
    updated_at: datetime

    def public_view(self) -> dict[str, Any]:
        """Return it as it is written."""
        return {
            "id": self.id,
            "name": self.name,
            "bio": self.bio,
            "tier": self.tier,
            "avatar_url": self.avatar_url,
            "version": self.version,
            "created_at": self.created_at,
            "updated_at": self.updated_at,
        }


@dataclass(frozen=True, slots=True)
class Profile(PublicProfile):
    """A profile as stored, without its password hash."""

    email: str
    role: str
    location: Location | None
    attributes: dict[str, Any]

    def own_view(self) -> dict[str, Any]:
        """Return what the person themselves may see."""
        location = {"lat": self.location.lat, "lon": self.location.lon} if self.location else None
        return self.public_view() | {"email": self.email, "location": location, "attributes": self.attributes}


def normalise_email(email: str) -> str:
    """Return the form in which two spellings of one address are equal.

    Raises:
        Invalid: for characters outside ASCII: two addresses that look alike must not be two accounts.
    """
    if not email.isascii():
        raise Invalid.field("/email", "Use the plain ASCII form of the address (a domain as xn--…).")
    return email.strip().lower()


def email_key(secret: bytes, email: str) -> str:
    """Return the directory's key of an address: keyed, so that a copy of the directory does not tell who is in it."""
    return hmac.new(secret, b"email " + normalise_email(email).encode(), hashlib.sha256).hexdigest()
