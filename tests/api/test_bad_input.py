"""Bad input of every kind is a 4xx problem that names the field, never a 500, and nothing is written."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import httpx
import pytest
from conftest import PASSWORD, Customer
from expectations import check_problem

Make = Callable[..., Awaitable[Customer]]
PRODUCT = "019b7a6d-44a0-8f9c-87da-6c7041d58cbd"
DEEP = "[" * 50_000


def person(**fields: Any) -> dict[str, Any]:
    return {"email": f"{uuid4().hex}@example.com", "password": PASSWORD, "name": "Ada", **fields}


def order(**fields: Any) -> dict[str, Any]:
    return {"items": [{"product_id": PRODUCT, "quantity": 1}], "payment_method": "tok_ok", **fields}


def item(**fields: Any) -> dict[str, Any]:
    return order(items=[{"product_id": PRODUCT, "quantity": 1, **fields}])


def without(body: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key != name}


BAD_PROFILES: list[tuple[str, Any, list[str]]] = [
    ("not an object", [], [""]),
    ("a bare string", "ada", [""]),
    ("null", None, [""]),
    ("no e-mail", without(person(), "email"), ["/email"]),
    ("e-mail of a wrong type", person(email=7), ["/email"]),
    ("no address at all", person(email="ada"), ["/email"]),
    ("two at signs", person(email="ada@@example.com"), ["/email"]),
    ("no domain", person(email="ada@"), ["/email"]),
    ("a quoted local part", person(email='"a da"@example.com'), ["/email"]),
    ("an address literal", person(email="ada@[127.0.0.1]"), ["/email"]),
    ("a look-alike letter", person(email="аda@example.com"), ["/email"]),  # noqa: RUF001  # a Cyrillic a
    ("a look-alike domain", person(email="ada@exаmple.com"), ["/email"]),  # noqa: RUF001  # a Cyrillic a
    ("full-width letters", person(email="ａda@example.com"), ["/email"]),  # noqa: RUF001  # that is the point
    ("a long e-mail", person(email="a" * 250 + "@example.com"), ["/email"]),
    ("a line break in an e-mail", person(email="ada@example.com\r\nBcc: eve@example.com"), ["/email"]),
    ("no password", without(person(), "password"), ["/password"]),
    ("a short password", person(password="x7!kQ2"), ["/password"]),
    ("a long password", person(password="x7!kQ2" * 22), ["/password"]),
    ("a number as password", person(password=12345678), ["/password"]),
    ("no name", without(person(), "name"), ["/name"]),
    ("an empty name", person(name=""), ["/name"]),
    ("a name of spaces", person(name="   "), ["/name"]),
    ("a long name", person(name="x" * 101), ["/name"]),
    ("a name that its normal form makes too long", person(name="\u0958" * 100), ["/name"]),
    ("a name with a NUL", person(name="A\0da"), ["/name"]),
    ("a name with half a character", person(name="\ud83d"), ["/name"]),
    ("a name of two lines", person(name="Ada\nLovelace"), ["/name"]),
    ("a name that turns around", person(name="Ada\u202eevil"), ["/name"]),
    ("a null name", person(name=None), ["/name"]),
    ("a long bio", person(bio="x" * 2001), ["/bio"]),
    ("a bio with a bell", person(bio="ding\a"), ["/bio"]),
    ("a bio with a NUL", person(bio="\0"), ["/bio"]),
    ("half a location", person(location={"lat": 1}), ["/location/lon"]),
    ("a latitude past the pole", person(location={"lat": 90.1, "lon": 0}), ["/location/lat"]),
    ("a longitude past the date line", person(location={"lat": 0, "lon": -180.1}), ["/location/lon"]),
    ("a latitude in quotes", person(location={"lat": "1", "lon": 0}), ["/location/lat"]),
    ("a boolean latitude", person(location={"lat": True, "lon": 0}), ["/location/lat"]),
    ("an unknown field of a location", person(location={"lat": 0, "lon": 0, "alt": 1}), ["/location/alt"]),
    ("attributes of a wrong type", person(attributes=["a"]), ["/attributes"]),
    ("too many attributes", person(attributes={f"k{number}": 1 for number in range(33)}), ["/attributes"]),
    ("a bad attribute name", person(attributes={"a b": 1}), ["/attributes/a b"]),
    ("a long attribute name", person(attributes={"k" * 65: 1}), ["/attributes/" + "k" * 65]),
    ("a long attribute", person(attributes={"k": "x" * 257}), ["/attributes/k"]),
    ("a nested attribute", person(attributes={"k": {"a": 1}}), ["/attributes/k"]),
    ("a null attribute", person(attributes={"k": None}), ["/attributes/k"]),
    ("a huge attribute", person(attributes={"k": 2**63}), ["/attributes/k"]),
    ("an attribute with a NUL", person(attributes={"k": "\0"}), ["/attributes/k"]),
    ("an unknown field", person(role="admin"), ["/role"]),
    ("a tier of one's own choice", person(tier="enterprise"), ["/tier"]),
    ("several fields at once", person(name=1, bio=2), ["/name", "/bio"]),
]


@pytest.mark.parametrize(
    ("body", "pointers"), [case[1:] for case in BAD_PROFILES], ids=[case[0] for case in BAD_PROFILES]
)
async def test_a_bad_sign_up_names_the_field_and_creates_nothing(
    client: httpx.AsyncClient, body: Any, pointers: list[str]
) -> None:
    answer = await client.post(
        "/api/v1/profiles", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    check_problem(answer, 422, "invalid", *pointers)
    if isinstance(body, dict) and isinstance(body.get("email"), str) and pointers != ["/email"]:
        signed_in = await client.post("/api/v1/sessions", json={"email": body["email"], "password": PASSWORD})
        check_problem(signed_in, 401, "invalid_credentials")


@pytest.mark.sabotage(path="app/api/profiles.py", take_out="    await _check_password(body)\n", put="")
@pytest.mark.parametrize(
    "fields",
    [
        {"password": "password1"},
        {"password": "qwertyuiop"},
        {"password": "aaaaaaaaaaaaaaaa"},
        {"name": "Augusta Byron", "password": "augustabyron"},
        {"email": "augusta-byron@example.com", "password": "augusta-byron"},
    ],
)
async def test_a_password_that_a_list_would_find_is_refused_with_advice(
    client: httpx.AsyncClient, fields: dict[str, Any]
) -> None:
    answer = await client.post("/api/v1/profiles", json=person(**fields))
    body = check_problem(answer, 422, "weak_password", "/password")
    assert body["errors"][0]["detail"].startswith("This password is easy to guess.")
    assert fields["password"] not in answer.text


BAD_ORDERS: list[tuple[str, Any, list[str]]] = [
    ("not an object", [], [""]),
    ("no items", without(order(), "items"), ["/items"]),
    ("empty items", order(items=[]), ["/items"]),
    ("items of a wrong type", order(items={"0": 1}), ["/items"]),
    ("10,000 items", order(items=[{}] * 10_000), ["/items"]),
    ("an item of a wrong type", order(items=["lamp"]), ["/items/0"]),
    ("no product", order(items=[{"quantity": 1}]), ["/items/0/product_id"]),
    ("a bad UUID", item(product_id="019b7a6d-44a0"), ["/items/0/product_id"]),
    ("a number as UUID", item(product_id=7), ["/items/0/product_id"]),
    ("no quantity", order(items=[{"product_id": PRODUCT}]), ["/items/0/quantity"]),
    ("nothing of it", item(quantity=0), ["/items/0/quantity"]),
    ("a negative quantity", item(quantity=-1), ["/items/0/quantity"]),
    ("a large quantity", item(quantity=10_001), ["/items/0/quantity"]),
    ("a huge quantity", item(quantity=10**30), ["/items/0/quantity"]),
    ("half a piece", item(quantity=1.5), ["/items/0/quantity"]),
    ("a whole number written as a fraction", item(quantity=1.0), ["/items/0/quantity"]),
    ("a quantity in quotes", item(quantity="1"), ["/items/0/quantity"]),
    ("a boolean quantity", item(quantity=True), ["/items/0/quantity"]),
    ("a null quantity", item(quantity=None), ["/items/0/quantity"]),
    ("a price of one's own choice", item(unit_price=1), ["/items/0/unit_price"]),
    ("no payment method", without(order(), "payment_method"), ["/payment_method"]),
    ("a bad payment method", order(payment_method="4111 1111 1111 1111"), ["/payment_method"]),
    ("a payment method of two lines", order(payment_method="tok_ok\n"), ["/payment_method"]),
    ("an unknown field", order(discount=100), ["/discount"]),
]


@pytest.mark.sabotage(path="app/api/fields.py", take_out='model_config = ConfigDict(extra="forbid")', put="pass")
@pytest.mark.parametrize(("body", "pointers"), [case[1:] for case in BAD_ORDERS], ids=[case[0] for case in BAD_ORDERS])
async def test_a_bad_order_names_the_field_and_places_nothing(
    new_customer: Make, body: Any, pointers: list[str]
) -> None:
    customer = await new_customer()
    answer = await customer.client.post("/api/v1/orders", json=body, headers={"Idempotency-Key": uuid4().hex})
    check_problem(answer, 422, "invalid", *pointers)
    assert (await customer.client.get("/api/v1/orders")).json() == {"items": [], "next_cursor": None}


async def test_a_product_that_does_not_exist_is_named_by_its_line(new_customer: Make, new_product: Any) -> None:
    customer = await new_customer()
    known = (await new_product())["id"]
    items = [{"product_id": known, "quantity": 1}, {"product_id": str(uuid4()), "quantity": 1}]
    answer = await customer.client.post(
        "/api/v1/orders", json=order(items=items), headers={"Idempotency-Key": uuid4().hex}
    )
    check_problem(answer, 422, "unknown_product", "/items/1/product_id")
    assert (await customer.client.get("/api/v1/orders")).json()["items"] == []


@pytest.mark.sabotage(path="app/api/orders.py", take_out="    body.check_products()\n", put="")
async def test_one_product_in_two_lines_is_named_by_the_second(new_customer: Make, new_product: Any) -> None:
    customer = await new_customer()
    known = (await new_product())["id"]
    items = [{"product_id": known, "quantity": 1}, {"product_id": known.upper(), "quantity": 2}]
    answer = await customer.client.post(
        "/api/v1/orders", json=order(items=items), headers={"Idempotency-Key": uuid4().hex}
    )
    check_problem(answer, 422, "duplicate_product", "/items/1/product_id")
    assert (await customer.client.get("/api/v1/orders")).json()["items"] == []


@pytest.mark.parametrize(
    ("key", "code"),
    [
        (None, "idempotency_key_missing"),
        ("", "idempotency_key_invalid"),
        ("k" * 256, "idempotency_key_invalid"),
        ("two words", "idempotency_key_invalid"),
        ("ключ", "idempotency_key_invalid"),
    ],
)
async def test_an_order_needs_a_sane_idempotency_key(new_customer: Make, key: str | None, code: str) -> None:
    customer = await new_customer()
    headers = {} if key is None else {"Idempotency-Key": key.encode()}
    answer = await customer.client.post("/api/v1/orders", json=order(), headers=headers)
    check_problem(answer, 400, code, "header/Idempotency-Key")


async def test_an_order_under_two_idempotency_keys_is_refused(new_customer: Make) -> None:
    customer = await new_customer()
    keys = [("Idempotency-Key", uuid4().hex), ("Idempotency-Key", uuid4().hex)]
    answer = await customer.client.post("/api/v1/orders", json=order(), headers=keys)
    check_problem(answer, 400, "idempotency_key_invalid", "header/Idempotency-Key")
    assert (await customer.client.get("/api/v1/orders")).json()["items"] == []


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b'{"email": "a@example.com",}', 400, "invalid_json"),
        (b'{"email": 1, "email": 2}', 400, "invalid_json"),
        (DEEP.encode(), 400, "invalid_json"),
        (b'{"name": ' + DEEP.encode(), 400, "invalid_json"),
        (b'{"location": {"lat": NaN, "lon": 0}}', 400, "invalid_json"),
        (b'{"name": "\xff"}', 400, "invalid_json"),
        (b"9" * 50_000, 400, "invalid_json"),
        (b"", 422, "invalid"),
        (b"x" * 1_000_000, 413, "payload_too_large"),
    ],
    ids=["cut", "comma", "twice", "deep", "deep inside", "NaN", "latin-1", "huge number", "nothing", "1 MB"],
)
@pytest.mark.parametrize("path", ["/api/v1/profiles", "/api/v1/sessions"])
async def test_a_body_that_is_not_json_is_refused(
    client: httpx.AsyncClient, path: str, content: bytes, status: int, code: str
) -> None:
    answer = await client.post(path, content=content, headers={"Content-Type": "application/json"})
    check_problem(answer, status, code)


async def test_a_number_past_every_bound_is_refused(client: httpx.AsyncClient) -> None:
    body = json.dumps(person(location={"lat": 0, "lon": 0})).replace('"lat": 0', '"lat": 1e400')
    answer = await client.post("/api/v1/profiles", content=body, headers={"Content-Type": "application/json"})
    check_problem(answer, 422, "invalid", "/location/lat")


@pytest.mark.parametrize(
    ("headers", "pointer"),
    [
        ({"Content-Type": "text/plain"}, "header/Content-Type"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, "header/Content-Type"),
        ({"Content-Type": "application/json; charset=utf-16"}, "header/Content-Type"),
        ({}, "header/Content-Type"),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, "header/Content-Encoding"),
    ],
)
async def test_a_body_of_another_type_is_refused(
    client: httpx.AsyncClient, headers: dict[str, str], pointer: str
) -> None:
    answer = await client.post("/api/v1/profiles", content=json.dumps(person()), headers=headers)
    check_problem(answer, 415, "unsupported_media_type", pointer)


@pytest.mark.parametrize(
    ("path", "status", "code", "pointer"),
    [
        ("/api/v1/profiles/42", 422, "invalid", "path/profile_id"),
        ("/api/v1/profiles/%01", 422, "invalid", "path/profile_id"),
        ("/api/v1/profiles/%ff%fe", 422, "invalid", "path/profile_id"),
        ("/api/v1/products/not-a-uuid", 422, "invalid", "path/product_id"),
        ("/api/v1/products/019b7a6d-44a0-8f9c-87da-6c7041d58cbd%0a", 422, "invalid", "path/product_id"),
        ("/api/v1/products?limit=0", 422, "invalid", "query/limit"),
        ("/api/v1/products?limit=101", 422, "invalid", "query/limit"),
        ("/api/v1/products?limit=ten", 422, "invalid", "query/limit"),
        ("/api/v1/products?limit=99999999999999999999", 422, "invalid", "query/limit"),
        ("/api/v1/products?limit=", 422, "invalid", "query/limit"),
        ("/api/v1/products?cursor=abc", 400, "invalid_cursor", "query/cursor"),
        ("/api/v1/products?cursor=%00", 400, "invalid_cursor", "query/cursor"),
        ("/api/v1/products?cursor=" + "A" * 2000, 400, "invalid_cursor", "query/cursor"),
        ("/api/v1/products/search", 422, "invalid", "query/q"),
        ("/api/v1/products/search?q=", 422, "invalid", "query/q"),
        ("/api/v1/products/search?q=%00", 422, "invalid", "query/q"),
        ("/api/v1/products/search?q=" + "x" * 201, 422, "invalid", "query/q"),
        ("/api/v1/profiles?name_prefix=%00", 422, "invalid", "query/name_prefix"),
        ("/api/v1/profiles?attribute=nocolon", 422, "invalid", "query/attribute"),
        ("/api/v1/profiles?attribute=:value", 422, "invalid", "query/attribute"),
        ("/api/v1/profiles?attribute=k:%00", 422, "invalid", "query/attribute"),
        ("/files/" + "A" * 1025, 422, "invalid", "path/signed"),
    ],
)
async def test_bad_addresses_and_queries_are_named(
    client: httpx.AsyncClient, path: str, status: int, code: str, pointer: str
) -> None:
    check_problem(await client.get(path), status, code, pointer)


async def test_a_cursor_of_another_list_is_refused(client: httpx.AsyncClient, new_customer: Make) -> None:
    customer = await new_customer()
    cursor = (await client.get("/api/v1/products?limit=1")).json()["next_cursor"]
    for path in ("/api/v1/profiles", "/api/v1/orders", "/api/v1/products/search?q=lamp"):
        answer = await customer.client.get(path, params={**httpx.QueryParams(httpx.URL(path).query), "cursor": cursor})
        check_problem(answer, 400, "invalid_cursor", "query/cursor")


@pytest.mark.parametrize(
    "q",
    [
        "'",
        '"',
        "a & | ! b",
        "-",
        "-" * 200,
        "-(" * 99 + "a",
        "- " * 99,
        "()",
        "; drop table products",
        "%",
        "\\",
        "🚀",
        "a" * 200,
    ],
)
async def test_any_text_can_be_searched_for(client: httpx.AsyncClient, q: str) -> None:
    answer = await client.get("/api/v1/products/search", params={"q": q})
    assert answer.status_code == 200, answer.text
    assert (await client.get("/api/v1/profiles", params={"name_prefix": q[:100]})).status_code == 200
    assert (await client.get("/api/v1/profiles", params={"attribute": f"k:{q}"})).status_code == 200


@pytest.mark.parametrize(
    ("body", "pointers"),
    [
        ({}, [""]),
        ({"name": None}, ["/name"]),
        ({"attributes": None}, ["/attributes"]),
        ({"email": "other@example.com"}, ["/email"]),
        ({"tier": "pro"}, ["/tier"]),
        ({"version": 7}, ["/version"]),
        ({"location": {"lat": 1}}, ["/location/lon"]),
    ],
)
async def test_a_bad_change_names_the_field_and_changes_nothing(
    new_customer: Make, body: dict[str, Any], pointers: list[str]
) -> None:
    customer = await new_customer()
    path = f"/api/v1/profiles/{customer.profile['id']}"
    check_problem(await customer.client.patch(path, json=body, headers={"If-Match": '"v1"'}), 422, "invalid", *pointers)
    assert (await customer.client.get("/api/v1/profiles/me")).json() == customer.profile


@pytest.mark.parametrize(
    ("fields", "pointers"),
    [
        ({"sku": "two words"}, ["/sku"]),
        ({"name": ""}, ["/name"]),
        ({"description": "x" * 5001}, ["/description"]),
        ({"category": "a\0b"}, ["/category"]),
        ({"price": {"amount": -1, "currency": "EUR"}}, ["/price/amount"]),
        ({"price": {"amount": 19.99, "currency": "EUR"}}, ["/price/amount"]),
        ({"price": {"amount": 10**12, "currency": "EUR"}}, ["/price/amount"]),
        ({"price": {"amount": 1, "currency": "euro"}}, ["/price/currency"]),
        ({"price": 1999}, ["/price"]),
        ({"stock": -1}, ["/stock"]),
        ({"stock": 10**10}, ["/stock"]),
        ({"available": 1}, ["/available"]),
    ],
)
async def test_a_bad_product_names_the_field(admin: Customer, fields: dict[str, Any], pointers: list[str]) -> None:
    body = {"sku": "X-1", "name": "X", "category": "x", "price": {"amount": 1, "currency": "EUR"}} | fields
    check_problem(await admin.client.post("/api/v1/products", json=body), 422, "invalid", *pointers)


async def test_no_address_that_a_caller_writes_is_called(new_customer: Make, new_product: Any) -> None:
    calls: list[object] = []

    def called(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls.append(writer.get_extra_info("peername"))
        writer.close()

    async with await asyncio.start_server(called, "127.0.0.1", 0) as ours:
        host = f"127.0.0.1:{ours.sockets[0].getsockname()[1]}"
        url = f"http://{host}/called"
        customer = await new_customer(
            name=url, bio=url, attributes={"website": url, "callback_url": url, "avatar": url}
        )
        product = await new_product(name=url, description=url, attributes={"image": url})
        headers = {"X-Forwarded-Host": host, "Forwarded": f"host={host}", "Referer": url, "X-Callback-Url": url}
        placed = await customer.client.post(
            "/api/v1/orders",
            json={"items": [{"product_id": product["id"], "quantity": 1}], "payment_method": "tok_ok"},
            headers=headers | {"Idempotency-Key": host},
        )
        # Through every step that calls somebody: the payment, the invoice in the storage, the mail.
        await customer.invoiced(placed.raise_for_status().json()["id"])
        path = f"/api/v1/profiles/{customer.profile['id']}/avatar"
        announced = {"content_type": "image/png", "size": 100}
        upload = await customer.client.put(path, json=announced, headers=headers | {"Host": host})
        assert host not in upload.raise_for_status().json()["upload_url"]
        refused = await customer.client.put(path, json=announced | {"url": url}, headers=headers)
        check_problem(refused, 422, "invalid", "/url")
        (await customer.client.get("/api/v1/products/search", params={"q": url})).raise_for_status()
        assert calls == []
