"""`/api/v1/products`: browsing and searching for everybody, adding and editing for administrators."""

import re
from datetime import datetime
from typing import Annotated, Any, Literal, Self
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field, field_validator, model_validator

from app.api.bodies import JsonRoute
from app.api.dependencies import AdminCaller, ReadVersion, ResourcesDep
from app.api.fields import Attributes, Body, Count, Line, Money, PageCursor, PageLimit, QueryText, Text, Tidy, not_null
from app.api.hotpath import pages_of
from app.api.problems import responses
from app.api.representations import CACHING, JSON, location, product_read, product_written
from app.domain.catalog.rules import NewProduct

PATH = "/api/v1/products"
router = APIRouter(
    prefix=PATH, tags=["Catalog"], route_class=JsonRoute, responses=responses(400, 422, 429, 500, 503, 504)
)

Sku = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", examples=["LAMP-0042"])]
Title = Annotated[str, Field(min_length=1, max_length=200, examples=["Desk lamp"]), Tidy, Line]
Description = Annotated[str, Field(max_length=5000, examples=["Warm light, dimmable."]), Text]
Category = Annotated[str, Field(min_length=1, max_length=64, examples=["lighting"]), Tidy, Line]
# A minus that leads to another one negates nothing, and PostgreSQL's parser gives up after 32 of them in a row.
_IDLE_MINUS = re.compile(r'-(?:[^\w"]*-)+')


class ProductGiven(Body):
    """What an administrator gives for a new product; `stock` pieces go to the first warehouse."""

    sku: Sku
    name: Title
    description: Description = ""
    category: Category
    price: Money
    attributes: Attributes = Field(default_factory=dict)
    stock: Annotated[Count, Field(ge=0, le=1_000_000, examples=[100])] = 0


class ProductChange(Body):
    """What of a product changes; what is left out stays, `attributes` are replaced as a whole."""

    name: Title | None = None
    description: Description | None = None
    category: Category | None = None
    price: Money | None = None
    attributes: Attributes | None = None

    _not_null = field_validator("name", "description", "category", "price", "attributes", mode="before")(not_null)

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("Name at least one field to change: name, description, category, price or attributes.")
        return self

    def changes(self) -> dict[str, Any]:
        """Return the named fields as the domain takes them."""
        values: dict[str, Any] = self.model_dump(include=self.model_fields_set)
        price: dict[str, Any] = values.pop("price", {})
        return values | price


class ProductView(BaseModel):
    """A product as everybody sees it."""

    id: UUID
    sku: str
    name: str
    description: str
    category: str
    price: Money
    attributes: dict[str, Any]
    available: int
    version: int
    created_at: datetime
    updated_at: datetime


class ProductPage(BaseModel):
    """A page of products."""

    items: list[ProductView]
    next_cursor: str | None


class RecommendationsView(BaseModel):
    """Up to ten products that can be bought, and how they were found."""

    items: list[ProductView]
    source: Literal["model", "rules", "popular"]


@router.get("", response_model=ProductPage, operation_id="listProducts", summary="Browse products")
async def listed(
    request: Request, resources: ResourcesDep, limit: PageLimit = 20, cursor: PageCursor = None
) -> Response:
    """Return products, newest first."""
    return await pages_of(request.scope).answer(request, resources.catalog.listed(limit, cursor), caching="product")


@router.get("/search", response_model=ProductPage, operation_id="searchProducts", summary="Search products")
async def search(
    request: Request,
    resources: ResourcesDep,
    q: Annotated[
        str,
        Query(min_length=1, max_length=200, description='Words, "phrases", or, and -not.', examples=["desk lamp"]),
        QueryText,
    ],
    limit: PageLimit = 20,
    cursor: PageCursor = None,
) -> Response:
    """Return products that match the words, best first."""
    found = resources.catalog.search(_IDLE_MINUS.sub("-", q), limit, cursor)
    return await pages_of(request.scope).answer(request, found, caching="product")


@router.get(
    "/{product_id}",
    response_model=ProductView,
    operation_id="getProduct",
    summary="A product",
    responses=responses(404),
)
async def get(request: Request, product_id: UUID, resources: ResourcesDep) -> Response:
    """Return a product; 304 if you name its ETag in `If-None-Match`."""
    return product_read(request, await resources.catalog.product(product_id))


@router.get(
    "/{product_id}/recommendations",
    response_model=RecommendationsView,
    operation_id="getRecommendations",
    summary="What goes with a product",
)
async def recommendations(product_id: UUID, resources: ResourcesDep) -> Response:
    """Return what others bought with it, else what is like it, else what is popular; `source` says which."""
    content = await resources.recommendations.of(product_id)
    return Response(content, headers={"Cache-Control": CACHING["product"]}, media_type=JSON)


@router.post(
    "",
    status_code=201,
    response_model=ProductView,
    operation_id="createProduct",
    summary="Add a product (admin)",
    responses=responses(401, 403, 409, 413, 415),
)
async def create(_admin: AdminCaller, body: ProductGiven, resources: ResourcesDep) -> Response:
    """Add a product."""
    product = await resources.catalog.create(
        NewProduct(
            sku=body.sku,
            name=body.name,
            description=body.description,
            category=body.category,
            amount=body.price.amount,
            currency=body.price.currency,
            attributes=body.attributes,
            stock=body.stock,
        )
    )
    return product_written(product, status=201, headers=location(PATH, product.id))


@router.patch(
    "/{product_id}",
    response_model=ProductView,
    operation_id="changeProduct",
    summary="Change a product (admin)",
    responses=responses(401, 403, 404, 412, 413, 415, 428),
)
async def change(
    _admin: AdminCaller, product_id: UUID, version: ReadVersion, body: ProductChange, resources: ResourcesDep
) -> Response:
    """Change some fields of the version that `If-Match` names; stock that moved since you read it is no conflict."""
    return product_written(await resources.catalog.change(product_id, version, body.changes()), status=200)
