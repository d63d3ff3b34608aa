"""What routes ask for, as annotated types: the resources, the caller, who may be the caller, preconditions and keys.

A route that names `Caller` cannot be reached without a session, one that names `AdminCaller` not without the role; so
the signature of a route says who may call it, and the documentation reads it from there. What FastAPI has to know of
them stands in their parameters; each is read from the scope by one function, which `READERS` names.
"""

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any
from uuid import UUID

from fastapi import Depends, Header, Path, Request
from fastapi.security import APIKeyCookie, HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import Scope

from app.api.exchange import SESSION_COOKIE, Exchange, exchange_of, resources_of, within
from app.api.representations import version_from
from app.core.errors import Forbidden, Invalid, Unauthenticated
from app.domain.profiles.rules import ADMIN
from app.domain.sessions.rules import Session
from app.wiring import Resources

_KEY = re.compile(r"[\x21-\x7e]{1,255}")

# Only for the documentation: the middleware has read both already, whatever the route.
_bearer = HTTPBearer(auto_error=False, scheme_name="Bearer", description="`token` of POST /sessions.")
_cookie = APIKeyCookie(
    name=SESSION_COOKIE,
    auto_error=False,
    scheme_name="Cookie",
    description="Set by POST /sessions. A request that changes something then needs a same-origin Origin.",
)


def caller_of(scope: Scope) -> Session:
    """Return the session of the caller.

    Raises:
        Unauthenticated: if there is none.
    """
    session = exchange_of(scope).session
    if session is None:
        raise Unauthenticated("Sign in: POST /api/v1/sessions, then send the token as Authorization: Bearer <token>.")
    return session


def admin_of(scope: Scope) -> Session:
    """Return the session of an administrator.

    Raises:
        Unauthenticated: if nobody is signed in.
        Forbidden: if somebody else is.
    """
    session = caller_of(scope)
    if session.role != ADMIN:
        raise Forbidden("Only an administrator may do this.")
    return session


def trusted_admin_of(scope: Scope) -> Session:
    """Return the session of an administrator who comes from an address that is allowed.

    Raises:
        Unauthenticated: if nobody is signed in.
        Forbidden: if somebody else is, or from elsewhere.
    """
    session = admin_of(scope)
    check_trusted_address(scope)
    return session


def check_trusted_address(scope: Scope) -> None:
    """Let pass who comes from an address that may administer.

    Raises:
        Forbidden: if it may not.
    """
    if not within(exchange_of(scope).address, resources_of(scope).settings.service.admin_allow):
        raise Forbidden("Administration is not allowed from this address.")


def idempotency_key_of(scope: Scope) -> str:
    """Return the caller's name for the request.

    Raises:
        Invalid: `idempotency_key_missing` or `idempotency_key_invalid`.
    """
    keys = Headers(scope=scope).getlist("idempotency-key")
    if not keys:
        raise Invalid.field(
            "header/Idempotency-Key",
            "Send an Idempotency-Key, a fresh one for each order: then it is safe to send the request again.",
            code="idempotency_key_missing",
        )
    if len(keys) > 1 or not _KEY.fullmatch(keys[0]):  # of two, nobody knows under which one a try was sent before
        raise Invalid.field(
            "header/Idempotency-Key",
            "Send one Idempotency-Key, of 1 to 255 visible ASCII characters.",
            code="idempotency_key_invalid",
        )
    return keys[0]


async def _resources(request: Request) -> Resources:
    return resources_of(request.scope)


async def _exchange(request: Request) -> Exchange:
    return exchange_of(request.scope)


async def _caller(
    request: Request,
    _bearer_token: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    _cookie_token: Annotated[str | None, Depends(_cookie)],
) -> Session:
    return caller_of(request.scope)


async def _admin(request: Request, _session: Annotated[Session, Depends(_caller)]) -> Session:
    return admin_of(request.scope)


async def _trusted_admin(request: Request, _session: Annotated[Session, Depends(_admin)]) -> Session:
    return trusted_admin_of(request.scope)


async def _own_profile(
    profile_id: Annotated[UUID, Path(description="Your own profile.")],
    session: Annotated[Session, Depends(_caller)],
) -> UUID:
    if session.profile_id != profile_id:
        raise Forbidden("Only the person whose profile this is may do this.")
    return profile_id


async def _version(
    if_match: Annotated[
        str | None,
        Header(
            alias="If-Match",
            description="The ETag that you have read.",
            examples=['"v1"'],
            json_schema_extra={"pattern": r'^"v[0-9]{1,9}(-[0-9]{1,18})?"$'},
        ),
    ] = None,
) -> int:
    return version_from(if_match)


async def _idempotency_key(
    request: Request,
    _key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            description="Your name for this request, 1 to 255 visible ASCII characters: sent again, it happens once.",
            examples=["order-2026-11-21-0001"],
            json_schema_extra={"pattern": "^[!-~]{1,255}$"},
        ),
    ] = None,
) -> str:
    return idempotency_key_of(request.scope)


READERS: Mapping[Callable[..., Any], Callable[[Scope], Any]] = {
    _resources: resources_of,
    _exchange: exchange_of,
    _caller: caller_of,
    _admin: admin_of,
    _trusted_admin: trusted_admin_of,
    _idempotency_key: idempotency_key_of,
}
"""What each dependency reads, and from where, for whoever asks without FastAPI; see `direct.py`."""

ResourcesDep = Annotated[Resources, Depends(_resources)]
ExchangeDep = Annotated[Exchange, Depends(_exchange)]
Caller = Annotated[Session, Depends(_caller)]
AdminCaller = Annotated[Session, Depends(_admin)]
TrustedAdmin = Annotated[Session, Depends(_trusted_admin)]
OwnProfile = Annotated[UUID, Depends(_own_profile)]
ReadVersion = Annotated[int, Depends(_version)]
IdempotencyKey = Annotated[str, Depends(_idempotency_key)]
