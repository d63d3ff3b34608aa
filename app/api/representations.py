"""How resources are written: bytes, entity tags, conditional requests, and who may keep which answer for how long.

An entity tag names a version, `"v3"`; a product's also names its revision, `"v3-17"`, because stock moves without an
edit. A write compares only the version.
"""

import re
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response

from app.core import wire
from app.core.errors import Invalid, NotFound, PreconditionFailed, PreconditionRequired
from app.domain.catalog.rules import Product
from app.scaling.cache import Entry
from app.scaling.storage import PUBLIC_CACHING

JSON = "application/json"

# Who may keep which answer. What stands nowhere is `no-store`, which the first middleware adds.
CACHING = {
    # The same for everybody, and stock that is half a minute old is told again when the order is placed: a CDN may
    # answer, and go on answering for a minute while it asks for a newer one.
    "product": "public, max-age=30, stale-while-revalidate=60",
    # Shown to everybody, but personal: no shared cache keeps it, and a browser asks each time, which costs it a 304.
    "profile": "private, no-cache",
    "asset": PUBLIC_CACHING,
    # Behind a link that is valid for minutes and for whoever has it; an invoice is nobody else's to keep.
    "file": "private, no-store",
    # Part of a release of the package they come from.
    "documentation": "public, max-age=3600",
    # Part of a release of ours: page and scripts must be of the same one, and asking costs a 304.
    "console": "private, no-cache",
}

# Nine digits fit every column; a longer number is a version that nothing has.
_VERSION_TAG = re.compile(r'"v(\d{1,9})(?:-\d{1,18})?"')
_TAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')


def profile_tag(version: int) -> str:
    """Return the entity tag of a profile."""
    return f'"v{version}"'


def product_tag(version: int, revision: int) -> str:
    """Return the entity tag of a product."""
    return f'"v{version}-{revision}"'


def profile_tag_of(entry: Entry) -> str:
    """Return the entity tag of a cached profile."""
    return profile_tag(entry.version)


def product_tag_of(entry: Entry) -> str:
    """Return the entity tag of a cached product.

    The entry carries the revision; the version stands in the bytes, where no text of the product can forge it.
    """
    return product_tag(wire.decode(entry.body or b"{}")["version"], entry.version)


def version_from(if_match: str | None) -> int:
    """Return the version that a caller's `If-Match` names.

    Raises:
        PreconditionRequired: without the header.
        Invalid: `invalid_if_match`, if it is not one entity tag.
        PreconditionFailed: if it is a tag that nothing of ours can have now.
    """
    if if_match is None:
        raise PreconditionRequired("Say which version you change: send If-Match with the ETag that you have read.")
    tag = if_match.strip()
    if not _TAG.fullmatch(tag):
        raise Invalid.field(
            "header/If-Match", 'Send the one ETag that you have read, with its quotes: "v3".', code="invalid_if_match"
        )
    found = _VERSION_TAG.fullmatch(tag)
    if found is None:
        raise PreconditionFailed("If-Match names no version of this resource; read it again, then change it.")
    return int(found[1])


def written(
    content: bytes | Mapping[str, Any],
    *,
    status: int = 200,
    tag: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return the answer to a write, or any other that nobody keeps.

    Args:
        content: JSON bytes as they are, or what to write as such.
        status: the status.
        tag: the entity tag of what `content` shows.
        headers: further headers.
    """
    body = content if isinstance(content, bytes) else wire.encode(content)
    return Response(body, status, {**(headers or {}), **({"ETag": tag} if tag else {})}, JSON)


def read(request: Request, content: bytes | Mapping[str, Any], *, tag: str, caching: str) -> Response:
    """Return the answer to a read of one resource: whole, or 304 if the caller has it already.

    Args:
        request: says in `If-None-Match` what the caller has.
        content: JSON bytes as they are, or what to write as such.
        tag: the entity tag of `content`.
        caching: a key of `CACHING`.
    """
    headers = {"ETag": tag, "Cache-Control": CACHING[caching]}
    if has(request.headers.get("if-none-match"), tag):
        return Response(status_code=304, headers=headers)
    body = content if isinstance(content, bytes) else wire.encode(content)
    return Response(body, 200, headers, JSON)


def profile_read(request: Request, entry: Entry) -> Response:
    """Return the public view of a profile.

    Raises:
        NotFound: if there is none.
    """
    if entry.body is None:
        raise NotFound("There is no such profile.")
    return read(request, entry.body, tag=profile_tag_of(entry), caching="profile")


def product_read(request: Request, entry: Entry) -> Response:
    """Return a product.

    Raises:
        NotFound: if there is none.
    """
    if entry.body is None:
        raise NotFound("There is no such product.")
    return read(request, entry.body, tag=product_tag_of(entry), caching="product")


def product_written(product: Product, *, status: int, headers: Mapping[str, str] | None = None) -> Response:
    """Return a product that was just written."""
    return written(product.view(), status=status, tag=product_tag(product.version, product.revision), headers=headers)


def location(path: str, identifier: UUID | str) -> dict[str, str]:
    """Return the `Location` header of what was just made."""
    return {"Location": f"{path}/{identifier}"}


def has(if_none_match: str | None, tag: str) -> bool:
    """Return whether a caller's `If-None-Match` names `tag`.

    The comparison is the weak one, as RFC 9110 asks for reads: a proxy that compresses marks our tags as weak.
    """
    if if_none_match is None:
        return False
    if if_none_match.strip() == "*":
        return True
    return tag in {candidate.removeprefix("W/") for candidate in _TAG.findall(if_none_match)}
