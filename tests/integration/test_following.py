"""Following an order without the edge: with and without Redis, with lost messages, and for as long as was asked."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress

import pytest
from apart import apart_from
from conftest import PATIENCE, settings_from, until
from sagas import Shop

from app.domain.orders import following as room
from app.domain.orders.following import Told
from app.domain.orders.rules import Order
from app.scaling.events import STREAM
from app.wiring import Resources, open_resources
from deploy.local.cluster import Cluster
from workers.relay import Relay

NOBODY = "redis://127.0.0.1:1/0"  # nothing listens on port 1


@pytest.fixture(scope="module")
async def made(cluster: Cluster) -> AsyncIterator[Shop]:
    async with apart_from(cluster) as apart:
        yield await Shop(apart, cluster).open()


@pytest.fixture
async def shop(made: Shop) -> Shop:
    await made.apart.clear()
    return made


@pytest.fixture(autouse=True)
def only_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks by themselves within a test: whoever sees something was told, or knows that they are not told."""
    monkeypatch.setattr(room, "QUIET_SECONDS", 3600.0)


def follow(resources: Resources, order: Order, seconds: float = 2 * PATIENCE) -> AsyncGenerator[Sequence[Told]]:
    return resources.following.follow(order.profile_id, order.id, 0, seconds)


async def news(following: AsyncGenerator[Sequence[Told]]) -> list[str]:
    """Return the next statuses that are not none."""
    async with asyncio.timeout(PATIENCE):
        while True:
            found = await anext(following)
            if found:
                return [told.status for told in found]


async def relayed(shop: Shop) -> None:
    """Publish what is due as a relay does."""
    with shop.apart.publisher() as publisher:
        await Relay(shop.apart.resources, publisher).relay(0)


async def test_a_watcher_is_told_by_the_stream(shop: Shop) -> None:
    order = await shop.order()
    async with aclosing(follow(shop.apart.resources, order)) as following:
        assert await news(following) == ["processing"]
        await shop.drain()
        stream = shop.apart.resources.events

        async def live() -> bool:
            return stream.live

        async def silent() -> bool:
            return not stream.live

        await until(live)
        await shop.apart.make_due()
        order = await shop.now(order)
        await relayed(shop)
        assert await news(following) == ["confirmed"]
    assert await until(silent), "nobody watches, nobody reads"


@pytest.mark.sabotage(
    "app/domain/orders/following.py",
    "QUIET_SECONDS if self._events.live else random.uniform(0.5, 1.5) * UNTOLD_SECONDS",
    "QUIET_SECONDS",
)
async def test_without_redis_a_status_is_seen_all_the_same(shop: Shop) -> None:
    order = await shop.order()
    settings = settings_from(shop.apart.environment | {"REDIS_URL": NOBODY})
    async with open_resources(settings) as cut_off, aclosing(follow(cut_off, order)) as following:
        assert await news(following) == ["processing"]
        await shop.drain()
        assert await news(following) == ["confirmed"]


async def test_what_happens_while_the_reader_starts_is_not_missed(shop: Shop) -> None:
    order = await shop.order()
    async with aclosing(follow(shop.apart.resources, order)) as following:
        assert await news(following) == ["processing"]
        # Before the reader knows where the stream ends: nobody is told of this by an entry.
        await shop.drain()
        await relayed(shop)
        assert await news(following) == ["confirmed"]


async def test_it_goes_on_after_the_stream_was_lost(shop: Shop) -> None:
    order = await shop.order()
    async with aclosing(follow(shop.apart.resources, order)) as following:
        assert await news(following) == ["processing"]
        await shop.apart.broker.delete(STREAM)
        await shop.drain()
        await shop.apart.resources.orders.cancel(order.profile_id, order.id)
        await relayed(shop)
        assert (await news(following))[0] == "confirmed"


async def test_it_ends_in_time(shop: Shop) -> None:
    order = await shop.order()
    async with aclosing(follow(shop.apart.resources, order, seconds=0.5)) as following:
        async with asyncio.timeout(PATIENCE):
            assert sum([len(found) async for found in following]) == 1


async def test_whoever_goes_away_leaves_nothing_behind(shop: Shop) -> None:
    order = await shop.order()
    events = shop.apart.resources.events

    async def listen() -> None:
        async with aclosing(follow(shop.apart.resources, order)) as following:
            async for _ in following:
                pass

    listening = asyncio.create_task(listen())

    async def watched() -> bool:
        return bool(events._watches)

    await until(watched)
    listening.cancel()
    with suppress(asyncio.CancelledError):
        await listening
    assert not events._watches

    async def silent() -> bool:
        return events._reader is not None and events._reader.done()

    await until(silent)
