"""The short way to a route and FastAPI's own answer alike, whatever is wrong with the request."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast
from uuid import uuid4

import fastapi.routing
import httpx
import pytest
from conftest import Customer
from fastapi import FastAPI

from app.api.direct import Direct, Table
from app.core.settings import Settings
from app.main import create_app
from app.wiring import Resources, open_resources

Make = Callable[..., Awaitable[Customer]]
NewProduct = Callable[..., Awaitable[dict[str, Any]]]
Shown = tuple[int, bytes, list[tuple[str, str]]]
# What differs from one answer to the next, whichever way it went.
OWN = {"server-timing", "ratelimit", "consistency-token"}
MUCH = "100000/hour"
UNKNOWN_ID = "00000000-0000-8000-8000-00000000000f"
JSON = {"Content-Type": "application/json"}
BODIES: list[tuple[bytes, dict[str, str]]] = [
    (b"", {}),
    (b"", JSON),
    (b"{}", JSON),
    (b"{}", {}),
    (b"{}", {"Content-Type": "text/plain"}),
    (b"{}", {**JSON, "Content-Encoding": "gzip"}),
    (b"[]", JSON),
    (b"null", JSON),
    (b"{", JSON),
    (b'{"a": 1, "a": 2}', JSON),
    (b'{"unknown": "field", "items": "none", "email": 7, "price": null, "kind": [], "name": "\\u202e"}', JSON),
]
KEYS: list[dict[str, str]] = [{}, {"Idempotency-Key": "a b"}, {"Idempotency-Key": "a-fresh-one"}]


@pytest.fixture
async def ways(settings: Settings) -> AsyncIterator[tuple[Callable[..., Awaitable[Shown]], ...]]:
    """The short way, and FastAPI's: each sends a request and returns what its answer shows."""
    rates = settings.rates.model_copy(update=dict.fromkeys(("free", "anonymous", "sign_in", "enterprise"), MUCH))
    much = settings.model_copy(update={"rates": rates})
    async with open_resources(much) as resources:
        short, long = _app(much, resources), _app(much, resources)
        long.user_middleware = [layer for layer in long.user_middleware if layer.cls is not cast("Any", Direct)]
        yield _asking(short), _asking(long)


def _app(settings: Settings, resources: Resources) -> FastAPI:
    app = create_app(settings)
    app.state.resources = resources
    return app


def _asking(app: FastAPI) -> Callable[..., Awaitable[Shown]]:
    async def ask(method: str, path: str, body: bytes = b"", **headers: str) -> Shown:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
            sent = {"X-Request-ID": "the-same-request", **headers}
            answer = await client.request(method, path, content=body, headers=sent)
        shown = [(name, value) for name, value in answer.headers.multi_items() if name not in OWN]
        return answer.status_code, answer.content, sorted(shown)

    return ask


@pytest.mark.sabotage(
    path="app/api/direct.py",
    take_out="        if refused:\n            return None\n    if call.body is not None:",
    put="    if call.body is not None:",
)
async def test_both_ways_refuse_in_the_same_words(
    ways: tuple[Callable[..., Awaitable[Shown]], ...], settings: Settings, new_customer: Make, admin: Customer
) -> None:
    short, long = ways
    customer = await new_customer()
    callers: tuple[dict[str, str], ...] = (
        {},
        {"Authorization": f"Bearer {customer.token}"},
        {"Authorization": f"Bearer {admin.token}"},
    )
    routes = Table(create_app(settings)).routes()
    assert ("POST", "/api/v1/orders") in routes
    for method, template in routes:
        for path in {re.sub(r"\{[^}]*\}", each, template) for each in (UNKNOWN_ID, "no-id", "me", "a%20b")}:
            for body, described in BODIES if method != "GET" else BODIES[:1]:
                # Whoever may do it would end their sessions, and be refused the next time.
                for caller in callers if body and method != "DELETE" else callers[:1]:
                    for key in KEYS if template == "/api/v1/orders" else KEYS[:1]:
                        request = (method, path, body)
                        headers = {**described, **caller, **key}
                        assert await short(*request, **headers) == await long(*request, **headers), request


async def test_both_ways_answer_the_same_bytes_and_headers(
    ways: tuple[Callable[..., Awaitable[Shown]], ...], new_customer: Make, new_product: NewProduct
) -> None:
    customer, product = await new_customer(), await new_product()
    order = (await customer.order(product["id"])).json()
    await customer.ended(order["id"])
    body = b'{"items": [{"product_id": "%b", "quantity": 2}], "payment_method": "tok_ok"}' % product["id"].encode()
    me = {"Authorization": f"Bearer {customer.token}"}
    keyed = {**me, **JSON, "Idempotency-Key": uuid4().hex}
    await ways[0]("POST", "/api/v1/orders", body, **keyed)
    asked: list[tuple[str, str, bytes, dict[str, str]]] = [
        ("GET", "/api/v1/profiles/me", b"", me),
        ("HEAD", "/api/v1/profiles/me", b"", me),
        ("GET", "/api/v1/sessions", b"", me),
        ("GET", f"/api/v1/orders/{order['id']}", b"", me),
        ("GET", f"/api/v1/orders/{order['id'].upper()}", b"", me),
        ("GET", f"/api/v1/products/{product['id']}", b"", {}),
        ("GET", f"/api/v1/products/{product['id']}", b"", {"If-None-Match": "*"}),
        ("POST", "/api/v1/orders", body, keyed),  # the stored reply
    ]
    for method, path, content, headers in asked:
        short, long = [await way(method, path, content, **headers) for way in ways]
        assert short == long
        assert short[0] < 400


@pytest.mark.sabotage(path="app/api/middleware.py", take_out="        Middleware(Direct),\n", put="")
async def test_an_order_is_placed_without_fastapis_machinery(
    ways: tuple[Callable[..., Awaitable[Shown]], ...],
    new_customer: Make,
    new_product: NewProduct,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    customer, product = await new_customer(), await new_product()
    resolved: list[str] = []

    async def resolve(**asked: Any) -> None:
        resolved.append(asked["request"].url.path)

    monkeypatch.setattr(fastapi.routing, "solve_dependencies", resolve)
    body = b'{"items": [{"product_id": "%b", "quantity": 2}], "payment_method": "tok_ok"}' % product["id"].encode()
    headers = {"Authorization": f"Bearer {customer.token}", **JSON, "Idempotency-Key": uuid4().hex}
    status, _, _ = await ways[0]("POST", "/api/v1/orders", body, **headers)
    assert (status, resolved) == (202, [])
