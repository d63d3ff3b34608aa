"""JSON as it is sent, stored and cached: one encoding for all, so that the same value is always the same bytes.

Times are RFC 3339 in UTC with a Z, ids their canonical text. What JSON cannot say raises instead of becoming a string
by accident.
"""

from datetime import datetime
from typing import Any
from uuid import UUID

import orjson


def encode(value: Any, *, sort: bool = False) -> bytes:
    """Return `value` as JSON bytes, with sorted keys if `sort`: then equal values are equal bytes.

    Raises:
        TypeError: for a value that JSON cannot say.
    """
    return orjson.dumps(value, default=_plain, option=orjson.OPT_UTC_Z | (orjson.OPT_SORT_KEYS if sort else 0))


def decode(raw: bytes | str) -> Any:
    """Return what the JSON says.

    Raises:
        ValueError: if it is not JSON.
    """
    return orjson.loads(raw)


def rfc3339(moment: datetime) -> str:
    """Return a UTC moment as clients see it, to the millisecond."""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _plain(value: Any) -> str:
    if isinstance(value, UUID):  # a driver's own subclass of it, which orjson does not know
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
