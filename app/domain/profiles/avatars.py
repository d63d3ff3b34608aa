"""Avatars: uploaded straight to the object storage, looked at there, and shown as a picture of our own making.

What somebody uploads is never shown. It waits under a key of its own until it has been decoded as what it was announced
as; what is shown is a small picture encoded anew, so that neither a place that a camera noted nor a file that is a
picture to us and a program to a browser gets through. Its key names its content, so it never changes.
"""

import asyncio
import hashlib
import io
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from secrets import token_hex
from typing import Any
from uuid import UUID

from PIL import Image, ImageOps

from app.core.errors import NotFound, Unavailable
from app.core.telemetry import BUSINESS_EVENTS
from app.domain.profiles.service import Profiles
from app.scaling import outbox
from app.scaling.database import Database
from app.scaling.storage import PUBLIC_CACHING, Storage, Upload

TYPES = {"image/jpeg": "JPEG", "image/png": "PNG", "image/webp": "WEBP"}
LARGEST = 5 * 1024 * 1024  # bytes; a photo as a phone takes it
# Bytes that decoding may take, by the costs of `_memory`. A worker has so much to spare within the limits that Compose
# and Kubernetes give it; a photo of 24 megapixels, the largest common camera, just fits.
ROOM = 36_000_000
SIDE = 512  # pixels; twice what a page shows, for screens with small ones
# What was sent in the last second of a link still arrives.
LATE_SECONDS = 60
UPLOADS, AVATARS = "uploads", "avatars"


@dataclass(frozen=True, slots=True)
class Expected:
    """An upload that somebody was given a link for; `until` in seconds since 1970."""

    key: str
    content_type: str
    size: int
    until: float

    def to_json(self) -> dict[str, Any]:
        """Return the payload of its message."""
        return {"key": self.key, "content_type": self.content_type, "size": self.size, "until": self.until}


class Avatars:
    """The avatars of profiles.

    Args:
        database: keeps what is expected.
        storage: takes the uploads and holds the pictures.
        profiles: wear them.
    """

    def __init__(self, database: Database, storage: Storage, profiles: Profiles) -> None:
        self._database = database
        self._storage = storage
        self._profiles = profiles

    async def expect(self, profile_id: UUID, content_type: str, size: int) -> Upload:
        """Return where to upload a picture, and have it looked at once it is there.

        Args:
            profile_id: whose.
            content_type: one of `TYPES`.
            size: in bytes, at most `LARGEST`.

        Raises:
            Unavailable: the database takes no writes.
        """
        key = f"{UPLOADS}/{profile_id}/{token_hex(16)}"
        upload = await self._storage.upload_link(key, content_type, size, datetime.now(UTC))
        expected = Expected(key, content_type, size, upload.expires_at.timestamp() + LATE_SECONDS)
        async with self._database.writer(profile_id) as writer:
            await outbox.append(
                writer, "avatar.expected", profile_id=profile_id, subject_id=profile_id, payload=expected.to_json()
            )
        return upload

    async def accept(self, profile_id: UUID, expected: Expected) -> None:
        """Show what was uploaded if it is the picture that was announced; else forget it.

        Raises:
            Unavailable: nothing is there yet, or the storage does not answer; look again later.
        """
        size = await self._storage.size(expected.key)
        if size is None:
            if datetime.now(UTC).timestamp() < expected.until:
                raise Unavailable("The upload is not there yet.", code="upload_awaited")
            return
        picture = None
        if size <= expected.size:
            picture = await asyncio.to_thread(draw, await self._storage.get(expected.key), expected.content_type)
        if picture is not None:
            await self._show(profile_id, picture)
        BUSINESS_EVENTS.labels("avatar", "refused" if picture is None else "accepted").inc()
        await self._storage.delete(expected.key)

    async def erase(self, profile_id: UUID) -> None:
        """Delete all that is stored of the profile's pictures, those on their way too."""
        for room in (UPLOADS, AVATARS):
            await self._storage.delete_below(f"{room}/{profile_id}")

    async def _show(self, profile_id: UUID, picture: bytes) -> None:
        key = f"{AVATARS}/{profile_id}/{hashlib.sha256(picture).hexdigest()[:32]}.webp"
        await self._storage.put(key, picture, "image/webp", caching=PUBLIC_CACHING)
        try:
            before = await self._profiles.wear(profile_id, key)
        except NotFound:  # erased meanwhile, perhaps after its pictures were
            before = key
        else:
            before = None if before == key else before
        if before is not None:
            await self._storage.delete(before)


def draw(content: bytes, content_type: str) -> bytes | None:
    """Return the picture as a small WebP without anything but pixels, or None if it is no picture of that type."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=[TYPES[content_type]]) as image:
                # Known from the header, before a pixel is decoded.
                if _memory(image, content_type) > ROOM:
                    return None
                # Small first: to turn the whole picture would be a second copy of it.
                image.thumbnail((SIDE, SIDE))
                ImageOps.exif_transpose(image, in_place=True)
                pixels = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    pixels.info = {}
    out = io.BytesIO()
    pixels.save(out, "WEBP", quality=85)
    return out.getvalue()


def _memory(image: Image.Image, content_type: str) -> float:
    """Return how many bytes it takes to make the picture small, by what was measured at 24 megapixels.

    A common JPEG is small from the first line on. A progressive one keeps the coefficients of every pixel until its
    last scan; a transparent PNG is copied once to be averaged; libwebp holds two canvases, and its answer is
    copied twice.
    """
    match TYPES[content_type]:
        case "JPEG":
            cost = 9.0 if image.info.get("progressive") else 1.5
        case "PNG":
            cost = 8.5 if image.has_transparency_data else 4.3
        case _:
            cost = 16.5
    return cost * image.width * image.height
