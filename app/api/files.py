"""`/files`: objects of a storage that is a folder, behind short-lived links of our own.

A bucket signs its links itself, and then nobody comes here. Whoever has a link has the file, as with a bucket's: it
names the object and its end, and cannot be changed.
"""

from pathlib import PurePosixPath
from time import time
from typing import Annotated

from fastapi import APIRouter, Path, Response

from app.api.dependencies import ResourcesDep
from app.api.problems import responses
from app.api.representations import CACHING
from app.core.signing import LONGEST
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
    headers = {"Content-Disposition": f'{shown}; filename="{key.name}"', "Cache-Control": CACHING["file"]}
    return Response(content, headers=headers, media_type=media_type)
