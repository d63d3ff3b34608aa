"""How often each route asks the database, counted on the wire, against the table of docs/patterns/queries.md."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from fastapi.routing import iter_route_contexts
from spreading import strays
from sqlalchemy import insert, select, update
from wiretap import Wire

from app.core.ids import new_id
from app.domain.orders.tables import orders
from app.domain.profiles.rules import ADMIN
from app.domain.profiles.tables import profiles
from app.main import create_app
from app.scaling import outbox
from app.wiring import Resources

pytest_plugins = ("quiet",)
pytestmark = pytest.mark.postgresql("the messages of its protocol are counted")

PAGE = Path(__file__).parents[2] / "docs" / "patterns" / "queries.md"
PASSWORD = "a long enough pass phrase"
STREAMS = {"GET /api/v1/orders/{order_id}/events"}  # they ask when there is something to tell, and end with the client
# They answer from what the process has, or from object storage.
WITHOUT_DATABASE = ("/console", "/health", "/docs", "/openapi.json", "/metrics", "/files", "/api/v1/assets")


def budgets() -> dict[str, int]:
    """Return the round trips that each route may take, as the page says."""
    rows = re.findall(r"^\| `([A-Z]+ /[^`]*)` \| (\d+) \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {route: int(most) for route, most in rows}


@dataclass
class Shop:
    """An instance whose database is behind a wire, with the tokens of a customer and of an administrator."""

    client: httpx.AsyncClient
    wire: Wire
    resources: Resources
    routes: set[str]
    customer: str = ""
    admin: str = ""
    profile: dict[str, Any] = field(default_factory=dict)
    products: list[str] = field(default_factory=list)
    orders: list[str] = field(default_factory=list)

    async def send(self, method: str, path: str, token: str | None = None, **more: Any) -> httpx.Response:
        """Send a request that must succeed."""
        headers = more.pop("headers", {}) | ({"Authorization": f"Bearer {token}"} if token else {})
        answer = await self.client.request(method, f"/api/v1{path}", headers=headers, **more)
        self.client.cookies.clear()  # the token is named each time
        assert answer.status_code < 400, answer.text
        return answer

    async def sign_up(self) -> tuple[str, dict[str, Any]]:
        """Return the token and the profile of somebody new."""
        credentials = {"email": f"{uuid4().hex}@example.com", "password": PASSWORD}
        await self.send("POST", "/profiles", json={**credentials, "name": "Ada"})
        token = (await self.send("POST", "/sessions", json=credentials)).json()["token"]
        return token, {**(await self.send("GET", "/profiles/me", token)).json(), **credentials}

    def product_body(self) -> dict[str, Any]:
        """Return what an administrator gives for a product that nobody has."""
        described = {"sku": uuid4().hex, "name": "Oak lamp", "description": "A lamp.", "category": "lamps"}
        return described | {"stock": 1000, "price": {"amount": 1999, "currency": "EUR"}}

    def order_of(self, products: list[str]) -> dict[str, Any]:
        """Return what a customer sends for an order of these products."""
        body = {"items": [{"product_id": each, "quantity": 1} for each in products], "payment_method": "tok_ok"}
        return {"json": body, "headers": {"Idempotency-Key": uuid4().hex}}

    async def new_product(self) -> str:
        """Return the id of a new product."""
        made = await self.send("POST", "/products", self.admin, json=self.product_body())
        self.products.append(made.json()["id"])
        return self.products[-1]

    async def new_order(self) -> str:
        """Return the id of a new order of the customer's."""
        made = await self.send("POST", "/orders", self.customer, **self.order_of([await self.some_product()]))
        self.orders.append(made.json()["id"])
        return self.orders[-1]

    async def some_product(self) -> str:
        """Return the id of a product."""
        return self.products[-1] if self.products else await self.new_product()

    async def some_order(self) -> str:
        """Return the id of an order of the customer's."""
        return self.orders[-1] if self.orders else await self.new_order()

    async def forget_what_is_cached(self) -> None:
        """Empty Redis but for who is signed in."""
        names = [name async for name in self.resources.redis.client.scan_iter("*")]
        await self.resources.redis.client.delete(*(name for name in names if not name.startswith(b"session:")))

    async def round_trips(self, method: str, path: str, token: str | None, more: dict[str, Any]) -> int:
        """Return how often the request asks the database with nothing in the cache."""
        await self.forget_what_is_cached()
        before = self.wire.round_trips
        await self.send(method, path, token, **more)
        return self.wire.round_trips - before


@pytest.fixture(scope="module")
async def shop(quiet: Resources) -> AsyncIterator[Shop]:
    """The instance: what it asks goes to the primary, its watcher looks once, and its memory keeps nothing."""
    (only,) = quiet.settings.database.shards
    async with Wire.to(only.primary) as wire:
        behind = only.model_copy(update={"primary": wire.instead_of(only.primary), "replicas": ()})
        settings = quiet.settings.model_copy(
            update={
                "database": quiet.settings.database.model_copy(update={"shards": (behind,), "replica_poll": 3600}),
                "cache": quiet.settings.cache.model_copy(update={"local_entries": 0}),
            }
        )
        app = create_app(settings)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
        ):
            routes = {
                f"{method} {route.path}"
                for route in iter_route_contexts(app.routes)
                for method in route.methods or ()
                if not str(route.path).startswith(WITHOUT_DATABASE)
            }
            routes -= STREAMS
            made = Shop(client, wire, app.state.resources, routes)
            made.customer, made.profile = await made.sign_up()
            made.admin, administrator = await made.sign_up()
            promote = update(profiles).where(profiles.c.profile_id == UUID(administrator["id"])).values(role=ADMIN)
            async with quiet.database.writer() as writer:
                await writer.run(promote)
            credentials = {"email": administrator["email"], "password": PASSWORD}
            made.admin = (await made.send("POST", "/sessions", json=credentials)).json()["token"]
            yield made


Asked = tuple[str, str, str | None, dict[str, Any]]  # method, path below /api/v1, token, and what else is sent
Scenario = Callable[[Shop], Awaitable[Asked]]
SCENARIOS: dict[str, Scenario] = {}


def scenario(route: str) -> Callable[[Scenario], Scenario]:
    """Register what asks `route`: it makes what has to be there, and returns the request that is counted."""

    def register(made: Scenario) -> Scenario:
        SCENARIOS[route] = made
        return made

    return register


def reading(route: str, path: str, *, role: str | None = "customer") -> None:
    """Register a route that only reads what is there already."""

    async def ask(shop: Shop) -> Asked:
        found = {"profile": shop.profile["id"], "product": await shop.some_product(), "order": await shop.some_order()}
        return "GET", path.format(**found), getattr(shop, role) if role else None, {}

    scenario(f"GET /api/v1{route}")(ask)


reading("/profiles/me", "/profiles/me")
reading("/profiles/{profile_id}", "/profiles/{profile}", role=None)
reading("/profiles", "/profiles?name_prefix=ada&limit=100")
reading("/sessions", "/sessions")
reading("/products", "/products?limit=100")
reading("/products/search", "/products/search?q=lamp&limit=100")
reading("/products/{product_id}", "/products/{product}", role=None)
reading("/products/{product_id}/recommendations", "/products/{product}/recommendations")
reading("/orders", "/orders?limit=100")
reading("/orders/{order_id}", "/orders/{order}")
reading("/admin/dead-letters", "/admin/dead-letters?limit=100", role="admin")
reading("/admin/shards", "/admin/shards", role="admin")
reading("/admin/breakers", "/admin/breakers", role="admin")


@scenario("POST /api/v1/profiles")
async def sign_up(_shop: Shop) -> Asked:
    return "POST", "/profiles", None, {"json": {"email": f"{uuid4().hex}@x.example", "password": PASSWORD, "name": "A"}}


@scenario("PATCH /api/v1/profiles/{profile_id}")
async def change_profile(shop: Shop) -> Asked:
    token, profile = await shop.sign_up()
    return "PATCH", f"/profiles/{profile['id']}", token, {"json": {"name": "Eve"}, "headers": {"If-Match": '"v1"'}}


@scenario("DELETE /api/v1/profiles/{profile_id}")
async def erase_profile(shop: Shop) -> Asked:
    token, profile = await shop.sign_up()
    return "DELETE", f"/profiles/{profile['id']}", token, {"headers": {"If-Match": '"v1"'}}


@scenario("POST /api/v1/sessions")
async def sign_in(shop: Shop) -> Asked:
    return "POST", "/sessions", None, {"json": {"email": shop.profile["email"], "password": PASSWORD}}


@scenario("DELETE /api/v1/sessions/current")
async def sign_out(shop: Shop) -> Asked:
    token, _ = await shop.sign_up()
    return "DELETE", "/sessions/current", token, {}


@scenario("DELETE /api/v1/sessions")
async def sign_out_everywhere(shop: Shop) -> Asked:
    token, _ = await shop.sign_up()
    return "DELETE", "/sessions", token, {}


@scenario("POST /api/v1/products")
async def create_product(shop: Shop) -> Asked:
    return "POST", "/products", shop.admin, {"json": shop.product_body()}


@scenario("PATCH /api/v1/products/{product_id}")
async def change_product(shop: Shop) -> Asked:
    product = await shop.new_product()
    return "PATCH", f"/products/{product}", shop.admin, {"json": {"name": "B"}, "headers": {"If-Match": '"v1"'}}


@scenario("POST /api/v1/orders")
async def place_order(shop: Shop) -> Asked:
    return "POST", "/orders", shop.customer, shop.order_of([await shop.new_product() for _ in range(3)])


@scenario("POST /api/v1/orders/{order_id}/cancel")
async def cancel_order(shop: Shop) -> Asked:
    return "POST", f"/orders/{await shop.new_order()}/cancel", shop.customer, {}


@scenario("GET /api/v1/orders/{order_id}/invoice")
async def invoice(shop: Shop) -> Asked:
    order = await shop.new_order()
    async with shop.resources.database.writer(UUID(order)) as writer:
        mine = (orders.c.profile_id == UUID(shop.profile["id"]), orders.c.id == UUID(order))
        await writer.run(update(orders).where(*mine).values(invoice_key="invoices/x.pdf"))
    return "GET", f"/orders/{order}/invoice", shop.customer, {}


@scenario("PUT /api/v1/profiles/{profile_id}/avatar")
async def upload_avatar(shop: Shop) -> Asked:
    body = {"json": {"content_type": "image/png", "size": 1000}}
    return "PUT", f"/profiles/{shop.profile['id']}/avatar", shop.customer, body


REPORT = {"json": {"kind": "sales", "from": "2026-11-01", "to": "2026-11-02"}}


@scenario("POST /api/v1/reports")
async def ask_for_report(shop: Shop) -> Asked:
    return "POST", "/reports", shop.admin, REPORT


@scenario("GET /api/v1/jobs/{job_id}")
async def see_job(shop: Shop) -> Asked:
    job = (await shop.send("POST", "/reports", shop.admin, **REPORT)).json()["job_id"]
    return "GET", f"/jobs/{job}", shop.admin, {}


@scenario("POST /api/v1/jobs/{job_id}/cancel")
async def cancel_job(shop: Shop) -> Asked:
    job = (await shop.send("POST", "/reports", shop.admin, **REPORT)).json()["job_id"]
    return "POST", f"/jobs/{job}/cancel", shop.admin, {}


@scenario("POST /api/v1/admin/dead-letters/{letter_id}/replay")
async def replay_dead_letter(shop: Shop) -> Asked:
    subject = new_id()
    message = outbox.message_row("test.event", profile_id=subject, subject_id=subject)
    async with shop.resources.database.writer(subject) as writer:
        await writer.run(insert(outbox.outbox), message.values)
        row = await writer.first(select(outbox.outbox).where(outbox.outbox.c.profile_id == subject))
        await outbox.bury(writer, outbox.message_from(row, tries=1), "test.task", "it is broken")
        letter = await writer.first(select(outbox.dead_letters.c.id).where(outbox.dead_letters.c.profile_id == subject))
    return "POST", f"/admin/dead-letters/{letter.id}/replay", shop.admin, {}


def test_every_route_has_a_budget_and_is_asked(shop: Shop) -> None:
    assert set(budgets()) == shop.routes
    assert set(SCENARIOS) == shop.routes


@pytest.mark.sabotage(
    path="app/scaling/database/__init__.py", take_out="        if statement is None:\n", put="        if statement:\n"
)
@pytest.mark.parametrize("route", SCENARIOS)
async def test_a_route_stays_within_its_budget_of_round_trips(shop: Shop, route: str) -> None:
    ask = SCENARIOS[route]
    # Once to prepare its statements, on the connection that the pool gives out next as well.
    await shop.round_trips(*await ask(shop))
    assert await shop.round_trips(*await ask(shop)) <= budgets()[route]


@pytest.mark.sabotage(
    path="app/domain/orders/service.py",
    take_out="        return self._cursors.page(scope, _orders(rows), limit,",
    put="        for order in _orders(rows):\n            await self.load(profile_id, order.id)\n"
    "        return self._cursors.page(scope, _orders(rows), limit,",
)
@pytest.mark.parametrize(
    ("path", "role"),
    [("/profiles", None), ("/products", None), ("/products/search?q=lamp", None), ("/orders", "customer")],
)
async def test_a_longer_page_asks_the_database_no_more_often(shop: Shop, path: str, role: str | None) -> None:
    for _ in range(3):
        await shop.new_order()
    token = getattr(shop, role) if role else None
    mark = "&" if "?" in path else "?"
    for limit in (1, 100):
        await shop.round_trips("GET", f"{path}{mark}limit={limit}", token, {})
    counts = [await shop.round_trips("GET", f"{path}{mark}limit={limit}", token, {}) for limit in (1, 100)]
    assert counts == [1, 1]


async def test_an_order_that_is_sent_again_changes_nothing_and_is_replayed(shop: Shop) -> None:
    sent = shop.order_of([await shop.new_product()])
    first = await shop.send("POST", "/orders", shop.customer, **sent)
    again = await shop.send("POST", "/orders", shop.customer, **sent)
    assert (again.content, again.headers["idempotent-replayed"]) == (first.content, "true")


@pytest.mark.sabotage(
    path="app/scaling/deadletters.py",
    take_out="select(dead_letters).where(*letter).with_for_update()",
    put="select(dead_letters).where(dead_letters.c.id == letter_id).with_for_update()",
)
async def test_every_statement_of_every_route_names_the_profile_or_is_meant_for_all(shop: Shop) -> None:
    for ask in SCENARIOS.values():
        await shop.round_trips(*await ask(shop))
    assert strays(shop.wire.statements) == []
