"""Products through NGINX: what caches may keep, search, and the administrator's edits."""

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import httpx
import pytest
from conftest import Customer
from expectations import check_problem

Make = Callable[..., Awaitable[Customer]]
NewProduct = Callable[..., Awaitable[dict[str, Any]]]


async def test_a_product_is_the_same_for_everybody_and_may_be_cached(
    client: httpx.AsyncClient, new_product: NewProduct
) -> None:
    product = await new_product()
    path = f"/api/v1/products/{product['id']}"
    answer = await client.get(path)
    assert answer.json() == product
    assert {"id", "sku", "name", "description", "price", "attributes", "available", "version"} <= set(product)
    assert answer.headers["etag"] == '"v1-1"'
    assert answer.headers["cache-control"] == "public, max-age=30, stale-while-revalidate=60"
    assert "vary" not in answer.headers
    unchanged = await client.get(path, headers={"If-None-Match": answer.headers["etag"]})
    assert unchanged.status_code == 304


async def test_an_edit_compares_the_version_and_moves_the_tag(
    admin: Customer, client: httpx.AsyncClient, new_product: NewProduct
) -> None:
    product = await new_product()
    path = f"/api/v1/products/{product['id']}"
    change = {"price": {"amount": 2499, "currency": "EUR"}, "name": "Better Thing"}
    check_problem(await admin.client.patch(path, json=change), 428, "precondition_required")
    check_problem(await admin.client.patch(path, json=change, headers={"If-Match": '"v2-1"'}), 412, "version_mismatch")
    # Stock has moved since it was read: the revision is another, the version is not.
    changed = await admin.client.patch(path, json=change, headers={"If-Match": '"v1-77"'})
    assert changed.status_code == 200, changed.text
    assert changed.headers["etag"] == '"v2-2"'
    assert changed.json() | {"updated_at": None} == product | change | {"version": 2, "updated_at": None}
    assert (await client.get(path)).json() == changed.json()


async def test_only_administrators_edit(new_customer: Make, new_product: NewProduct) -> None:
    product = await new_product()
    customer = await new_customer()
    body = {"sku": "X-1", "name": "X", "category": "x", "price": {"amount": 1, "currency": "EUR"}}
    check_problem(await customer.client.post("/api/v1/products", json=body), 403, "forbidden")
    answer = await customer.client.patch(
        f"/api/v1/products/{product['id']}", json={"name": "Mine"}, headers={"If-Match": '"v1-1"'}
    )
    check_problem(answer, 403, "forbidden")


async def test_a_sku_is_taken_once(admin: Customer, new_product: NewProduct) -> None:
    product = await new_product()
    body = {name: product[name] for name in ("sku", "name", "category", "price")}
    check_problem(await admin.client.post("/api/v1/products", json=body), 409, "sku_taken")


async def test_a_new_product_says_where_it_is(admin: Customer) -> None:
    body = {
        "sku": f"T-{uuid4().hex[:8].upper()}",
        "name": "X",
        "category": "x",
        "price": {"amount": 1, "currency": "EUR"},
    }
    answer = await admin.client.post("/api/v1/products", json=body)
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/api/v1/products/{answer.json()['id']}"
    assert answer.json()["available"] == 0


async def test_search_finds_a_new_product_by_its_words(client: httpx.AsyncClient, new_product: NewProduct) -> None:
    word = "".join(chr(ord("a") + int(digit, 16)) for digit in uuid4().hex)
    product = await new_product(name=f"Thing called {word}")
    answer = await client.get("/api/v1/products/search", params={"q": word})
    assert [found["id"] for found in answer.json()["items"]] == [product["id"]]


async def test_pages_follow_each_other_without_gaps(client: httpx.AsyncClient) -> None:
    seen: list[str] = []
    cursor: str | None = None
    for _ in range(5):
        query = {"limit": 7} | ({"cursor": cursor} if cursor else {})
        page = (await client.get("/api/v1/products", params=query)).json()
        seen += [found["id"] for found in page["items"]]
        cursor = page["next_cursor"]
    assert len(set(seen)) == 35
    assert seen == sorted(seen, reverse=True)


@pytest.mark.parametrize("path", ["/", "/api/v1/products/" + str(uuid4()), "/api/v1/nothing", "/api/v1/products/"])
async def test_what_does_not_exist_is_a_problem_that_nobody_caches(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(path)
    check_problem(answer, 404, "not_found")
    assert answer.headers["cache-control"] == "no-store"


async def test_unknown_query_parameters_are_ignored(client: httpx.AsyncClient) -> None:
    assert (await client.get("/api/v1/products?limit=1&utm_source=mail")).status_code == 200
