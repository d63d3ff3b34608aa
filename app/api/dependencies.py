"""What routes ask for, as annotated types: the resources, the caller, who may be the caller, preconditions and keys.

A route that names `Caller` cannot be reached without a session, one that names `AdminCaller` not without the role; so
the signature of a route says who may call it, and the documentation reads it from there.
"""

import re
from typing import Annotated
from uuid import UUID

from fastapi import Depends, Header, Path, Request
from fastapi.security import APIKeyCookie, HTTPAuthorizationCredentials, HTTPBearer

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


async def _resources(request: Request) -> Resources:
    return resources_of(request.scope)


async def _exchange(request: Request) -> Exchange:
    return exchange_of(request.scope)


async def _caller(
    request: Request,
    _bearer_token: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    _cookie_token: Annotated[str | None, Depends(_cookie)],
) -> Session:
    session = exchange_of(request.scope).session
    if session is None:
        raise Unauthenticated("Sign in: POST /api/v1/sessions, then send the token as Authorization: Bearer <token>.")
    return session


async def _admin(session: Annotated[Session, Depends(_caller)]) -> Session:
    if session.role != ADMIN:
        raise Forbidden("Only an administrator may do this.")
    return session


async def _trusted_admin(
    session: Annotated[Session, Depends(_admin)],
    exchange: Annotated[Exchange, Depends(_exchange)],
    resources: Annotated[Resources, Depends(_resources)],
) -> Session:
    if not within(exchange.address, resources.settings.service.admin_allow):
        raise Forbidden("Administration is not allowed from this address.")
    return session


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
    key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            description="Your name for this request, 1 to 255 visible ASCII characters: sent again, it happens once.",
            examples=["order-2026-11-21-0001"],
            json_schema_extra={"pattern": "^[!-~]{1,255}$"},
        ),
    ] = None,
) -> str:
    if key is None:
        raise Invalid.field(
            "header/Idempotency-Key",
            "Send an Idempotency-Key, a fresh one for each order: then it is safe to send the request again.",
            code="idempotency_key_missing",
        )
    if not _KEY.fullmatch(key):
        raise Invalid.field(
            "header/Idempotency-Key",
            "An Idempotency-Key has 1 to 255 visible ASCII characters.",
            code="idempotency_key_invalid",
        )
    return key


ResourcesDep = Annotated[Resources, Depends(_resources)]
ExchangeDep = Annotated[Exchange, Depends(_exchange)]
Caller = Annotated[Session, Depends(_caller)]
AdminCaller = Annotated[Session, Depends(_admin)]
TrustedAdmin = Annotated[Session, Depends(_trusted_admin)]
OwnProfile = Annotated[UUID, Depends(_own_profile)]
ReadVersion = Annotated[int, Depends(_version)]
IdempotencyKey = Annotated[str, Depends(_idempotency_key)]
