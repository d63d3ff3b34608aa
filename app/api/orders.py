"""`/api/v1/orders`: placing an order once however often it is sent, seeing how it goes, cancelling it, its invoice."""

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from app.api.bodies import JsonRoute
from app.api.dependencies import Caller, IdempotencyKey, ResourcesDep
from app.api.fields import Body, Count, Money, PageCursor, PageLimit
from app.api.problems import responses
from app.api.representations import location, written
from app.core.errors import FieldError, Invalid
from app.domain.orders.rules import LARGEST_QUANTITY, MOST_LINES, NewItem, NewOrder
from app.domain.orders.service import PLACE
from app.scaling.idempotency import Claim

PATH = "/api/v1/orders"
router = APIRouter(
    prefix=PATH, tags=["Orders"], route_class=JsonRoute, responses=responses(400, 401, 422, 429, 500, 503, 504)
)


class ItemGiven(Body):
    """So many pieces of a product."""

    product_id: UUID
    quantity: Annotated[Count, Field(ge=1, le=LARGEST_QUANTITY, examples=[2])]


class OrderGiven(Body):
    """What a customer orders, and how they pay."""

    items: Annotated[list[ItemGiven], Field(min_length=1, max_length=MOST_LINES)]
    payment_method: Annotated[str, Field(pattern=r"^tok_[a-z0-9_]{1,60}$", examples=["tok_ok"])]

    def check_products(self) -> None:
        """Refuse a product that stands in two lines: nobody knows whether the second corrects or adds.

        Raises:
            Invalid: naming every line after a product's first.
        """
        seen: set[UUID] = set()
        doubled: list[FieldError] = []
        for number, item in enumerate(self.items):
            if item.product_id in seen:
                doubled.append(
                    FieldError(f"/items/{number}/product_id", "This product stands in the order already; add up.")
                )
            seen.add(item.product_id)
        if doubled:
            raise Invalid("The order names a product twice.", code="duplicate_product", fields=tuple(doubled))


class LineView(BaseModel):
    """One line of an order, with name and price as they were when it was placed."""

    product_id: UUID
    sku: str
    name: str
    quantity: int
    unit_price: Money
    amount: Money


class HappeningView(BaseModel):
    """A status, and since when."""

    status: str
    at: datetime


class OrderView(BaseModel):
    """An order as its customer sees it."""

    id: UUID
    status: Literal["processing", "payment_pending", "confirmed", "rejected", "cancelled"]
    reason: Literal["out_of_stock", "payment_declined"] | None = Field(default=None, description="Why it was rejected.")
    items: list[LineView]
    total: Money
    payment_method: str
    history: list[HappeningView]
    invoice_url: str | None = Field(description="Where the invoice is, once it is issued.")
    created_at: datetime
    updated_at: datetime


class OrderPage(BaseModel):
    """A page of your orders, newest first."""

    items: list[OrderView]
    next_cursor: str | None


@router.post(
    "",
    status_code=202,
    response_model=OrderView,
    operation_id="placeOrder",
    summary="Place an order",
    responses=responses(403, 409, 413, 415),
)
async def place(caller: Caller, key: IdempotencyKey, body: OrderGiven, resources: ResourcesDep) -> Response:
    """Accept an order; it is worked on afterwards, so ask `GET /api/v1/orders/{id}` how it goes.

    Sent again with the same `Idempotency-Key` it is the same order, and the reply says `Idempotent-Replayed: true`.
    """
    body.check_products()
    claim = Claim.of(caller.profile_id, PLACE, key, body.model_dump(mode="json"))
    items = tuple(NewItem(item.product_id, item.quantity) for item in body.items)
    placed = await resources.orders.place(caller.profile_id, NewOrder(items, body.payment_method), claim)
    headers = location(PATH, placed.reply["id"])
    if placed.replayed:
        headers["Idempotent-Replayed"] = "true"
    return written(placed.reply, status=202, headers=headers)


@router.get("", response_model=OrderPage, operation_id="listOrders", summary="My orders")
async def listed(caller: Caller, resources: ResourcesDep, limit: PageLimit = 20, cursor: PageCursor = None) -> Response:
    """Return your orders, newest first."""
    page = await resources.orders.listed(caller.profile_id, limit, cursor)
    return written({"items": page.items, "next_cursor": page.next_cursor})


@router.get(
    "/{order_id}", response_model=OrderView, operation_id="getOrder", summary="An order", responses=responses(404)
)
async def get(order_id: UUID, caller: Caller, resources: ResourcesDep) -> Response:
    """Return one of your orders; anybody else's does not exist for you."""
    return written(await resources.orders.get(caller.profile_id, order_id))


@router.post(
    "/{order_id}/cancel",
    status_code=202,
    response_model=OrderView,
    operation_id="cancelOrder",
    summary="Cancel an order",
    responses=responses(403, 404, 409),
)
async def cancel(order_id: UUID, caller: Caller, resources: ResourcesDep) -> Response:
    """Begin to cancel one of your orders; once its stock and its money are given back, it is `cancelled`.

    Possible until half an hour after its confirmation, then 409 `not_cancellable`. Asked again it is the same.
    """
    return written(await resources.orders.cancel(caller.profile_id, order_id), status=202)


@router.get(
    "/{order_id}/invoice",
    status_code=302,
    response_class=Response,
    operation_id="getInvoice",
    summary="The invoice of an order",
    responses=responses(404),
)
async def invoice(order_id: UUID, caller: Caller, resources: ResourcesDep) -> Response:
    """Lead to a short-lived address of the PDF."""
    address = await resources.orders.invoice_link(caller.profile_id, order_id)
    return Response(status_code=302, headers={"Location": address})
