"""`/files`: objects of a storage that is a folder, behind short-lived links of our own, to fetch and to put one.

A bucket signs its links itself, and then nobody comes here. Whoever has a link has the file, as with a bucket's: it
names the object and its end, and cannot be changed.
"""

from pathlib import PurePosixPath
from time import time
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from app.api.dependencies import ResourcesDep
from app.api.problems import responses
from app.api.representations import CACHING
from app.core.errors import Invalid, TooLarge
from app.core.signing import LONGEST
from app.domain.profiles.avatars import AVATARS
from app.scaling.storage import LINK_PATH

router = APIRouter(tags=["Files"])

# What we store. Anything else is handed out as bytes that no browser opens by itself.
_TYPES = {
    ".pdf": "application/pdf",
    ".csv": "text/csv",
    ".json": "application/json",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".webp": "image/webp",
}

Signed = Annotated[str, Path(max_length=LONGEST, description="What a link of ours ends in.")]


@router.get(
    LINK_PATH + "/{signed}",
    response_class=Response,
    operation_id="getFile",
    summary="A stored file",
    responses=responses(404, 422, 429, 500, 503, 504),
)
async def get(signed: Signed, resources: ResourcesDep) -> Response:
    """Return the object that the link names, while the link lives."""
    key = PurePosixPath(resources.storage.open_link(signed, time()))
    content = await resources.storage.get(str(key))
    media_type = _TYPES.get(key.suffix, "application/octet-stream")
    # Keys are ours: the last part has no quotes and no line breaks.
    shown = "inline" if key.suffix in _TYPES else "attachment"
    caching = CACHING["asset" if key.parts[0] == AVATARS else "file"]
    headers = {"Content-Disposition": f'{shown}; filename="{key.name}"', "Cache-Control": caching}
    return Response(content, headers=headers, media_type=media_type)


@router.put(
    LINK_PATH + "/{signed}",
    response_class=Response,
    operation_id="putFile",
    summary="Upload a file",
    responses=responses(404, 413, 422, 429, 500, 503, 504),
)
async def put(request: Request, signed: Signed, resources: ResourcesDep) -> Response:
    """Store what a link for an upload allows: this object, of this type, not larger; sent again it is stored again."""
    key, content_type, size = resources.storage.open_upload(signed, time())
    if request.headers.get("content-type") != content_type:
        raise Invalid.field("header/Content-Type", f"This link is for {content_type}, as you have announced.")
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > size:
            raise TooLarge(f"You have announced {size} bytes, and this is more.")
    await resources.storage.put(key, bytes(content), content_type)
    return Response()
