"""Object storage through obstore: S3, Google Cloud Storage, Azure or a folder, by the URL alone.

Objects are written once under keys derived from what they are of, so writing one again changes nothing. A link to an
object is short-lived: signed by the storage where it can, by us where it is a folder.
"""

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, from_url

from app.core.errors import NotFound, Unavailable
from app.core.settings import StorageSettings
from app.core.signing import BadSignature, Signer
from app.scaling.outbound import Outbound

LINK_PATH = "/files"
# An invoice is tens of kilobytes. Below every task's limit, so that a storage that hangs is seen as one and not as a
# task that hangs.
TIMEOUT = 5.0  # seconds a try
# A report of the largest range is some 30 MB: half a minute at a tenth of what a bucket takes.
FILE_TIMEOUT = 30.0  # seconds a try
# Signed as long as a kept redirect to it may live, a day, and one more; the longest that S3 signs are seven.
PUBLIC_SECONDS = 2 * 24 * 3600
# Of a public object. Named by its content, so it never changes; a day is how long a copy may outlive its erasure.
PUBLIC_CACHING = "public, max-age=86400, immutable"
_FAILURES = (BaseError, OSError)


@dataclass(frozen=True, slots=True)
class Upload:
    """Where to PUT an object, with which headers, until when."""

    url: str
    headers: dict[str, str]
    expires_at: datetime


class Storage:
    """The bucket or folder of this service.

    Args:
        settings: its URL and how long a link lives.
        secret: signs the links to a folder.
        public_url: where clients reach this service, for those links.
        region: where this process runs, for the address of its CDN.
    """

    def __init__(self, settings: StorageSettings, secret: bytes, public_url: str, region: str = "local") -> None:
        parts = urlsplit(settings.url)
        self._folder = parts.scheme == "file"
        self._store: Any = LocalStore(prefix=Path(parts.path), mkdir=True) if self._folder else from_url(settings.url)
        self.outbound = Outbound("storage", timeout=TIMEOUT, concurrency=16, waiting=64, failures=_FAILURES)
        # Files in a room of their own, so that two large ones do not hold the invoices up.
        self.files = Outbound("storage-files", timeout=FILE_TIMEOUT, concurrency=4, waiting=16, failures=_FAILURES)
        self._link_seconds = settings.link_seconds
        self._signer = Signer(secret, "file link")
        self._upload_signer = Signer(secret, "upload link")
        self._outside = (settings.outside_url or "").rstrip("/")
        self._cdn = (settings.public_url or "").replace("{region}", region).rstrip("/")
        self._public_url = public_url.rstrip("/")

    async def put(self, key: str, content: bytes, content_type: str, *, caching: str | None = None) -> None:
        """Store `content` under `key`; the same key again is the same object.

        Args:
            key: of the object.
            content: the object.
            content_type: what it is.
            caching: the `Cache-Control` with which a bucket, and the CDN before it, shows the object.

        Raises:
            Unavailable: if the storage does not take it.
        """
        # A folder keeps no attributes; there type and caching follow from the key.
        attributes = None if self._folder else {"Content-Type": content_type}
        if attributes and caching:
            attributes["Cache-Control"] = caching
        try:
            await self.outbound.call(lambda: obstore.put_async(self._store, key, content, attributes=attributes))
        except (*_FAILURES, TimeoutError) as error:
            raise Unavailable("Object storage takes nothing right now; try again.", code="storage_down") from error

    async def put_file(self, key: str, path: Path, content_type: str) -> None:
        """Store a file under `key`, in parts if it is large; it is never in memory as a whole.

        Raises:
            Unavailable: if the storage does not take it.
        """
        attributes = None if self._folder else {"Content-Type": content_type}
        try:
            await self.files.call(lambda: obstore.put_async(self._store, key, path, attributes=attributes))
        except (*_FAILURES, TimeoutError) as error:
            raise Unavailable("Object storage takes nothing right now; try again.", code="storage_down") from error

    async def delete(self, key: str) -> None:
        """Delete the object under `key`; without one there is nothing to do.

        Raises:
            Unavailable: if the storage does not answer.
        """
        try:
            await self.outbound.call(lambda: self._remove(key))
        except (*_FAILURES, TimeoutError) as error:
            raise Unavailable("Object storage does not answer right now; try again.", code="storage_down") from error

    async def get(self, key: str) -> bytes:
        """Return the bytes under `key`.

        Raises:
            NotFound: if there is no such object.
            Unavailable: if the storage does not answer.
        """
        try:
            content = await self.outbound.call(lambda: self._fetch(key))
        except (*_FAILURES, TimeoutError) as error:
            raise Unavailable("Object storage does not answer right now; try again.", code="storage_down") from error
        if content is None:
            raise NotFound("There is no such object.")
        return content

    async def link(self, key: str, now: float, seconds: int | None = None) -> str:
        """Return an address at which `key` can be fetched for the next few minutes, without a session.

        Args:
            key: the object.
            now: seconds since 1970.
            seconds: for so long instead.
        """
        seconds = seconds or self._link_seconds
        if self._folder:
            return f"{self._public_url}{LINK_PATH}/{self._signer.sign([key, int(now) + seconds])}"
        return await self._signed("GET", key, seconds)

    async def address(self, key: str, now: float) -> str:
        """Return where anybody can fetch a public object for a day at least: on the region's CDN, if it has one."""
        return f"{self._cdn}/{key}" if self._cdn else await self.link(key, now, PUBLIC_SECONDS)

    async def upload_link(self, key: str, content_type: str, size: int, now: datetime) -> Upload:
        """Return where somebody may put an object of their own under `key` within the next few minutes.

        A folder's link takes nothing of another type or larger. A bucket signs neither: look at `size` before you read.
        """
        expires_at = now.replace(microsecond=0) + timedelta(seconds=self._link_seconds)
        if self._folder:
            signed = self._upload_signer.sign([key, content_type, size, int(expires_at.timestamp())])
            url = f"{self._public_url}{LINK_PATH}/{signed}"
        else:
            url = await self._signed("PUT", key, self._link_seconds)
        return Upload(url, {"Content-Type": content_type}, expires_at)

    async def size(self, key: str) -> int | None:
        """Return the size in bytes of the object under `key`, or None if there is none.

        Raises:
            Unavailable: if the storage does not answer.
        """
        try:
            return await self.outbound.call(lambda: self._head(key))
        except (*_FAILURES, TimeoutError) as error:
            raise Unavailable("Object storage does not answer right now; try again.", code="storage_down") from error

    async def delete_below(self, prefix: str, before: datetime | None = None) -> int:
        """Delete the objects below `prefix`, only those from `before` a moment if given; return how many.

        Raises:
            Unavailable: if the storage does not answer.
        """
        try:
            return await self.files.call(lambda: self._remove_below(prefix, before))
        except (*_FAILURES, TimeoutError) as error:
            raise Unavailable("Object storage does not answer right now; try again.", code="storage_down") from error

    async def _signed(self, method: Literal["GET", "PUT"], key: str, seconds: int) -> str:
        address = str(await obstore.sign_async(self._store, method, key, timedelta(seconds=seconds)))
        if not self._outside:
            return address
        # The signature is over the path and the bucket's own host, which the proxy before it puts back.
        parts = urlsplit(address)
        return f"{self._outside}{parts.path}?{parts.query}"

    async def _remove(self, key: str) -> None:
        with suppress(FileNotFoundError):  # a folder says so, a bucket does not
            await obstore.delete_async(self._store, key)

    async def _remove_below(self, prefix: str, before: datetime | None) -> int:
        count = 0
        async for batch in obstore.list(self._store, prefix=prefix):
            paths = [found["path"] for found in batch if before is None or found["last_modified"] < before]
            if paths:
                await obstore.delete_async(self._store, paths)
            count += len(paths)
        return count

    async def _head(self, key: str) -> int | None:
        try:
            return int((await obstore.head_async(self._store, key))["size"])
        except FileNotFoundError:  # an answer, not a failure of the storage
            return None

    async def _fetch(self, key: str) -> bytes | None:
        try:
            answer = await obstore.get_async(self._store, key)
            return bytes(await answer.bytes_async())
        except FileNotFoundError:  # an answer, not a failure of the storage
            return None

    def open_link(self, signed: str, now: float) -> str:
        """Return the key that a link of ours to a folder names.

        Raises:
            NotFound: if the link is not ours or has expired.
        """
        (key,) = _opened(self._signer, signed, now)
        return str(key)

    def open_upload(self, signed: str, now: float) -> tuple[str, str, int]:
        """Return key, content type and largest size of what a link of ours allows to put into a folder.

        Raises:
            NotFound: if the link is not ours or has expired.
        """
        key, content_type, size = _opened(self._upload_signer, signed, now)
        return str(key), str(content_type), int(size)


def _opened(signer: Signer, signed: str, now: float) -> list[Any]:
    """Return what a link of ours names, its end excepted."""
    named: list[Any]
    try:
        *named, expires_at = signer.open(signed)
    except BadSignature:
        named, expires_at = [], 0
    if now > expires_at:
        raise NotFound("This link has expired; ask for a new one.", code="link_expired")
    return named
