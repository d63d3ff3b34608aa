"""`/console`: one page that shows the whole cluster as it lives, over one stream of server-sent events.

The page and its files are for anybody at an address that may administer and hold no data; the stream is for an
administrator there. Files are sent as they lie beside this module: no build step, nothing from another host, and a
policy under which a browser runs and loads nothing else.
"""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from functools import cache
from hashlib import sha256
from importlib.resources import files
from types import MappingProxyType
from typing import Annotated, Any, cast

from fastapi import APIRouter, Depends, FastAPI, Request, Response

from app.api.dependencies import ExchangeDep, ResourcesDep, TrustedAdmin, check_trusted_address
from app.api.events import RETRY, EventsResponse, PlacesDep, session_lives
from app.api.representations import CACHING, has
from app.core import wire
from app.core.errors import NotFound
from app.core.settings import ConsoleSettings
from app.domain.sessions.rules import Session
from app.scaling.census import Census
from app.wiring import Resources, pulse_of

PATH = "/console"
# A page for people, like /docs: it is no part of the contract.
router = APIRouter(prefix=PATH, include_in_schema=False)

FILES = {
    "console.css": "text/css",
    "console.js": "text/javascript",
    "figures.js": "text/javascript",
    "picture.js": "text/javascript",
    "charts.js": "text/javascript",
    "stream.js": "text/javascript",
    "switchboard.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
# So often the stream asks whether its session has ended: as soon as a person would notice, and no load.
CENSUSES_A_LOOK = 10


def install(app: FastAPI, resources: Resources) -> Census:
    """Give `app` its census, once its resources are open; whoever installs it stops it."""
    app.state.census = Census(resources.pipe, pulse_of(resources, "api").view)
    return cast("Census", app.state.census)


async def _census(request: Request) -> Census:
    return cast("Census", request.app.state.census)


async def _allowed(request: Request, resources: ResourcesDep) -> None:
    if not resources.settings.console.enabled:
        raise NotFound("There is nothing at this address.")
    check_trusted_address(request.scope)


@router.get("", dependencies=[Depends(_allowed)])
async def page(request: Request, resources: ResourcesDep, exchange: ExchangeDep) -> Response:
    """Return the page. It says whether somebody is signed in, and whether this is a cluster to try the service out."""
    console = resources.settings.console
    filled = {b"$LOCAL": console.switchboard is not None, b"$SIGNED_IN": exchange.session is not None}
    content = _content("console.html")
    for name, is_so in filled.items():
        content = content.replace(name, b"yes" if is_so else b"no")
    return _answer(request, content, "text/html", {"Content-Security-Policy": policy_of(console)})


@router.get("/stream", dependencies=[Depends(_allowed)])
async def stream(
    admin: TrustedAdmin,
    resources: ResourcesDep,
    exchange: ExchangeDep,
    places: PlacesDep,
    census: Annotated[Census, Depends(_census)],
) -> Response:
    """Send a census twice a second, until the session ends, this instance stops, or its time is over."""
    return EventsResponse(_frames(resources, admin, census), places, admin, exchange)


def policy_of(settings: ConsoleSettings) -> str:
    """Return the page's policy: files and calls of this origin, and the switchboard of a local cluster if there is one.

    `style-src` has no exception: what moves is set by properties of the CSS object model, which it does not concern.
    """
    calls = " ".join(("'self'", *([settings.switchboard] if settings.switchboard else [])))
    return (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        f"connect-src {calls}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def _frames(resources: Resources, session: Session, census: Census) -> AsyncGenerator[bytes]:
    yield RETRY
    yield b"event: instance\ndata: %b\n\n" % wire.encode(_about(resources))
    number = 0
    async with aclosing(census.follow()) as following:
        async for taken in following:
            number += 1
            looks = number % CENSUSES_A_LOOK == 0
            if resources.lifecycle.draining.is_set() or (looks and not await session_lives(resources, session)):
                return
            yield b"event: census\ndata: %b\n\n" % taken


def _about(resources: Resources) -> dict[str, Any]:
    """Return what the page has to know of the instance that serves it, and where to break things if that is here."""
    console = resources.settings.console
    switchboard = None
    if console.switchboard and console.switchboard_key:
        switchboard = {"url": console.switchboard, "key": console.switchboard_key.get_secret_value()}
    return {
        "name": resources.settings.service.instance,
        "region": resources.settings.service.region,
        "switchboard": switchboard,
    }


def _answer(
    request: Request, content: bytes, media_type: str, more: Mapping[str, str] = MappingProxyType({})
) -> Response:
    tag = f'"{sha256(content).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": CACHING["console"], **more}
    if has(request.headers.get("if-none-match"), tag):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=media_type)


@cache
def _content(name: str) -> bytes:
    return files(__name__).joinpath(name).read_bytes()


def _serve(name: str, media_type: str) -> None:
    @router.get(f"/{name}", name=name, dependencies=[Depends(_allowed)])
    async def file(request: Request) -> Response:
        return _answer(request, _content(name), media_type)


for _name, _media_type in FILES.items():
    _serve(_name, _media_type)
