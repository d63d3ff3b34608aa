"""Orders, invoices and their storage on real servers: one transaction each, no number twice, no link for ever."""

import asyncio
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import pytest
from conftest import until
from quiet import REPLICAS, Servers, stranger
from sqlalchemy import text

from app.core import context
from app.core.errors import Conflict, Invalid, NotFound, Unavailable
from app.core.ids import new_id
from app.core.settings import StorageSettings
from app.core.telemetry import CACHE_READS
from app.domain.catalog.rules import NewProduct, Product
from app.domain.orders.invoicing import key_of
from app.domain.orders.rules import NewItem, NewOrder, Order
from app.domain.orders.service import PLACE
from app.domain.profiles.rules import NewProfile, Profile
from app.scaling import dialect, outbox
from app.scaling.cache import PRODUCT
from app.scaling.dialect import Rows
from app.scaling.idempotency import Claim
from app.scaling.storage import Storage
from app.wiring import Resources

pytest_plugins = ("quiet",)


@pytest.fixture
async def profile(quiet: Resources) -> Profile:
    """A customer."""
    return await quiet.profiles.sign_up(NewProfile(f"{uuid4().hex}@example.com", "a long enough phrase", "Ada"))


async def product_of(instance: Resources, **more: Any) -> Product:
    fields: dict[str, Any] = {
        "sku": uuid4().hex, "name": "Thing", "description": "", "category": "tests", "amount": 1250,
        "currency": "EUR", "attributes": {}, "stock": 10,
    }  # fmt: skip
    return await instance.catalog.create(NewProduct(**fields | more))


async def place(instance: Resources, profile: Profile, *items: NewItem, key: str | None = None) -> Order:
    new = NewOrder(items, "tok_ok")
    claim = Claim.of(profile.id, PLACE, key or uuid4().hex, [[str(item.product_id), item.quantity] for item in items])
    placed = await instance.orders.place(profile.id, new, claim)
    return await instance.orders.load(profile.id, UUID(str(placed.reply["id"])))


async def count(servers: Servers, table: str, profile: Profile) -> int:
    statement = f"SELECT count(*) AS n FROM {table} WHERE profile_id = $1"  # noqa: S608  # our own tables
    (row,) = await servers.sql("primary", statement, profile.id)
    return int(row["n"])


async def test_an_order_its_items_its_key_and_its_message_are_one_transaction(
    quiet: Resources, servers: Servers, profile: Profile
) -> None:
    pen, ink = await product_of(quiet), await product_of(quiet, amount=300)
    order = await place(quiet, profile, NewItem(pen.id, 2), NewItem(ink.id, 3))
    assert (order.amount, order.currency, order.status) == (2 * 1250 + 3 * 300, "EUR", "processing")
    assert [(line.sku, line.quantity) for line in order.lines] == [(pen.sku, 2), (ink.sku, 3)]
    tables = ("orders", "order_items", "idempotency_keys", "outbox")
    assert [await count(servers, table, profile) for table in tables] == [1, 2, 1, 2]  # the profile told of itself


@pytest.mark.sabotage(
    path="app/domain/orders/service.py",
    take_out="""        stored = await claim.take(self._database, reply, *_rows(order), placed)
""",
    put="""        stored = await claim.take(self._database, reply)
        await self._database.insert_once(profile_id, placed, *_rows(order))
""",
)
async def test_an_order_that_fails_at_its_last_row_leaves_none_and_its_key_is_free(
    quiet: Resources, servers: Servers, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = outbox.message_row

    def too_long(event: str, **rest: Any) -> Rows:
        return right(event * 10, **rest)

    pen, key = await product_of(quiet), uuid4().hex
    with monkeypatch.context() as patched:
        patched.setattr(outbox, "message_row", too_long)
        with pytest.raises(dialect.ERRORS):
            await place(quiet, profile, NewItem(pen.id, 1), key=key)
    tables = ("orders", "order_items", "idempotency_keys")
    assert [await count(servers, table, profile) for table in tables] == [0, 0, 0]
    await place(quiet, profile, NewItem(pen.id, 1), key=key)
    assert [await count(servers, table, profile) for table in tables] == [1, 1, 1]


async def test_the_same_key_at_once_places_one_order_and_answers_alike(
    quiet: Resources, other: Resources, servers: Servers, profile: Profile
) -> None:
    product, key = await product_of(quiet), uuid4().hex
    placed = await asyncio.gather(
        *(place(instance, profile, NewItem(product.id, 1), key=key) for instance in (quiet, other) * 2)
    )
    assert len({order.id for order in placed}) == 1
    assert await count(servers, "orders", profile) == 1


async def test_a_refused_order_leaves_nothing_and_names_the_line(
    quiet: Resources, servers: Servers, profile: Profile
) -> None:
    euro, dollar = await product_of(quiet), await product_of(quiet, currency="USD")
    with pytest.raises(Invalid) as refusal:
        await place(quiet, profile, NewItem(euro.id, 1), NewItem(new_id(), 1))
    assert [(error.pointer, refusal.value.code) for error in refusal.value.fields] == [
        ("/items/1/product_id", "unknown_product")
    ]
    with pytest.raises(Invalid, match="same currency"):
        await place(quiet, profile, NewItem(euro.id, 1), NewItem(dollar.id, 1))
    assert [await count(servers, table, profile) for table in ("orders", "idempotency_keys")] == [0, 0]


@pytest.mark.sabotage(
    path="app/domain/catalog/service.py", take_out="for newest in (False, True):", put="for newest in (False,):"
)
async def test_a_product_made_just_now_can_be_ordered_although_no_replica_has_it(
    quiet: Resources, other: Resources, servers: Servers, profile: Profile
) -> None:
    async with servers.paused(*REPLICAS):
        product = await product_of(quiet)
        cached = quiet.cache.names_of(PRODUCT, str(product.id))[0]
        # Nor has Redis: it may have been lost with what the writer told it.
        await quiet.pipe.ask(cached, "DEL", cached)
        new = NewOrder((NewItem(product.id, 2),), "tok_ok")
        with context.working(stranger()):
            placed = await other.orders.place(profile.id, new, Claim.of(profile.id, PLACE, uuid4().hex, {}))
    assert placed.reply["total"]["amount"] == 2 * product.amount


async def test_an_order_costs_what_the_product_is_shown_for(
    quiet: Resources, other: Resources, profile: Profile
) -> None:
    product = await product_of(quiet, amount=1250)
    assert (await place(other, profile, NewItem(product.id, 1))).amount == 1250
    await quiet.catalog.change(product.id, 1, {"amount": 1300})
    assert (await place(other, profile, NewItem(product.id, 1))).amount == 1300


@pytest.mark.sabotage(
    path="app/scaling/cache.py",
    take_out="(near := self.kept(kind, key)) is not None and near.body is not None}",
    put="(near := None) is not None}",
)
async def test_prices_at_hand_are_asked_of_nobody(quiet: Resources) -> None:
    wanted = [(await product_of(quiet)).id for _ in range(3)]
    at_hand = CACHE_READS.labels("product", "l1")

    async def asks_nobody() -> bool:
        before = at_hand._value.get()
        assert set(await quiet.catalog.shown(wanted)) == set(wanted)
        return bool(at_hand._value.get() == before + len(wanted))

    await until(asks_nobody)


async def test_an_order_is_its_customers_only(quiet: Resources, profile: Profile) -> None:
    order = await place(quiet, profile, NewItem((await product_of(quiet)).id, 1))
    for stranger_, order_id in ((new_id(), order.id), (profile.id, new_id())):
        with pytest.raises(NotFound):
            await quiet.orders.get(stranger_, order_id)


async def test_pages_of_orders_show_each_once_newest_first_with_its_lines(quiet: Resources, profile: Profile) -> None:
    product = await product_of(quiet)
    placed = [await place(quiet, profile, NewItem(product.id, 1), NewItem(product.id, 2)) for _ in range(5)]
    shown, cursor = [], None
    for _ in range(6):
        page = await quiet.orders.listed(profile.id, 2, cursor)
        shown += [view["id"] for view in page.items]
        assert all(len(view["items"]) == 2 for view in page.items)
        cursor = page.next_cursor
        if cursor is None:
            break
    assert shown == [order.id for order in reversed(placed)]


@pytest.mark.sabotage(
    path="app/domain/orders/service.py",
    take_out="orders.c.id == order.id, orders.c.version == order.version)",
    put="orders.c.id == order.id)",
)
async def test_of_two_workers_at_one_order_one_moves_it(quiet: Resources, servers: Servers, profile: Profile) -> None:
    order = await place(quiet, profile, NewItem((await product_of(quiet)).id, 1))
    async with quiet.database.writer(profile.id) as writer:
        await quiet.orders.stock_reserved(writer, order)
    with pytest.raises(Unavailable) as refusal:
        async with quiet.database.writer(profile.id) as writer:
            await quiet.orders.out_of_stock(writer, order)
    assert refusal.value.code == "order_changed"
    reserved = await quiet.orders.load(profile.id, order.id)
    assert (reserved.step, reserved.version) == ("reserved", 2)
    with pytest.raises(Conflict) as turn:
        async with quiet.database.writer(profile.id) as writer:
            await quiet.orders.stock_reserved(writer, reserved)
    assert turn.value.code == "out_of_turn"
    assert await count(servers, "payment_attempts", profile) == 1


@pytest.mark.sabotage(
    path="app/domain/orders/invoicing.py",
    take_out="select(invoice_counters.c.last).where(invoice_counters.c.year == now.year).with_for_update()",
    put="select(invoice_counters.c.last).where(invoice_counters.c.year == now.year)",
)
async def test_fifty_invoices_at_once_with_failures_between_have_numbers_without_gaps(
    quiet: Resources, other: Resources, servers: Servers, profile: Profile
) -> None:
    order = await place(quiet, profile, NewItem((await product_of(quiet)).id, 1))
    for table in ("invoices", "invoice_counters"):
        await servers.sql("primary", f"DELETE FROM {table}")  # noqa: S608  # our own tables
    places = asyncio.Semaphore(8)
    raised = text("UPDATE invoice_counters SET last = last + 1")

    async def number(copy: Order, instance: Resources) -> str:
        async with places:
            return (await instance.invoices._number(copy)).number

    async def fail() -> None:
        # The counter is raised and the transaction lost, as when a process dies there.
        async with places:
            try:
                async with quiet.database.writer(profile.id) as writer:
                    await writer.run(raised)
                    raise Unavailable("lost")  # noqa: TRY301  # as a crash would
            except Unavailable:
                return

    copies = [replace(order, id=new_id(profile.id)) for _ in range(50)]
    work = [number(copy, (quiet, other)[place_ % 2]) for place_, copy in enumerate(copies)]
    numbers, _ = await asyncio.gather(asyncio.gather(*work), asyncio.gather(*(fail() for _ in range(10))))
    assert sorted(int(each.rpartition("-")[2]) for each in numbers) == list(range(1, 51))
    assert await number(copies[7], other) == numbers[7]


async def test_issuing_again_gives_the_same_number_and_the_same_bytes(
    quiet: Resources, other: Resources, profile: Profile
) -> None:
    order = await place(quiet, profile, NewItem((await product_of(quiet)).id, 3))
    stored = await quiet.invoices.issue(order)
    first = await quiet.invoices.pdf(order)
    assert (await other.invoices.issue(order), await other.invoices.pdf(order)) == (stored, first)
    assert stored.key == key_of(order.id)
    assert first.startswith(b"%PDF-")
    with pytest.raises(NotFound) as refusal:
        await quiet.orders.invoice_link(profile.id, order.id)
    assert refusal.value.code == "invoice_not_ready"


@pytest.fixture
def storage(tmp_path: Any) -> Storage:
    """A folder as object storage."""
    return Storage(StorageSettings(url=f"file://{tmp_path}/objects"), b"s" * 64, "http://shop.example/")


async def test_an_object_comes_back_as_it_was_put_also_when_put_twice(storage: Storage) -> None:
    for _ in range(2):
        await storage.put("invoices/1.pdf", b"\x00bytes", "application/pdf")
    assert await storage.get("invoices/1.pdf") == b"\x00bytes"
    with pytest.raises(NotFound):
        await storage.get("invoices/2.pdf")


@pytest.mark.sabotage(path="app/scaling/storage.py", take_out="    if now > expires_at:", put="    if not named:")
async def test_a_link_opens_its_object_until_it_expires(storage: Storage) -> None:
    link = await storage.link("invoices/1.pdf", now=1000.0)
    signed = urlsplit(link).path.rpartition("/")[2]
    assert link.startswith("http://shop.example/files/")
    assert storage.open_link(signed, now=1300.0) == "invoices/1.pdf"
    with pytest.raises(NotFound) as refusal:
        storage.open_link(signed, now=1301.0)
    assert refusal.value.code == "link_expired"


async def test_a_link_that_is_not_ours_opens_nothing(storage: Storage, tmp_path: Any) -> None:
    stranger_ = Storage(StorageSettings(url=f"file://{tmp_path}"), b"t" * 64, "http://shop.example")
    foreign = urlsplit(await stranger_.link("invoices/1.pdf", now=1000.0)).path.rpartition("/")[2]
    for signed in (foreign, "", "x", "../../etc/passwd"):
        with pytest.raises(NotFound):
            storage.open_link(signed, now=1000.0)


async def test_a_storage_that_takes_nothing_is_unavailable(tmp_path: Any) -> None:
    storage = Storage(StorageSettings(url=f"file://{tmp_path}"), b"s" * 64, "http://shop.example")
    (tmp_path / "invoices").write_text("a file where a folder should be")
    with pytest.raises(Unavailable) as refusal:
        await storage.put("invoices/1.pdf", b"x", "application/pdf")
    assert refusal.value.code == "storage_down"
