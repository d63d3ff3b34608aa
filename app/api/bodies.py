"""JSON bodies, read strictly: one reading of every byte, or a problem that says what is wrong with it.

What JSON readers disagree on is refused before anything is decided on it: duplicate names, NaN, lone surrogates, NUL
characters, other encodings, and nesting deeper than any body of this API.
"""

import json
import re
from collections.abc import Callable, Coroutine
from functools import lru_cache
from typing import Any, NoReturn

from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Receive, Scope

from app.core.errors import FieldError, Invalid

FIXED = frozenset({"me", "search"})  # paths that stand where other routes have an id
DEEPEST = 16  # levels; the deepest body of this API has four
_JSON_TYPE = re.compile(r"application/(?:[\w.!#$&^-]+\+)*json", re.ASCII)
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


class JsonRequest(Request):
    """A request whose body is read by `parse`, once, before the framework asks for it."""

    _value: Any = None

    async def parse(self) -> None:
        """Read the body.

        Raises:
            Invalid: as from `read_json`.
        """
        self._body, self._value = await read_json(self.scope, self.receive)

    async def json(self) -> Any:
        """Return what `parse` has read."""
        return self._value


class JsonRoute(APIRoute):
    """A route that takes its body, if it has one, as strict JSON, and no fixed name of a sibling for an id."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Leave a sibling's path to the sibling: what it lacks is 405, not a bad id. Starlette's method."""
        match, child = super().matches(scope)
        if not FIXED.isdisjoint(map(str, child.get("path_params", {}).values())):
            return Match.NONE, {}
        return match, child

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Read the body strictly, then go on as every route does. See FastAPI, "Custom Request and APIRoute class"."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def read_and_handle(request: Request) -> Response:
            strict = JsonRequest(request.scope, request.receive)
            await strict.parse()
            return await handle(strict)

        return read_and_handle


async def read_json(scope: Scope, receive: Receive) -> tuple[bytes, Any]:
    """Return the body of a request and its value; of none at all, None.

    Raises:
        Invalid: `unsupported_media_type`, `invalid_json`, or the string that holds what no string may.
        ClientDisconnect: if the client is gone before its body is whole.
    """
    parts: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    body = b"".join(parts)
    if not body:
        return body, None
    _check_headers(Headers(scope=scope))
    return body, parse_json(body)


def parse_json(body: bytes) -> Any:
    """Return the value of a JSON text in UTF-8.

    Raises:
        Invalid: `invalid_json`, or with the pointer of a string that holds a NUL or half a character.
    """
    try:
        value = _DECODER.decode(body.decode())
    except RecursionError as error:
        raise _too_deep() from error
    except _NamedTwice as error:
        raise Invalid("The body names a field of an object twice; name it once.", code="invalid_json") from error
    except ValueError as error:  # not JSON, not UTF-8, NaN, or a number with thousands of digits
        raise Invalid("The body is not valid JSON in UTF-8.", code="invalid_json") from error
    # What no string may hold cannot stand in UTF-8 or in a JSON string as it is, only as an escape; and what opens no
    # more than so many objects and lists nests no deeper. Nearly every body is one of which that is seen at once.
    if b"\\u" in body or body.count(b"{") + body.count(b"[") > DEEPEST:
        _check_strings(value)
    return value


class _NamedTwice(ValueError):
    """An object names a field twice; readers disagree on which one counts."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _NamedTwice
    return fields


def _constant(name: str) -> NoReturn:
    raise ValueError(name)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _too_deep() -> Invalid:
    return Invalid(f"The body nests deeper than {DEEPEST} levels.", code="invalid_json")


def _check_strings(value: Any) -> None:
    # A stack of our own: the value may be nested as deep as the parser allows.
    waiting: list[tuple[Any, str, int]] = [(value, "", 0)]
    while waiting:
        value, pointer, depth = waiting.pop()
        if depth > DEEPEST:
            raise _too_deep()
        if isinstance(value, str):
            if not is_text(value):
                raise _not_text(pointer)
        elif isinstance(value, dict):
            for name, member in value.items():
                if not is_text(name):
                    raise _not_text(pointer)
                waiting.append((member, f"{pointer}/{name.replace('~', '~0').replace('/', '~1')}", depth + 1))
        elif isinstance(value, list):
            waiting += [(member, f"{pointer}/{index}", depth + 1) for index, member in enumerate(value)]


def is_text(value: str) -> bool:
    """Return whether databases and other programs can hold the string: no NUL, no half of a surrogate pair."""
    return _NO_TEXT.search(value) is None


def _not_text(pointer: str) -> Invalid:
    detail = "Must be Unicode text without NUL characters."
    return Invalid(detail, fields=(FieldError(pointer, detail),))


def _check_headers(headers: Headers) -> None:
    if not _is_json(headers.get("content-type", "")):
        raise Invalid.field(
            "header/Content-Type", "Send the body as application/json in UTF-8.", code="unsupported_media_type"
        )
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise Invalid.field(
            "header/Content-Encoding", "Send the body without compression.", code="unsupported_media_type"
        )


# Nearly all clients send one of a few.
@lru_cache(maxsize=64)
def _is_json(content_type: str) -> bool:
    # Not with the standard library's reader of mail: it fails on some of what no mail would say.
    kind, *parameters = content_type.lower().split(";")
    pairs = (parameter.partition("=") for parameter in parameters)
    # However it is written: RFC 2231 has it in parts and with an encoding of its own, which nobody needs here.
    charsets = {value.strip().strip('"') for name, _, value in pairs if name.strip().partition("*")[0] == "charset"}
    return _JSON_TYPE.fullmatch(kind.strip()) is not None and charsets <= {"utf-8", "utf8", "us-ascii"}
