"""Keyset pages: a page is found by where the last one ended, so page 1,000 costs what page 1 costs.

Cursors are opaque and signed for the list that they came from; one of another list, or one that was changed, is
refused. Ids sort by creation, so a cursor over a list by age is one id.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from uuid import UUID

from app.core.errors import Invalid
from app.core.signing import BadSignature, Signer

T = TypeVar("T")
U = TypeVar("U")

DEFAULT_LIMIT = 20
LARGEST_LIMIT = 100


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page: at most `limit` items, and the cursor of the next page or None at the end."""

    items: tuple[T, ...]
    next_cursor: str | None


class Cursors:
    """Makes and opens cursors.

    Args:
        secret: the service's secret.
    """

    def __init__(self, secret: bytes) -> None:
        self._signer = Signer(secret, "cursor")

    def page(
        self, scope: str, rows: Sequence[U], limit: int, key: Callable[[U], Any], item: Callable[[U], T]
    ) -> Page[T]:
        """Turn up to `limit` + 1 rows into a page; the row past the limit only says that there is a next one.

        Args:
            scope: the list and its filters; a cursor of another scope is refused.
            rows: in the list's order.
            limit: items on a page.
            key: what of a row the next page starts after; anything JSON can say.
            item: what of a row the page shows.
        """
        shown = rows[:limit]
        more = len(rows) > limit
        return Page(
            items=tuple(item(row) for row in shown),
            next_cursor=self._signer.sign([_mark(scope), key(shown[-1])]) if more else None,
        )

    def open(self, scope: str, cursor: str | None) -> Any:
        """Return the key inside `cursor`, or None without one.

        Raises:
            Invalid: with code `invalid_cursor`, if it is not one that this list gave out.
        """
        if cursor is None:
            return None
        try:
            found, key = self._signer.open(cursor)
        except (BadSignature, ValueError, TypeError):
            found, key = None, None
        if found != _mark(scope):
            raise Invalid.field(
                "query/cursor",
                "This cursor is not one that this list gave out; start again without a cursor.",
                code="invalid_cursor",
            )
        return key

    def open_id(self, scope: str, cursor: str | None) -> UUID | None:
        """Return the id inside `cursor`, for lists whose key is an id."""
        key = self.open(scope, cursor)
        return None if key is None else UUID(key)


def _mark(scope: str) -> str:
    # A scope holds what people type, up to the largest query; its digest keeps every cursor short.
    return hashlib.blake2b(scope.encode(), digest_size=8).hexdigest()
