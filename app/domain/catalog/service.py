"""The use cases of the catalog: reading, searching and editing products, and setting stock aside for orders.

Stock moves only here, in one transaction of the catalog database each, and each move is keyed by its order: asked
twice it happens once.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Row, Select, bindparam, insert, select, tuple_, update
from sqlalchemy.exc import IntegrityError

from app.core import context, wire
from app.core.errors import Conflict, Invalid, NotFound, PreconditionFailed
from app.core.ids import new_id
from app.domain.catalog.rules import Allocation, NewProduct, OnHand, OutOfStock, Product, Reserved, Wanted, allocate
from app.domain.catalog.tables import product_views, products, reservations, stock, warehouses
from app.scaling import outbox
from app.scaling.cache import ABSENT, LIST, PRODUCT, SEARCH, Cache, Entry, Kind, Listing, Load
from app.scaling.database import CATALOG_SHARD, Database, Writer
from app.scaling.dialect import by_primary_key, insert_adding, insert_ignore, match_rank, matches
from app.scaling.lookup import Lookup
from app.scaling.paging import Cursors, Page
from app.scaling.tally import Counts, Tally

GENERATION = "products"
STALE = "The product has changed since you read it; read it again, then change it."
# A change outside of any request, which has no deadline, is over by then; and what a commit that was sent at the last
# moment still needs to arrive.
CHANGE_SECONDS = 10.0
COMMIT_SECONDS = 5.0
RESERVED, REFUSED, RELEASED, DISPATCHED = "reserved", "refused", "released", "dispatched"
_COLUMNS = [column for column in products.c if column.name != "words"]
_BY_ID = Lookup(select(*_COLUMNS).where(products.c.id == bindparam("product_id")))


class Catalog:
    """Products and stock.

    Args:
        database: its catalog database holds them.
        cache: holds products, list pages and search results.
        cursors: makes the cursors of lists.
        views: counts who looks at products.
    """

    def __init__(self, database: Database, cache: Cache, cursors: Cursors, views: Tally) -> None:
        self._views = views
        self._database = database
        self._cache = cache
        self._cursors = cursors
        cache.loads(PRODUCT, self._loader)

    async def product(self, product_id: UUID) -> Entry:
        """Return the product as JSON bytes, with its revision, and count the view; no body for an unknown one."""
        entry = await self._cache.read(PRODUCT, str(product_id), self._loader(str(product_id)))
        if entry.body is not None:
            self._views.count(str(product_id))
        return entry

    async def shown(self, product_ids: Iterable[UUID]) -> dict[UUID, dict[str, Any]]:
        """Return the products that exist among `product_ids`, as everybody sees them at this moment.

        A product that was made just now exists, although no replica may have it yet.
        """
        found = await self._cache.several(PRODUCT, [str(each) for each in product_ids], self._loaded)
        return {UUID(key): wire.decode(entry.body or b"") for key, entry in found.items()}

    def listed(self, limit: int, cursor: str | None) -> Listing:
        """Return a page of products, newest first.

        Raises:
            Invalid: if the cursor is not one of this list.
        """
        scope = "products"
        after = self._cursors.open_id(scope, cursor)
        statement = select(*_COLUMNS).order_by(products.c.id.desc()).limit(limit + 1)
        if after is not None:
            statement = statement.where(products.c.id < after)

        def page(rows: Sequence[Row[Any]]) -> Page[dict[str, Any]]:
            return self._cursors.page(scope, rows, limit, key=lambda row: str(row.id), item=_view)

        return self._listing(LIST, f"{limit}:{after}", statement, page)

    def search(self, text: str, limit: int, cursor: str | None) -> Listing:
        """Return a page of products that match `text`, best first.

        Args:
            text: words, "quoted phrases", or and -not, as people type them.
            limit: items on the page.
            cursor: where the page starts, from the page before.

        Raises:
            Invalid: if the cursor is not one of this search.
        """
        scope = f"search {text}"
        after = self._cursors.open(scope, cursor)
        rank = match_rank(products.c.words, text).label("rank")
        found = select(*_COLUMNS, rank).where(matches(products.c.words, text)).subquery()
        statement = select(found).order_by(found.c.rank.desc(), found.c.id.desc()).limit(limit + 1)
        if after is not None:
            statement = statement.where(tuple_(found.c.rank, found.c.id) < tuple_(after[0], UUID(after[1])))

        def page(rows: Sequence[Row[Any]]) -> Page[dict[str, Any]]:
            return self._cursors.page(scope, rows, limit, key=lambda row: [row.rank, str(row.id)], item=_view)

        return self._listing(SEARCH, f"{limit}:{wire.encode([text, after]).decode()}", statement, page)

    async def create(self, new: NewProduct) -> Product:
        """Add a product; its stock goes to the first warehouse.

        Raises:
            Conflict: `sku_taken`.
            Invalid: if there is no warehouse for the stock.
        """
        now = datetime.now(UTC)
        product = Product(
            id=new_id(),
            sku=new.sku,
            name=new.name,
            description=new.description,
            category=new.category,
            amount=new.amount,
            currency=new.currency,
            attributes=new.attributes,
            available=new.stock,
            version=1,
            revision=1,
            created_at=now,
            updated_at=now,
        )
        try:
            async with self._database.writer() as writer:
                warehouse = await writer.first(select(warehouses.c.id).order_by(warehouses.c.name).limit(1))
                if warehouse is None and new.stock:
                    raise Invalid.field("/stock", "There is no warehouse yet that could hold stock.")
                await writer.run(insert(products).values(**{c.name: getattr(product, c.name) for c in _COLUMNS}))
                if warehouse is not None:
                    await writer.run(
                        insert(stock).values(product_id=product.id, warehouse_id=warehouse.id, free=new.stock)
                    )
        except IntegrityError as error:
            raise Conflict("There is a product with this SKU already.", code="sku_taken") from error
        await self._written([product])
        return product

    async def change(self, product_id: UUID, version: int, changes: dict[str, Any]) -> Product:
        """Apply `changes` (of name, description, category, amount, currency, attributes) to the product at `version`.

        Raises:
            NotFound: if there is no such product.
            PreconditionFailed: if it is not at `version` any more.
        """
        await self._have_refreshed(product_id)
        async with self._database.writer() as writer:
            changed = await writer.run(
                update(products)
                .where(products.c.id == product_id, products.c.version == version)
                .values(
                    **changes,
                    version=version + 1,
                    revision=products.c.revision + 1,
                    updated_at=datetime.now(UTC),
                )
            )
            row = await writer.first(select(*_COLUMNS).where(products.c.id == product_id))
            if row is None:
                raise NotFound("There is no such product.")
            if not changed:
                raise PreconditionFailed(STALE)
        product = _product(row)
        await self._written([product])
        return product

    async def refresh(self, product_id: UUID) -> None:
        """Have the cache show the product as it is, whatever it was told of it before.

        Raises:
            RedisDown: if it cannot be told.
        """
        row = await self._database.reader(newest=True).first(select(*_COLUMNS).where(products.c.id == product_id))
        if row is not None:
            await self._cache.deliver(PRODUCT, str(product_id), _entry(_product(row)))

    async def reserve(
        self, order_id: UUID, wanted: Sequence[Wanted], place: tuple[float, float] | None
    ) -> Reserved | OutOfStock:
        """Set the order's lines aside, all or none; asked again, answer as at first."""
        async with self._database.writer() as writer:
            first = await self._claim(writer, order_id)
            outcome = await (
                self._set_aside(writer, order_id, wanted, place) if first else self._answered(writer, order_id, wanted)
            )
            # Also when it is asked again: whoever moved the stock may have died before the cache heard of it.
            moved = await _moved(writer, outcome.allocations if isinstance(outcome, Reserved) else ())
        await self._refresh(moved)
        return outcome

    async def release(self, order_id: UUID) -> None:
        """Put back what is set aside for the order or on a pick list; once, and nothing if nothing is.

        An order that has not asked yet is given nothing afterwards either: what asks for it was overtaken.
        """
        async with self._database.writer() as writer:
            if await self._claim(writer, order_id):
                await self._settle(writer, order_id, RELEASED, [])
                return
            row = await writer.first(
                select(reservations)
                .where(reservations.c.order_id == order_id, reservations.c.state != REFUSED)
                .with_for_update()
            )
            if row is None:
                return
            allocations = _allocations(row)
            if row.state != RELEASED:
                await self._settle(writer, order_id, RELEASED, _told(allocations))
                await self._move(writer, allocations, sign=1)
            moved = await _moved(writer, allocations)  # as above
        await self._refresh(moved)

    async def dispatch(self, order_id: UUID) -> None:
        """Put the order on the pick list of the warehouse that ships the most pieces of it; once."""
        async with self._database.writer() as writer:
            row = await writer.first(
                select(reservations)
                .where(reservations.c.order_id == order_id, reservations.c.state == RESERVED)
                .with_for_update()
            )
            if row is None:
                return
            pieces: dict[UUID, int] = {}
            for allocation in _allocations(row):
                pieces[allocation.warehouse_id] = pieces.get(allocation.warehouse_id, 0) + allocation.quantity
            await writer.run(
                update(reservations)
                .where(reservations.c.order_id == order_id)
                .values(
                    state=DISPATCHED,
                    warehouse_id=max(pieces, key=lambda warehouse: pieces[warehouse]),
                    updated_at=datetime.now(UTC),
                )
            )

    def _listing(
        self,
        kind: Kind,
        key: str,
        statement: Select[Any],
        page: Callable[[Sequence[Row[Any]]], Page[dict[str, Any]]],
    ) -> Listing:
        def at(generations: Sequence[int]) -> Load:
            async def load() -> Entry:
                context.current().reached(CATALOG_SHARD, generations[0])
                return Entry(1, wire.encode(page(await self._database.reader().all(statement))))

            return load

        return Listing(kind, (GENERATION,), f"{GENERATION}:{key}", at)

    def _loader(self, key: str) -> Load:
        async def load() -> Entry:
            row = await self._database.reader().find(_BY_ID, product_id=UUID(key))
            return ABSENT if row is None else _entry(_product(row))

        return load

    async def _loaded(self, keys: Sequence[str]) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for newest in (False, True):
            missing = [UUID(key) for key in keys if key not in found]
            if missing:
                reader = self._database.reader(newest=newest)
                rows = await reader.all(select(*_COLUMNS).where(products.c.id.in_(missing)))
                found |= {str(row.id): _entry(_product(row)) for row in rows}
        return found

    async def _claim(self, writer: Writer, order_id: UUID) -> bool:
        now = datetime.now(UTC)
        return bool(
            await writer.run(
                insert_ignore(reservations).values(
                    order_id=order_id, state=REFUSED, allocations=[], created_at=now, updated_at=now
                )
            )
        )

    async def _set_aside(
        self, writer: Writer, order_id: UUID, wanted: Sequence[Wanted], place: tuple[float, float] | None
    ) -> Reserved | OutOfStock:
        # In one order for everybody, so that two orders of the same products never wait for each other in a ring.
        shelves = await writer.all(
            select(stock)
            .where(stock.c.product_id.in_({line.product_id for line in wanted}))
            .order_by(stock.c.product_id, stock.c.warehouse_id)
            .with_for_update()
        )
        # Not joined: not every engine can lock the rows of one table of a join, and warehouses are everybody's.
        places = {row.id: (row.lat, row.lon) for row in await writer.all(select(warehouses))}
        outcome = allocate(
            wanted,
            [OnHand(row.product_id, row.warehouse_id, row.free, *places[row.warehouse_id]) for row in shelves],
            place,
        )
        if isinstance(outcome, OutOfStock):
            await self._settle(writer, order_id, REFUSED, [str(product_id) for product_id in outcome.product_ids])
            return outcome
        await self._settle(writer, order_id, RESERVED, _told(outcome.allocations))
        await self._move(writer, outcome.allocations, sign=-1)
        return outcome

    async def _answered(self, writer: Writer, order_id: UUID, wanted: Sequence[Wanted]) -> Reserved | OutOfStock:
        row = await writer.first(select(reservations).where(reservations.c.order_id == order_id))
        if row is None or row.state == RELEASED:
            return OutOfStock(tuple(line.product_id for line in wanted))
        if row.state == REFUSED:
            return OutOfStock(tuple(UUID(product_id) for product_id in row.allocations))
        return Reserved(_allocations(row))

    async def _settle(self, writer: Writer, order_id: UUID, state: str, allocations: list[Any]) -> None:
        await writer.run(
            update(reservations)
            .where(reservations.c.order_id == order_id)
            .values(
                state=state,
                allocations=allocations,
                updated_at=datetime.now(UTC),
            )
        )

    async def _move(self, writer: Writer, allocations: Sequence[Allocation], *, sign: int) -> None:
        for moved in sorted(allocations, key=lambda a: (a.product_id, a.warehouse_id)):
            await writer.run(
                by_primary_key(update(stock))
                .where(stock.c.product_id == moved.product_id, stock.c.warehouse_id == moved.warehouse_id)
                .values(free=stock.c.free + sign * moved.quantity)
            )
            await writer.run(
                update(products)
                .where(products.c.id == moved.product_id)
                .values(available=products.c.available + sign * moved.quantity, revision=products.c.revision + 1)
            )

    async def _have_refreshed(self, product_id: UUID) -> None:
        """Have a task tell the cache of the change that follows, should this process die before it does.

        No transaction spans the catalog and a shard. So the message comes first, due once the change has been made or
        never will be. The product stands in for a profile: all that is asked of it is on which shard the message lies.
        """
        seconds = context.current().remaining(CHANGE_SECONDS) + COMMIT_SECONDS
        async with self._database.writer(product_id) as writer:
            await outbox.append(
                writer,
                "product.changing",
                profile_id=product_id,
                subject_id=product_id,
                after=timedelta(seconds=seconds),
            )

    async def _refresh(self, moved: Iterable[Product]) -> None:
        # Single products follow the stock at once; list pages show it when they are next loaded.
        for product in moved:
            await self._cache.put(PRODUCT, str(product.id), _entry(product))

    async def _written(self, written: Iterable[Product]) -> None:
        position = context.current().positions.get(CATALOG_SHARD, 0)
        await asyncio.gather(self._refresh(written), self._cache.raise_generation(GENERATION, position))


async def add_views(writer: Writer, counts: Counts) -> None:
    """Add views of products, by id, to those that are known."""
    rows = [{"product_id": UUID(product_id), "views": views} for product_id, views in counts]
    await writer.run(insert_adding(product_views), rows)


async def _moved(writer: Writer, allocations: Sequence[Allocation]) -> list[Product]:
    """Return the products of which pieces were moved, as they are now."""
    moved = {allocation.product_id for allocation in allocations}
    rows = await writer.all(select(*_COLUMNS).where(products.c.id.in_(moved))) if moved else ()
    return [_product(row) for row in rows]


def _told(allocations: Iterable[Allocation]) -> list[Any]:
    return [[str(each.product_id), str(each.warehouse_id), each.quantity] for each in allocations]


def _allocations(row: Row[Any]) -> tuple[Allocation, ...]:
    return tuple(Allocation(UUID(product), UUID(warehouse), pieces) for product, warehouse, pieces in row.allocations)


def _entry(product: Product) -> Entry:
    return Entry(product.revision, wire.encode(product.view()))


def _view(row: Row[Any]) -> dict[str, Any]:
    return _product(row).view()


def _product(row: Row[Any]) -> Product:
    return Product(**{column.name: getattr(row, column.name) for column in _COLUMNS})
