"""The HTTP side of orders: accepted once for each key, seen by their customer only, the invoice behind a short link."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import httpx
import pytest
from conftest import Customer, until
from expectations import check_problem

Make = Callable[..., Awaitable[Customer]]
NewProduct = Callable[..., Awaitable[dict[str, Any]]]


async def place(customer: Customer, product: dict[str, Any], key: str, quantity: int = 1) -> httpx.Response:
    return await customer.client.post(
        "/api/v1/orders",
        json={"items": [{"product_id": product["id"], "quantity": quantity}], "payment_method": "tok_ok"},
        headers={"Idempotency-Key": key},
    )


async def test_an_order_is_accepted_and_says_where_to_look(new_customer: Make, new_product: NewProduct) -> None:
    customer, product = await new_customer(), await new_product()
    answer = await place(customer, product, uuid4().hex, quantity=3)
    assert answer.status_code == 202, answer.text
    order = answer.json()
    assert answer.headers["location"] == f"/api/v1/orders/{order['id']}"
    assert "idempotent-replayed" not in answer.headers
    assert (order["status"], order["invoice_url"]) == ("processing", None)
    assert order["total"] == {"amount": 3 * product["price"]["amount"], "currency": "EUR"}
    assert [step["status"] for step in order["history"]] == ["processing"]
    seen = (await customer.client.get(answer.headers["location"])).json()
    assert (seen["id"], seen["items"]) == (order["id"], order["items"])


async def test_the_same_key_and_body_get_the_same_reply(new_customer: Make, new_product: NewProduct) -> None:
    customer, product = await new_customer(), await new_product()
    key = uuid4().hex
    first = await place(customer, product, key)
    again = await customer.client.post(
        "/api/v1/orders",
        # The same order, written differently: what counts is what it says.
        content=f'{{"payment_method":"tok_ok",  "items":[{{"quantity":1,"product_id":"{product["id"]}"}}]}}',
        headers={"Idempotency-Key": key, "Content-Type": "application/json"},
    )
    assert (again.status_code, again.json()) == (first.status_code, first.json())
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    assert len((await customer.client.get("/api/v1/orders")).json()["items"]) == 1


async def test_a_key_is_not_for_another_body(new_customer: Make, new_product: NewProduct) -> None:
    customer, product = await new_customer(), await new_product()
    key = uuid4().hex
    await place(customer, product, key)
    answer = await place(customer, product, key, quantity=2)
    check_problem(answer, 422, "idempotency_key_reused", "header/Idempotency-Key")


async def test_a_key_belongs_to_its_customer(new_customer: Make, new_product: NewProduct) -> None:
    one, other, product = await new_customer(), await new_customer(), await new_product()
    key = uuid4().hex
    first, second = await place(one, product, key), await place(other, product, key)
    assert first.json()["id"] != second.json()["id"]


async def test_the_same_key_at_the_same_moment_is_one_order(new_customer: Make, new_product: NewProduct) -> None:
    customer, product = await new_customer(), await new_product()
    key = uuid4().hex
    answers = await asyncio.gather(*(place(customer, product, key) for _ in range(5)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 4


@pytest.mark.sabotage(
    "app/domain/orders/service.py",
    "            _with_items(select(orders).where(orders.c.profile_id == profile_id, orders.c.id == order_id))",
    "            _with_items(select(orders).where(orders.c.id == order_id))",
)
async def test_somebody_elses_order_does_not_exist(new_customer: Make, new_product: NewProduct) -> None:
    one, other = await new_customer(), await new_customer()
    order = (await place(one, await new_product(), uuid4().hex)).json()
    for path in (f"/api/v1/orders/{order['id']}", f"/api/v1/orders/{order['id']}/invoice", f"/api/v1/orders/{uuid4()}"):
        check_problem(await other.client.get(path), 404, "not_found")
    assert (await other.client.get("/api/v1/orders")).json()["items"] == []


async def test_orders_are_listed_newest_first_page_by_page(new_customer: Make, new_product: NewProduct) -> None:
    customer, product = await new_customer(), await new_product()
    placed = [(await place(customer, product, uuid4().hex)).json()["id"] for _ in range(3)]
    first = (await customer.client.get("/api/v1/orders?limit=2")).json()
    rest = (await customer.client.get("/api/v1/orders", params={"cursor": first["next_cursor"]})).json()
    assert [order["id"] for order in first["items"] + rest["items"]] == placed[::-1]
    assert rest["next_cursor"] is None


async def test_the_invoice_is_behind_a_short_link_and_only_there(
    new_customer: Make, new_product: NewProduct, client: httpx.AsyncClient
) -> None:
    customer = await new_customer()
    order = (await place(customer, await new_product(), uuid4().hex)).json()
    path = f"/api/v1/orders/{order['id']}/invoice"
    early = await customer.client.get(path)
    if early.status_code != 302:
        check_problem(early, 404, "invoice_not_ready")
    invoiced = await customer.invoiced(order["id"])
    assert invoiced["invoice_url"] == path
    lead = await customer.client.get(path)
    assert (lead.status_code, lead.headers["cache-control"]) == (302, "no-store")
    # Whoever has the link has the file: no session, as with a bucket's own links.
    file = await client.get(lead.headers["location"])
    assert file.status_code == 200
    assert file.content.startswith(b"%PDF-")
    assert file.headers["content-type"] == "application/pdf"
    assert file.headers["content-disposition"].startswith('inline; filename="')
    assert file.headers["cache-control"] == "private, no-store"
    forged = lead.headers["location"][:-2] + ("AA" if not lead.headers["location"].endswith("AA") else "BB")
    check_problem(await client.get(forged), 404, "link_expired")


async def test_no_link_leads_out_of_the_storage(client: httpx.AsyncClient) -> None:
    for path in ("/files/%2fetc%2fpasswd", "/files/invoices%2fx.pdf", "/files/AAAA"):
        answer = await client.get(path)
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/problem+json"


async def test_an_order_ends_confirmed(new_customer: Make, new_product: NewProduct) -> None:
    customer = await new_customer()
    order = (await place(customer, await new_product(), uuid4().hex)).json()

    async def confirmed() -> dict[str, Any] | None:
        seen = (await customer.client.get(f"/api/v1/orders/{order['id']}")).json()
        return seen if seen["status"] == "confirmed" else None

    ended = await until(confirmed)
    assert [step["status"] for step in ended["history"]] == ["processing", "confirmed"]
    assert "reason" not in ended


async def test_a_confirmed_order_is_cancelled_and_a_rejected_one_is_not(
    new_customer: Make, new_product: NewProduct
) -> None:
    customer, other, product = await new_customer(), await new_customer(), await new_product(stock=3)
    order = (await place(customer, product, uuid4().hex, quantity=3)).json()
    path = f"/api/v1/orders/{order['id']}"
    assert (await customer.ended(order["id"]))["status"] == "confirmed"
    check_problem(await other.client.post(f"{path}/cancel"), 404, "not_found")
    answer = await customer.client.post(f"{path}/cancel")
    assert (answer.status_code, answer.json()["id"]) == (202, order["id"])

    async def cancelled() -> dict[str, Any] | None:
        seen = (await customer.client.get(path)).json()
        return seen if seen["status"] == "cancelled" else None

    ended = await until(cancelled)
    assert [step["status"] for step in ended["history"]] == ["processing", "confirmed", "processing", "cancelled"]

    async def on_the_shelf() -> bool:
        # Who heard of it while Redis was slow has heard nothing, and is told by the relay.
        found = await customer.client.get(f"/api/v1/products/{product['id']}")
        return bool(found.raise_for_status().json()["available"] == 3)

    await until(on_the_shelf)
    assert (await customer.client.post(f"{path}/cancel")).json()["status"] == "cancelled"
    declined = (await customer.order(product["id"], payment_method="tok_declined")).json()
    assert (await customer.ended(declined["id"]))["status"] == "rejected"
    check_problem(await customer.client.post(f"/api/v1/orders/{declined['id']}/cancel"), 409, "not_cancellable")
