"""What the cache shows of a product comes right although its writer died between its commit and the cache."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from sagas import Shop

from app.core import wire
from app.core.ids import new_id
from app.domain.catalog.rules import Product, Wanted
from app.scaling.cache import Entry, Kind

pytest_plugins = ("sagas",)


async def shown(shop: Shop, product: Product, field: str) -> object:
    """Return a field of the product as Redis has it; nothing of it is at hand in this process."""
    shop.apart.resources.near.drop(f"product:{product.id}")
    view: dict[str, object] = wire.decode((await shop.apart.resources.catalog.product(product.id)).body or b"{}")
    return view[field]


@contextmanager
def dying(shop: Shop) -> Iterator[None]:
    """Let whoever writes in the block die after the commit: the cache hears nothing."""

    async def die(_kind: Kind, _key: str, _entry: Entry) -> Entry:
        raise ConnectionAbortedError

    with pytest.MonkeyPatch.context() as dead, suppress(ConnectionAbortedError):
        dead.setattr(shop.apart.resources.cache, "put", die)
        yield
        pytest.fail("nobody died")


@pytest.mark.sabotage("app/domain/catalog/service.py", "        await self._have_refreshed(product_id)\n", "")
async def test_a_change_of_a_product_reaches_the_cache_although_its_writer_died_after_the_commit(shop: Shop) -> None:
    product = await shop.product()
    with dying(shop):
        await shop.apart.resources.catalog.change(product.id, 1, {"name": "Another thing"})
    assert await shown(shop, product, "name") == "Thing"
    await shop.drain()
    assert await shown(shop, product, "name") == "Another thing"


async def test_the_message_about_a_change_is_due_once_the_change_is_made_or_never_will_be(shop: Shop) -> None:
    product = await shop.product()
    await shop.apart.resources.catalog.change(product.id, 1, {"name": "Another thing"})
    row = await shop.apart.row(product.id)
    assert (row.due_at - row.created_at).total_seconds() >= 10


@pytest.mark.sabotage(
    "app/domain/catalog/service.py",
    "if isinstance(outcome, Reserved) else ()",
    "if isinstance(outcome, Reserved) and first else ()",
)
@pytest.mark.sabotage(
    "app/domain/catalog/service.py",
    "moved = await _moved(writer, allocations)  # as above",
    "moved = await _moved(writer, allocations if row.state != RELEASED else ())",
)
async def test_stock_that_moved_reaches_the_cache_although_who_moved_it_died_after_the_commit(shop: Shop) -> None:
    catalog, product, order_id = shop.apart.resources.catalog, await shop.product(), new_id()
    wanted = [Wanted(product.id, 3)]
    with dying(shop):
        await catalog.reserve(order_id, wanted, None)
    assert await shown(shop, product, "available") == 10
    await catalog.reserve(order_id, wanted, None)  # its task comes again
    assert await shown(shop, product, "available") == 7
    with dying(shop):
        await catalog.release(order_id)
    assert await shown(shop, product, "available") == 7
    await catalog.release(order_id)
    assert await shown(shop, product, "available") == 10
