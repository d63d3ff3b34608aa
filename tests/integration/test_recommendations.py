"""Recommendations come from the best source that has any, and from some source whatever is down."""

from typing import Any
from uuid import UUID, uuid4

import pytest
from conftest import settings_from
from sagas import Shop
from sqlalchemy import delete

from app.core import wire
from app.core.ids import new_id
from app.core.telemetry import RECOMMENDATIONS
from app.domain.catalog.rules import NewProduct
from app.domain.catalog.tables import products, stock
from app.domain.orders.rules import Order
from app.domain.reports.tables import bought_together, sales
from app.wiring import Resources, open_resources

pytest_plugins = ("sagas",)

NOWHERE = {"DATABASE_URL": "postgresql://nobody:nothing@127.0.0.1:1/nothing", "REDIS_URL": "redis://127.0.0.1:1/0"}


@pytest.fixture
async def shop(shop: Shop) -> Shop:
    async with shop.apart.resources.database.writer() as writer:
        for table in (stock, products, sales, bought_together):
            await writer.run(delete(table))
    return shop


async def shown(resources: Resources, product_id: UUID) -> tuple[str, list[UUID]]:
    answer: dict[str, Any] = wire.decode(await resources.recommendations.of(product_id))
    return answer["source"], [UUID(item["id"]) for item in answer["items"]]


async def product(shop: Shop, category: str, amount: int, stock: int = 5) -> UUID:
    new = NewProduct(uuid4().hex, "Thing", "", category, amount, "EUR", {}, stock)
    return (await shop.apart.resources.catalog.create(new)).id


async def sold(shop: Shop, *quantities: int) -> tuple[Order, list[UUID]]:
    order = await shop.order(*quantities)
    await shop.drain()
    return order, [line.product_id for line in order.lines]


@pytest.mark.sabotage(
    "app/domain/reports/recommendations.py", "bought_together.c.orders > 0,", "bought_together.c.orders < 0,"
)
async def test_each_source_gives_way_to_the_next(shop: Shop) -> None:
    resources = shop.apart.resources
    lamp, near, far = (
        await product(shop, "light", 100),
        await product(shop, "light", 120),
        await product(shop, "light", 900),
    )
    alone, gone = await product(shop, "garden", 100), await product(shop, "light", 101, stock=0)
    _, (first, second) = await sold(shop, 2, 3)
    before = RECOMMENDATIONS.labels("model")._value.get()
    assert await shown(resources, first) == ("model", [second])
    assert await shown(resources, second) == ("model", [first])
    assert RECOMMENDATIONS.labels("model")._value.get() == before + 2
    assert await shown(resources, lamp) == ("rules", [near, far])
    source, popular = await shown(resources, alone)
    assert (source, popular[:2]) == ("popular", [second, first])
    assert {near, far, lamp} <= set(popular)
    assert not {alone, gone} & set(popular)
    assert (await shown(resources, new_id()))[0] == "popular", "of an unknown product, too"


async def test_a_cancelled_order_recommends_nothing(shop: Shop) -> None:
    order, (first, _) = await sold(shop, 1, 1)
    await shop.apart.resources.orders.cancel(order.profile_id, order.id)
    await shop.drain()
    assert (await shown(shop.apart.resources, first))[0] == "rules"


@pytest.mark.sabotage(
    "app/domain/reports/recommendations.py",
    '            log.warning("recommendations fall back", source="popular", reason=error.code)\n',
    "            raise\n",
)
async def test_without_database_and_redis_the_last_popular_ones_stand_in(shop: Shop) -> None:
    _, (first, _) = await sold(shop, 1, 1)
    async with open_resources(settings_from(shop.apart.environment | NOWHERE)) as cut_off:
        assert await shown(cut_off, first) == ("popular", [])
        cut_off.recommendations._popular = [{"id": str(first)}, {"id": str(new_id())}]
        source, items = await shown(cut_off, first)
        assert (source, len(items)) == ("popular", 1)


async def test_without_the_database_what_is_cached_is_still_shown(shop: Shop) -> None:
    _, (first, second) = await sold(shop, 1, 1)
    assert await shown(shop.apart.resources, first) == ("model", [second])
    database_down = shop.apart.environment | {"DATABASE_URL": NOWHERE["DATABASE_URL"]}
    async with open_resources(settings_from(database_down)) as cut_off:
        assert await shown(cut_off, first) == ("model", [second])
