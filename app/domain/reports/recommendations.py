"""What else a customer may like: bought together with it, else like it, else what sells; never an error.

    model     products that were in the same orders, most often first
    rules     products of the same category, nearest in price first
    popular   what sold most in a month, filled up with what is looked at most, then with what is new

Each source answers from the cache where it can. One that cannot answer is passed over, and of the last the answer that
this process saw before stands in.
"""

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import case, func, select

from app.core import wire
from app.core.errors import Unavailable
from app.core.telemetry import RECOMMENDATIONS, logger
from app.domain.catalog.service import Catalog
from app.domain.catalog.tables import product_views, products
from app.domain.reports.tables import bought_together, sales
from app.scaling.cache import ABSENT, Cache, Entry, Kind
from app.scaling.database import Database

log = logger(__name__)

SHOWN = 10  # a row of a shop's page
# Some of what is found is sold out, and one of the popular ones may be the product itself.
LOOKED_AT = 3 * SHOWN
POPULAR_DAYS = 30

# Taste moves by the day and stock by the minute: a piece that is gone is shown for a minute at most.
RECOMMENDED = Kind("recommendations", 60)
# One statement over a month of sales, for all products and everybody.
POPULAR = Kind("popular", 300)


class Recommendations:
    """Recommendations for products.

    Args:
        database: its catalog database has the sales.
        cache: keeps each source's answers.
        catalog: knows the products.
    """

    def __init__(self, database: Database, cache: Cache, catalog: Catalog) -> None:
        self._database = database
        self._cache = cache
        self._catalog = catalog
        self._popular: list[dict[str, Any]] = []

    async def of(self, product_id: UUID) -> bytes:
        """Return `{"items": [product, …], "source": "model" | "rules" | "popular"}` as JSON bytes; never fails."""
        for source, find in (("model", self._together), ("rules", self._alike)):
            items = await self._cached(source, product_id, find)
            if items:
                return _answer(items, source)
        items = [item for item in await self._popular_ones() if item["id"] != str(product_id)]
        return _answer(items[:SHOWN], "popular")

    async def _cached(
        self, source: str, product_id: UUID, find: Callable[[UUID], Awaitable[Sequence[UUID]]]
    ) -> list[dict[str, Any]]:
        async def load() -> Entry:
            views = await self._views(await find(product_id))
            return Entry(1, wire.encode(views[:SHOWN])) if views else ABSENT

        try:
            entry = await self._cache.read(RECOMMENDED, f"{source}:{product_id}", load)
        except Unavailable as error:
            log.warning("recommendations fall back", source=source, reason=error.code)
            return []
        return wire.decode(entry.body) if entry.body else []

    async def _popular_ones(self) -> list[dict[str, Any]]:
        async def load() -> Entry:
            return Entry(1, wire.encode(await self._views(await self._selling())))

        try:
            entry = await self._cache.read(POPULAR, "all", load)
        except Unavailable as error:
            log.warning("recommendations fall back", source="popular", reason=error.code)
        else:
            self._popular = wire.decode(entry.body) if entry.body else []
        return self._popular

    async def _together(self, product_id: UUID) -> Sequence[UUID]:
        other = case(
            (bought_together.c.product_id == product_id, bought_together.c.other_id), else_=bought_together.c.product_id
        )
        rows = await self._database.reader().all(
            select(other.label("id"))
            .where(
                (bought_together.c.product_id == product_id) | (bought_together.c.other_id == product_id),
                bought_together.c.orders > 0,
            )
            .order_by(bought_together.c.orders.desc(), other)
            .limit(LOOKED_AT)
        )
        return [row.id for row in rows]

    async def _alike(self, product_id: UUID) -> Sequence[UUID]:
        this = products.alias("this")
        rows = await self._database.reader().all(
            select(products.c.id)
            .join(this, (this.c.category == products.c.category) & (this.c.id != products.c.id))
            .where(this.c.id == product_id, products.c.available > 0)
            .order_by(func.abs(products.c.amount - this.c.amount), products.c.id)
            .limit(SHOWN)
        )
        return [row.id for row in rows]

    async def _selling(self) -> Sequence[UUID]:
        reader = self._database.reader()
        since = datetime.now(UTC).date() - timedelta(days=POPULAR_DAYS)
        sold = await reader.all(
            select(sales.c.product_id.label("id"))
            .where(sales.c.day >= since, sales.c.quantity > 0)
            .group_by(sales.c.product_id)
            .order_by(func.sum(sales.c.quantity).desc(), sales.c.product_id)
            .limit(LOOKED_AT)
        )
        looked_at = await reader.all(
            select(product_views.c.product_id.label("id")).order_by(product_views.c.views.desc()).limit(LOOKED_AT)
        )
        new = await reader.all(
            select(products.c.id).where(products.c.available > 0).order_by(products.c.id.desc()).limit(LOOKED_AT)
        )
        return list(dict.fromkeys(row.id for row in (*sold, *looked_at, *new)))[:LOOKED_AT]

    async def _views(self, product_ids: Sequence[UUID]) -> list[dict[str, Any]]:
        """Return the views of the products that can be bought, in the order of the ids."""
        found = await self._catalog.shown(product_ids)
        return [found[each] for each in product_ids if each in found and found[each]["available"]]


def _answer(items: list[dict[str, Any]], source: str) -> bytes:
    RECOMMENDATIONS.labels(source).inc()
    return wire.encode({"items": items, "source": source})
