"""`/api/v1/profiles`: sign-up, the public and the own view, search, change and erasure."""

from datetime import datetime
from typing import Annotated, Any, Self
from uuid import UUID

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field, field_validator, model_validator
from zxcvbn import zxcvbn

from app.api.bodies import JsonRoute
from app.api.dependencies import Caller, ExchangeDep, OwnProfile, ReadVersion, ResourcesDep
from app.api.exchange import session_cookie
from app.api.fields import Attributes, Body, Email, Name, PageCursor, PageLimit, QueryText, Text, not_null
from app.api.hotpath import pages_of
from app.api.problems import responses
from app.api.representations import location, profile_read, profile_tag, read, written
from app.core.errors import Invalid, Unavailable
from app.domain.profiles.rules import Location, NewProfile, Profile

PATH = "/api/v1/profiles"
router = APIRouter(
    prefix=PATH, tags=["Profiles"], route_class=JsonRoute, responses=responses(400, 422, 429, 500, 503, 504)
)

# zxcvbn's scale: 0 and 1 fall to an online attack with a good list; 2 withstands it, and Argon2id covers the rest.
_LOWEST_SCORE = 2
# What zxcvbn looks at. Its work grows with every way to read digits and signs as letters: for the worst 24 characters
# that is 0.2 s of a core, for 72 it is 2 s. A password is never weaker than its beginning.
_JUDGED = 24  # characters
# zxcvbn keeps the words of the person in a global: one password at a time.
_judging = CapacityLimiter(1)
_MOST_WAITING = 16  # sign-ups; the last of them still is answered within the deadline of 10 s

Password = Annotated[str, Field(min_length=8, max_length=128, examples=["correct horse battery"])]
Bio = Annotated[str, Field(max_length=2000, examples=["Wrote the first program."]), Text]


class Place(Body):
    """A place on Earth, in degrees."""

    lat: Annotated[float, Field(strict=True, ge=-90, le=90, allow_inf_nan=False, examples=[51.5])]
    lon: Annotated[float, Field(strict=True, ge=-180, le=180, allow_inf_nan=False, examples=[-0.13])]


class SignUp(Body):
    """What a person gives at sign-up."""

    email: Email
    password: Password
    name: Name
    bio: Bio | None = None
    location: Place | None = None
    attributes: Attributes = Field(default_factory=dict)


class ProfileChange(Body):
    """What of a profile changes; null clears, what is left out stays, `attributes` are replaced as a whole."""

    name: Name | None = None
    bio: Bio | None = None
    location: Place | None = None
    attributes: Attributes | None = None

    _not_null = field_validator("name", "attributes", mode="before")(not_null)

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("Name at least one field to change: name, bio, location or attributes.")
        return self

    def changes(self) -> dict[str, Any]:
        """Return the named fields as the domain takes them."""
        values: dict[str, Any] = self.model_dump(include=self.model_fields_set)
        if self.location is not None:
            values["location"] = Location(self.location.lat, self.location.lon)
        return values


class PublicView(BaseModel):
    """A profile as anybody may see it."""

    id: UUID
    name: str
    bio: str | None
    tier: str
    avatar_url: str | None
    version: int
    created_at: datetime
    updated_at: datetime


class OwnView(PublicView):
    """A profile as the person themselves sees it."""

    email: str
    location: Place | None
    attributes: dict[str, Any]


class PublicPage(BaseModel):
    """A page of profiles, newest first."""

    items: list[PublicView]
    next_cursor: str | None


@router.post(
    "",
    status_code=201,
    response_model=OwnView,
    operation_id="signUp",
    summary="Sign up",
    responses=responses(409, 413, 415),
)
async def sign_up(body: SignUp, resources: ResourcesDep) -> Response:
    """Create a profile. Sign in afterwards with `POST /api/v1/sessions`."""
    await _check_password(body)
    place = None if body.location is None else Location(body.location.lat, body.location.lon)
    profile = await resources.profiles.sign_up(
        NewProfile(body.email, body.password, body.name, body.bio, place, body.attributes)
    )
    return _own(profile, status=201, headers=location(PATH, profile.id))


@router.get("/me", response_model=OwnView, operation_id="getMyProfile", summary="My profile", responses=responses(401))
async def me(request: Request, caller: Caller, resources: ResourcesDep) -> Response:
    """Return your own profile, whole."""
    profile = await resources.profiles.own(caller.profile_id)
    return read(request, profile.own_view(), tag=profile_tag(profile.version), caching="profile")


@router.get(
    "/{profile_id}",
    response_model=PublicView,
    operation_id="getProfile",
    summary="A profile",
    responses=responses(404),
)
async def get(request: Request, profile_id: UUID, resources: ResourcesDep) -> Response:
    """Return what anybody may see of a profile; 304 if you name its ETag in `If-None-Match`."""
    return profile_read(request, await resources.profiles.public(profile_id))


@router.get("", response_model=PublicPage, operation_id="listProfiles", summary="Search profiles")
async def listed(
    request: Request,
    resources: ResourcesDep,
    *,
    name_prefix: Annotated[
        str | None, Query(max_length=100, description="Names that begin so, in any case."), QueryText
    ] = None,
    attribute: Annotated[
        str | None,
        Query(
            max_length=322,
            description="Profiles with this attribute.",
            examples=["language:en"],
            json_schema_extra={"pattern": "^[^:]+:"},
        ),
        QueryText,
    ] = None,
    limit: PageLimit = 20,
    cursor: PageCursor = None,
) -> Response:
    """Return public views, newest first."""
    found = resources.profiles.listed(name_prefix, _key_and_value(attribute), limit, cursor)
    return await pages_of(request.scope).answer(request, found)


@router.patch(
    "/{profile_id}",
    response_model=OwnView,
    operation_id="changeProfile",
    summary="Change my profile",
    responses=responses(401, 403, 404, 412, 413, 415, 428),
)
async def change(
    profile_id: OwnProfile, version: ReadVersion, body: ProfileChange, resources: ResourcesDep
) -> Response:
    """Change some fields of the version that you have read, named by `If-Match`."""
    return _own(await resources.profiles.change(profile_id, version, body.changes()))


@router.delete(
    "/{profile_id}",
    status_code=204,
    operation_id="eraseProfile",
    summary="Erase my profile",
    responses=responses(401, 403, 404, 412, 428),
)
async def erase(
    profile_id: OwnProfile, version: ReadVersion, resources: ResourcesDep, exchange: ExchangeDep
) -> Response:
    """Erase the personal data and end all sessions. Orders stay, without it."""
    await resources.profiles.erase(profile_id, version)
    await resources.sessions.end_all(profile_id)
    exchange.cookie = session_cookie("", 0, resources.settings.service)
    return Response(status_code=204)


def _own(profile: Profile, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return written(profile.own_view(), status=status, tag=profile_tag(profile.version), headers=headers)


def _key_and_value(attribute: str | None) -> tuple[str, str] | None:
    if attribute is None:
        return None
    key, colon, value = attribute.partition(":")
    if not (key and colon):
        raise Invalid.field("query/attribute", "Must be key:value, like language:en.")
    return key, value


async def _check_password(body: SignUp) -> None:
    """Refuse a password that a list of common ones, or the person's own address and name, would give away.

    Raises:
        Invalid: with the advice of zxcvbn.
        Unavailable: `judging_busy`, past the bound.
    """
    if _judging.statistics().tasks_waiting >= _MOST_WAITING:
        raise Unavailable("Too many people are signing up right now; try again.", code="judging_busy")
    own_words = [body.email, *body.email.split("@"), body.name, *body.name.split()]
    judged = await to_thread.run_sync(lambda: zxcvbn(body.password[:_JUDGED], own_words), limiter=_judging)
    if judged["score"] < _LOWEST_SCORE:
        feedback = judged["feedback"]
        advice = " ".join([feedback["warning"], *feedback["suggestions"]]).strip()
        raise Invalid.field("/password", f"This password is easy to guess. {advice}".strip(), code="weak_password")
