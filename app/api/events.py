"""`/api/v1/orders/{id}/events`: an order's history and what follows, as server-sent events.

Each event has the number of its status in the history as `id`; a client that comes back with `Last-Event-ID` goes on
after it, on whichever instance. A stream ends when nothing more can come, before ten minutes are over, when its session
ends and when its instance stops; the number of streams is bounded for the instance and for each caller.
"""

from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from datetime import UTC, datetime
from typing import Annotated, cast
from uuid import UUID

from fastapi import APIRouter, Depends, FastAPI, Header, Request, Response
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from app.api.dependencies import Caller, ExchangeDep, ResourcesDep
from app.api.exchange import Exchange
from app.api.orders import PATH
from app.api.problems import responses
from app.core import wire
from app.core.errors import Invalid, RateLimited, Unavailable
from app.core.settings import EventSettings
from app.core.telemetry import EVENT_STREAMS
from app.domain.orders.following import Told
from app.domain.sessions.rules import Session
from app.wiring import Resources

router = APIRouter(prefix=PATH, tags=["Orders"], responses=responses(400, 401, 404, 422, 429, 500, 503, 504))

# A second: a client that lost its instance finds another at once, and a thousand of them do not come in one moment.
RETRY = b"retry: 1000\n\n"
STILL_THERE = b": still there\n\n"
# What is being sent when the time is over may still go out; a client that reads nothing is cut off then.
GRACE_SECONDS = 10.0
# The history of an order has a handful of entries; nine digits are none of ours.
LONGEST_ID = 9  # characters


class Places:
    """The streams that are open on this instance.

    Args:
        settings: how many there may be.
    """

    def __init__(self, settings: EventSettings) -> None:
        self.settings = settings
        self._taken: Counter[UUID] = Counter()

    @contextmanager
    def taken(self, profile_id: UUID) -> Iterator[None]:
        """Hold a place inside the block.

        Raises:
            RateLimited: `too_many_streams`, if the caller has as many as one may have.
            Unavailable: `streams_full`, if the instance has.
        """
        if self._taken[profile_id] >= self.settings.streams_per_caller:
            raise RateLimited(
                f"You have {self.settings.streams_per_caller} streams open here; close one, or try again in 10 s.",
                code="too_many_streams",
                retry_after=10,
            )
        if self._taken.total() >= self.settings.streams:
            raise Unavailable("This instance has no stream left; try again.", code="streams_full", retry_after=5)
        self._taken[profile_id] += 1
        EVENT_STREAMS.inc()
        try:
            yield
        finally:
            EVENT_STREAMS.dec()
            self._taken[profile_id] -= 1
            if not self._taken[profile_id]:
                del self._taken[profile_id]


def install(app: FastAPI, resources: Resources) -> None:
    """Give `app` its places for streams, once its resources are open."""
    app.state.streams = Places(resources.settings.events)


async def _places(request: Request) -> Places:
    return cast("Places", request.app.state.streams)


PlacesDep = Annotated[Places, Depends(_places)]


async def _last_event_id(
    given: Annotated[
        str | None,
        Header(
            alias="Last-Event-ID",
            description="The `id` of the last event that you have.",
            examples=["2"],
            json_schema_extra={"pattern": f"^[0-9]{{1,{LONGEST_ID}}}$"},
        ),
    ] = None,
) -> int:
    if not given:  # a browser that has seen none sends none, some libraries an empty one
        return 0
    if not (given.isascii() and given.isdigit() and len(given) <= LONGEST_ID):
        raise Invalid.field(
            "header/Last-Event-ID",
            "Send the id of the last event that you have, or leave it out to get the history from its beginning.",
            code="invalid_last_event_id",
        )
    return int(given)


class EventsResponse(StreamingResponse):
    """The stream: holds its place while it lasts, and frees everything when either side goes away."""

    def __init__(self, frames: AsyncGenerator[bytes], places: Places, session: Session, exchange: Exchange) -> None:
        # A proxy that is not ours must not hold events back either.
        super().__init__(frames, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._frames, self._places, self._session, self._exchange = frames, places, session, exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; see `StreamingResponse`."""
        async with aclosing(self._frames):
            with self._places.taken(self._session.profile_id):
                self._exchange.last(self._places.settings.seconds + GRACE_SECONDS)
                await super().__call__(scope, receive, send)


@router.get(
    "/{order_id}/events",
    response_class=Response,
    operation_id="followOrder",
    summary="Follow an order",
    responses={
        200: {
            "description": "Events of type `status`, each with `id` and JSON `data`.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        204: {"description": "Nothing more can come; a browser's EventSource stops at this."},
    },
)
async def follow(
    order_id: UUID,
    caller: Caller,
    *,
    last: Annotated[int, Depends(_last_event_id)],
    resources: ResourcesDep,
    exchange: ExchangeDep,
    places: PlacesDep,
) -> Response:
    """Send each status of one of your orders as it comes, the past ones first.

    The stream ends within ten minutes; connect again with the `id` of the last event in `Last-Event-ID`, as a browser's
    `EventSource` does by itself.
    """
    order = await resources.orders.load(caller.profile_id, order_id)
    if order.ended(datetime.now(UTC)) and last >= len(order.history):
        return Response(status_code=204)
    return EventsResponse(_frames(resources, caller, order_id, last), places, caller, exchange)


async def _frames(resources: Resources, session: Session, order_id: UUID, last: int) -> AsyncGenerator[bytes]:
    yield RETRY
    seconds = resources.settings.events.seconds
    async with aclosing(resources.following.follow(session.profile_id, order_id, last, seconds)) as following:
        first = True
        async for news in following:
            # The way in was checked a moment ago; from then on a session that has ended gets nothing more.
            if resources.lifecycle.draining.is_set() or not (first or await session_lives(resources, session)):
                return
            first = False
            yield b"".join(_frame(order_id, told) for told in news) or STILL_THERE


async def session_lives(resources: Resources, session: Session) -> bool:
    """Return whether a stream may go on: its session has not ended, as far as anybody can say."""
    try:
        return await resources.sessions.lives(session)
    except Unavailable:  # neither Redis nor the shard can say: what the caller could see a moment ago goes on
        return True


def _frame(order_id: UUID, told: Told) -> bytes:
    return b"id: %d\nevent: status\ndata: %b\n\n" % (told.number, wire.encode(told.view(order_id)))
