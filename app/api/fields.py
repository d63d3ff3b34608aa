"""The kinds of values that callers may send, with their bounds: names, addresses, attributes, money, pages.

Nothing is coerced: a number in quotes is not a number, and a field that is not asked for is refused. Bounds follow the
columns that values end in, so that nothing is accepted that cannot be stored.
"""

import math
import unicodedata
from typing import Annotated, Any

from email_validator import EmailNotValidError, validate_email
from fastapi import Query
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from app.api.bodies import is_text
from app.core.signing import LONGEST
from app.scaling.paging import LARGEST_LIMIT

_INT64 = 2**63
# Invisible characters that turn the reading direction around make a name look like another one.
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Body(BaseModel):
    """What every JSON body has in common: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


def _email(value: str) -> str:
    if not value.isascii():
        raise ValueError("Must be ASCII: two addresses that only look alike must not be two accounts.")
    try:
        # Whether the domain takes mail is for the mail to find out: a look-up here would hold up the request.
        return (
            validate_email(value, allow_smtputf8=False, check_deliverability=False, test_environment=True).ascii_email
            or ""
        )
    except EmailNotValidError as error:
        raise ValueError("Must be an e-mail address, like ada@example.com.") from error


def _line(value: str) -> str:
    if any(unicodedata.category(character) == "Cc" or character in _TURNING for character in value):
        raise ValueError("Must be one line without control characters.")
    return value


def _text(value: str) -> str:
    if any(unicodedata.category(character) == "Cc" and character not in "\n\r\t" for character in value):
        raise ValueError("Must have no control characters besides line breaks and tabs.")
    return value


def _query_text(value: str) -> str:
    if not is_text(value):
        raise ValueError("Must be Unicode text without NUL characters.")
    return value


def _attribute(value: Any) -> Any:
    """Take a scalar; a union of types would name the branch of the union instead of the field."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        if len(value) > 256:  # noqa: PLR2004  # the bound is in the message
            raise ValueError("Must have at most 256 characters.")
        return value
    if isinstance(value, int):
        if not -_INT64 <= value < _INT64:
            raise ValueError("Must fit into 64 bits.")
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise ValueError("Must be a string, a finite number or a boolean.")


def not_null(value: Any) -> Any:
    """Refuse null for an optional field of a PATCH that cannot be cleared."""
    if value is None:
        raise ValueError("Must not be null; leave it out to keep it.")
    return value


def _tidy(value: Any) -> Any:
    """Bring a name into the form that is stored, before its length counts: composing characters can make it longer."""
    return unicodedata.normalize("NFC", value).strip() if isinstance(value, str) else value


Email = Annotated[str, Field(max_length=254, examples=["ada@example.com"]), AfterValidator(_email)]
Tidy = BeforeValidator(_tidy)
Line = AfterValidator(_line)
Text = AfterValidator(_text)
Name = Annotated[str, Field(min_length=1, max_length=100, examples=["Ada Lovelace"]), Tidy, Line]
AttributeKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
AttributeValue = Annotated[
    Any,
    AfterValidator(_attribute),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "maxLength": 256}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"}]}
    ),
]
Attributes = Annotated[
    dict[AttributeKey, AttributeValue],
    Field(max_length=32, examples=[{"language": "en", "newsletter": True}]),
]
Count = Annotated[int, Field(strict=True)]
QueryText = AfterValidator(_query_text)
PageLimit = Annotated[int, Query(ge=1, le=LARGEST_LIMIT, description="Items on the page.")]
PageCursor = Annotated[
    str | None,
    # The length is told, not checked: a longer one is a bad cursor like any other, and whoever opens it says so.
    Query(
        description="`next_cursor` of the page before; leave it out for the first page.",
        json_schema_extra={"maxLength": LONGEST},
    ),
]


class Money(Body):
    """An amount of money: integer minor units (cents) and an ISO 4217 currency."""

    # Ten million in major units: the total of the largest order still is an integer that JavaScript reads exactly.
    amount: Annotated[Count, Field(ge=0, le=1_000_000_000, examples=[1999])]
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$", examples=["EUR"])]
