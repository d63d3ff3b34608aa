"""The catalog on real servers: stock that is never sold twice, search, pages and versions."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import orjson
import pytest
from quiet import REPLICAS, Servers, stranger
from sqlalchemy import select

from app.core import context
from app.core.errors import Conflict, NotFound, PreconditionFailed
from app.core.ids import new_id
from app.domain.catalog.rules import NewProduct, OutOfStock, Product, Reserved, Wanted
from app.domain.catalog.tables import products
from app.wiring import Resources

pytest_plugins = ("quiet",)

LYON = UUID("00000000-0000-8000-8000-000000000002")


async def product_of(instance: Resources, stock: int = 10, **more: Any) -> Product:
    fields: dict[str, Any] = {
        "sku": uuid4().hex, "name": "Test Thing", "description": "Made for a test.", "category": "tests",
        "amount": 1999, "currency": "EUR", "attributes": {}, "stock": stock,
    }  # fmt: skip
    return await instance.catalog.create(NewProduct(**fields | more))


async def available(instance: Resources, product: Product) -> int:
    """Return what the primary and the cache both say is left."""
    row = await instance.database.reader(newest=True).first(
        select(products.c.available).where(products.c.id == product.id)
    )
    assert row is not None
    shown = orjson.loads((await instance.catalog.product(product.id)).body or b"")["available"]
    assert shown == row.available
    return int(row.available)


async def free(servers: Servers, product: Product) -> int:
    (row,) = await servers.sql("primary", "SELECT sum(free) AS free FROM stock WHERE product_id = $1", product.id)
    return int(row["free"])


@pytest.mark.sabotage(
    path="app/domain/catalog/service.py",
    take_out="stock.c.warehouse_id)\n            .with_for_update()\n",
    put="stock.c.warehouse_id)\n",
)
async def test_two_hundred_buyers_of_the_last_ten_pieces_get_exactly_ten(
    quiet: Resources, other: Resources, servers: Servers
) -> None:
    product = await product_of(quiet, stock=10)
    places = asyncio.Semaphore(8)  # below the pools' bound, which is not what this is about

    async def buy(number: int) -> bool:
        instance = (quiet, other)[number % 2]
        async with places:
            return isinstance(await instance.catalog.reserve(new_id(), [Wanted(product.id, 1)], None), Reserved)

    outcomes = await asyncio.gather(*(buy(number) for number in range(200)))
    assert sum(outcomes) == 10
    assert await free(servers, product) == 0
    assert await available(quiet, product) == 0


async def test_orders_of_the_same_products_in_any_order_do_not_block_each_other(
    quiet: Resources, other: Resources, servers: Servers
) -> None:
    made = [await product_of(quiet, stock=100) for _ in range(3)]

    async def buy(number: int) -> Any:
        turned = made[number % 3 :] + made[: number % 3]
        instance, order_id = (quiet, other)[number % 2], new_id()
        outcome = await instance.catalog.reserve(order_id, [Wanted(product.id, 2) for product in turned], None)
        if number % 4 == 0:
            await instance.catalog.release(order_id)
        return outcome

    for start in range(0, 40, 8):
        outcomes = await asyncio.gather(*(buy(number) for number in range(start, start + 8)))
        assert all(isinstance(outcome, Reserved) for outcome in outcomes)
    for product in made:
        assert await free(servers, product) == 100 - 2 * 30
        assert await available(quiet, product) == 100 - 2 * 30


async def test_an_order_is_served_whole_or_not_at_all(quiet: Resources, servers: Servers) -> None:
    plenty, scarce = await product_of(quiet, stock=10), await product_of(quiet, stock=1)
    outcome = await quiet.catalog.reserve(new_id(), [Wanted(plenty.id, 1), Wanted(scarce.id, 2)], None)
    assert outcome == OutOfStock((scarce.id,))
    assert (await free(servers, plenty), await free(servers, scarce)) == (10, 1)


@pytest.mark.sabotage(
    path="app/domain/catalog/service.py",
    take_out="            first = await self._claim(writer, order_id)",
    put="            first = await self._claim(writer, new_id())",
)
async def test_the_same_order_asked_again_takes_nothing_and_answers_as_at_first(
    quiet: Resources, other: Resources, servers: Servers
) -> None:
    plenty, scarce = await product_of(quiet, stock=10), await product_of(quiet, stock=1)
    served, refused = new_id(), new_id()
    few, many = [Wanted(plenty.id, 3)], [Wanted(plenty.id, 3), Wanted(scarce.id, 2)]
    answers = await asyncio.gather(*(instance.catalog.reserve(served, few, None) for instance in (quiet, other) * 2))
    assert isinstance(answers[0], Reserved)
    assert all(answer == answers[0] for answer in answers)
    first = await quiet.catalog.reserve(refused, many, None)
    assert await other.catalog.reserve(refused, many, None) == first == OutOfStock((scarce.id,))
    assert await free(servers, plenty) == 7


@pytest.mark.sabotage(
    path="app/domain/catalog/service.py",
    take_out="                await self._settle(writer, order_id, RELEASED, _told(allocations))\n",
    put="",
)
async def test_releasing_puts_the_pieces_back_once(quiet: Resources, other: Resources, servers: Servers) -> None:
    product, order_id = await product_of(quiet, stock=10), new_id()
    await quiet.catalog.reserve(order_id, [Wanted(product.id, 4)], None)
    await asyncio.gather(*(instance.catalog.release(order_id) for instance in (quiet, other) * 2))
    await quiet.catalog.release(new_id())
    assert await free(servers, product) == 10
    assert await available(other, product) == 10
    assert isinstance(await quiet.catalog.reserve(order_id, [Wanted(product.id, 4)], None), OutOfStock)


@pytest.mark.sabotage(
    path="app/domain/catalog/rules.py",
    take_out="distance(*place, shelf.lat, shelf.lon) if place else -shelf.free",
    put="-shelf.free",
)
async def test_the_nearest_warehouse_ships_and_is_told_once(quiet: Resources, servers: Servers) -> None:
    product, order_id = await product_of(quiet, stock=10), new_id()
    await servers.sql("primary", "INSERT INTO stock VALUES ($1, $2, 5)", product.id, LYON)
    outcome = await quiet.catalog.reserve(order_id, [Wanted(product.id, 2)], (48.86, 2.35))
    assert isinstance(outcome, Reserved)
    assert [allocation.warehouse_id for allocation in outcome.allocations] == [LYON]
    for _ in range(2):
        await quiet.catalog.dispatch(order_id)
    (row,) = await servers.sql("primary", "SELECT * FROM reservations WHERE order_id = $1", order_id)
    assert (row["state"], row["warehouse_id"]) == ("dispatched", LYON)
    await quiet.catalog.release(order_id)
    assert await free(servers, product) == 15, "a cancelled order is off the pick list"


async def test_search_finds_words_phrases_and_exclusions_best_first(quiet: Resources) -> None:
    mark = f"q{uuid4().hex[:8]}"
    for name, description in (
        (f"{mark} lamp", "Brass."), ("Shade", f"Fits every {mark} lamp."), (f"Folding {mark} chair", "Oak."),
    ):  # fmt: skip
        await product_of(quiet, name=name, description=description)

    async def names(query: str) -> list[str]:
        return [
            item["name"]
            for item in orjson.loads(await quiet.cache.page(quiet.catalog.search(query, 10, None)))["items"]
        ]

    assert await names(f"{mark} lamps") == [f"{mark} lamp", "Shade"]
    assert await names(f'"{mark} chair"') == [f"Folding {mark} chair"]
    assert await names(f"{mark} -lamp") == [f"Folding {mark} chair"]
    for odd in ("", "   ", "&|!():*", "'", '"', "\\", "%", "-", "or", "🙂"):
        assert isinstance(await names(odd), list)


async def test_pages_of_a_search_show_each_product_once_best_first(quiet: Resources) -> None:
    mark = f"p{uuid4().hex[:8]}"
    expected = set()
    for number in range(7):
        product = await product_of(quiet, name=f"{mark} " * (1 + number % 3), description=f"{mark} " * number)
        expected.add(str(product.id))
    shown, cursor = [], None
    for _ in range(10):
        answer = orjson.loads(await quiet.cache.page(quiet.catalog.search(mark, 2, cursor)))
        shown += [item["id"] for item in answer["items"]]
        cursor = answer["next_cursor"]
        if cursor is None:
            break
    assert len(shown) == 7
    assert set(shown) == expected
    whole = orjson.loads(await quiet.cache.page(quiet.catalog.search(mark, 100, None)))
    assert [item["id"] for item in whole["items"]] == shown


@pytest.mark.sabotage(
    path="app/domain/catalog/service.py",
    take_out="await asyncio.gather(self._refresh(written), self._cache.raise_generation(GENERATION, position))",
    put="await self._refresh(written)",
)
async def test_a_new_product_is_on_the_list_at_once_for_everybody(
    quiet: Resources, other: Resources, servers: Servers
) -> None:
    await other.cache.page(other.catalog.listed(3, None))
    async with servers.paused(*REPLICAS):
        product = await product_of(quiet)
        with context.working(stranger()):
            first = orjson.loads(await other.cache.page(other.catalog.listed(3, None)))["items"][0]
    assert first["id"] == str(product.id)


async def test_a_product_is_changed_at_its_version_and_stock_movements_do_not_count(quiet: Resources) -> None:
    product = await product_of(quiet)
    await quiet.catalog.reserve(new_id(), [Wanted(product.id, 1)], None)
    changed = await quiet.catalog.change(product.id, 1, {"amount": 2999})
    assert (changed.version, changed.amount, changed.available) == (2, 2999, 9)
    assert changed.revision > product.revision
    with pytest.raises(PreconditionFailed):
        await quiet.catalog.change(product.id, 1, {"amount": 1})
    with pytest.raises(NotFound):
        await quiet.catalog.change(new_id(), 1, {"amount": 1})
    with pytest.raises(Conflict) as refusal:
        await product_of(quiet, sku=product.sku)
    assert refusal.value.code == "sku_taken"
