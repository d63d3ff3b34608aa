"""Avatars and assets: a link for an upload straight to the object storage, and the way to what is shown.

An asset's key names its content, so the answer that leads to it may be kept: for a day, which is how long a copy may
outlive its erasure. Whether it is still shown its profile says, which the cache knows; no storage is asked.
"""

import re
from datetime import datetime
from time import time
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel, Field

from app.api.bodies import JsonRoute
from app.api.dependencies import OwnProfile, ResourcesDep
from app.api.fields import Body, Count
from app.api.problems import responses
from app.api.representations import CACHING, has, written
from app.core import wire
from app.core.errors import NotFound
from app.domain.profiles.avatars import LARGEST

router = APIRouter(
    prefix="/api/v1", tags=["Profiles"], route_class=JsonRoute, responses=responses(422, 429, 500, 503, 504)
)

_AVATAR = re.compile(r"avatars/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})/([0-9a-f]{32})\.webp")


class AvatarGiven(Body):
    """What you are going to upload."""

    content_type: Literal["image/jpeg", "image/png", "image/webp"]
    size: Annotated[Count, Field(ge=1, le=LARGEST, description="In bytes.", examples=[48_213])]


class UploadView(BaseModel):
    """Where and how to upload it, and until when."""

    upload_url: str
    method: Literal["PUT"]
    headers: dict[str, str]
    expires_at: datetime


@router.put(
    "/profiles/{profile_id}/avatar",
    status_code=201,
    response_model=UploadView,
    operation_id="uploadAvatar",
    summary="Upload my avatar",
    responses=responses(400, 401, 403, 413, 415),
)
async def upload(profile_id: OwnProfile, body: AvatarGiven, resources: ResourcesDep) -> Response:
    """Say where to send the picture: with this method and these headers, within a few minutes.

    It is looked at when it has arrived; if it is what you announced, `avatar_url` leads to it some seconds later. A
    JPEG may have 24 megapixels, a progressive one 4, a PNG 8 and with transparency 4, a WebP 2.
    """
    link = await resources.avatars.expect(profile_id, body.content_type, body.size)
    view = {"upload_url": link.url, "method": "PUT", "headers": link.headers, "expires_at": link.expires_at}
    return written(view, status=201)


@router.get(
    "/assets/{key:path}",
    status_code=302,
    response_class=Response,
    operation_id="getAsset",
    summary="An asset",
    responses={304: {"description": "You have it."}, **responses(404)},
)
async def asset(
    request: Request,
    key: Annotated[str, Path(max_length=200, description="What `avatar_url` ends in.")],
    resources: ResourcesDep,
) -> Response:
    """Lead to the asset in the storage, or the content network, that is next to this region."""
    named = _AVATAR.fullmatch(key)
    shown = None if named is None else (await resources.profiles.public(UUID(named[1]))).body
    if named is None or shown is None or wire.decode(shown)["avatar_url"] != request.url.path:
        raise NotFound("There is no such asset.")
    headers = {"ETag": f'"{named[2]}"', "Cache-Control": CACHING["asset"]}
    if has(request.headers.get("if-none-match"), headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(status_code=302, headers={**headers, "Location": await resources.storage.address(key, time())})
