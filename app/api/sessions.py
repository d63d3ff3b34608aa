"""`/api/v1/sessions`: signing in, seeing where one is signed in, signing out, here or everywhere."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Header, Request, Response
from pydantic import BaseModel, Field

from app.api.bodies import JsonRoute
from app.api.dependencies import Caller, ExchangeDep, ResourcesDep
from app.api.exchange import Exchange, limit_subject, session_cookie
from app.api.fields import Body, Email
from app.api.limits import Limits, limits_of
from app.api.problems import responses
from app.api.representations import written
from app.domain.profiles.rules import email_key
from app.wiring import Resources

router = APIRouter(
    prefix="/api/v1/sessions",
    tags=["Sessions"],
    route_class=JsonRoute,
    responses=responses(400, 401, 422, 429, 500, 503, 504),
)


class SignIn(Body):
    """An address and its password."""

    email: Email
    password: Annotated[str, Field(min_length=1, max_length=128, examples=["correct horse battery"])]


class SignedInView(BaseModel):
    """A fresh session. The token is shown once and kept nowhere.

    A profile has a bounded number of sessions: `ended_sessions` are those that had to go for this one, the ones that
    were not used for longest.
    """

    token: str
    profile_id: UUID
    expires_at: datetime
    ended_sessions: list[UUID]


class SessionView(BaseModel):
    """One of the sessions of a profile; `current` is the one that asks."""

    id: UUID
    created_at: datetime
    last_seen_at: datetime
    expires_at: datetime
    user_agent: str
    current: bool


class SessionPage(BaseModel):
    """All sessions of a profile, newest first."""

    items: list[SessionView]
    next_cursor: None


@router.post(
    "",
    status_code=201,
    response_model=SignedInView,
    operation_id="signIn",
    summary="Sign in",
    responses=responses(403, 413, 415),
)
async def sign_in(
    request: Request,
    body: SignIn,
    resources: ResourcesDep,
    exchange: ExchangeDep,
    user_agent: Annotated[str, Header(include_in_schema=False)] = "",
) -> Response:
    """Begin a session: a token for programs, and the same as an HttpOnly cookie for browsers."""
    await _count(body.email, resources, exchange, limits_of(request.scope))
    try:
        signed_in = await resources.sessions.sign_in(body.email, body.password, _printable(user_agent))
    finally:
        # Server-Timing would tell what the hash hides: whether there was a profile to read.
        exchange.work.spans.clear()
    session = signed_in.session
    # From here on the request is this person's: what it wrote is remembered for all their later requests.
    exchange.work.profile_id = session.profile_id
    seconds = int((session.expires_at - session.created_at).total_seconds())
    exchange.cookie = session_cookie(signed_in.token, seconds, resources.settings.service)
    return written(
        {
            "token": signed_in.token,
            "profile_id": session.profile_id,
            "expires_at": session.expires_at,
            "ended_sessions": signed_in.ended,
        },
        status=201,
    )


@router.get("", response_model=SessionPage, operation_id="listSessions", summary="My sessions")
async def listed(caller: Caller, resources: ResourcesDep) -> Response:
    """Return where you are signed in."""
    items = [
        {
            **{name: value for name, value in found.items() if name != "key"},
            "current": found["key"] == caller.key,
        }
        for found in await resources.sessions.listed(caller.profile_id)
    ]
    return written({"items": items, "next_cursor": None})


@router.delete("/current", status_code=204, operation_id="signOut", summary="Sign out", responses=responses(403))
async def end_current(caller: Caller, resources: ResourcesDep, exchange: ExchangeDep) -> Response:
    """End the session that you call with."""
    await resources.sessions.end(caller)
    exchange.cookie = session_cookie("", 0, resources.settings.service)
    return Response(status_code=204)


@router.delete(
    "", status_code=204, operation_id="signOutEverywhere", summary="Sign out everywhere", responses=responses(403)
)
async def end_all(caller: Caller, resources: ResourcesDep, exchange: ExchangeDep) -> Response:
    """End all your sessions, on every instance at once."""
    await resources.sessions.end_all(caller.profile_id)
    exchange.cookie = session_cookie("", 0, resources.settings.service)
    return Response(status_code=204)


async def _count(email: str, resources: Resources, exchange: Exchange, limits: Limits) -> None:
    """Count the try against the address and against the account, before a hash is spent on it.

    The account is counted under a keyed hash, so that a copy of Redis does not tell who signs in.
    """
    account = email_key(resources.settings.service.secret, email)
    for subject in (limit_subject(exchange.address), account):
        await limits.count(exchange, resources.limiter, limits.sign_in, subject)


def _printable(user_agent: str) -> str:
    return "".join(character for character in user_agent if character.isprintable())
