"""Views of products are counted behind the write: gathered without a round trip, added to the database once each."""

import asyncio
import json
import signal
import sys
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from apart import Apart
from conftest import until
from sqlalchemy import delete, select

from app.core.telemetry import TALLIED
from app.domain.catalog.rules import NewProduct
from app.domain.catalog.tables import product_views
from app.scaling import tally
from app.scaling.redis_link import RedisDown
from app.wiring import Resources, open_resources
from workers.task import Outcome
from workers.tasks.upkeep import attend, flush_views

pytest_plugins = ("apart",)

CRASHING = Path(__file__).parents[1] / "failure" / "crashing.py"
WAITING = "tally:{product_views}:waiting"


@pytest.fixture
async def counting(apart: Apart, monkeypatch: pytest.MonkeyPatch) -> Apart:
    """No views yet, and those of this process reach Redis soon."""
    monkeypatch.setattr(tally, "GATHER_SECONDS", 0.05)
    async with apart.resources.database.writer() as writer:
        await writer.run(delete(product_views))
    return apart


async def product(resources: Resources) -> UUID:
    new = NewProduct(f"V-{uuid4().hex}", "Thing", "", "views", 100, "EUR", {}, 0)
    return (await resources.catalog.create(new)).id


async def added(apart: Apart) -> dict[UUID, int]:
    """Return the views that the database has."""
    async with apart.resources.database.writer() as writer:
        return {row.product_id: row.views for row in await writer.all(select(product_views))}


async def gathered(apart: Apart, product_id: UUID) -> int:
    """Return the views that Redis has and the database has not."""
    return int(await apart.broker.hget(WAITING, str(product_id)) or 0)


async def look(apart: Apart, product_id: UUID, times: int) -> None:
    """Look at a product, and wait until Redis has counted it."""
    before = await gathered(apart, product_id)
    for _ in range(times):
        await apart.resources.catalog.product(product_id)

    async def there() -> bool:
        return await gathered(apart, product_id) == before + times

    await until(there)


@pytest.mark.sabotage("app/scaling/tally.py", "            await self._add_to_database(writer, counts)\n", "")
async def test_views_reach_the_database_in_a_batch(counting: Apart) -> None:
    one, other = await product(counting.resources), await product(counting.resources)
    await look(counting, one, 5)
    await look(counting, other, 2)
    assert await added(counting) == {}
    assert await attend(flush_views, counting.resources) is Outcome.DONE
    assert await added(counting) == {one: 5, other: 2}
    await look(counting, one, 1)
    assert await attend(flush_views, counting.resources) is Outcome.DONE
    assert await added(counting) == {one: 6, other: 2}


@pytest.mark.sabotage("app/domain/catalog/service.py", "        if entry.body is not None:\n", "        if True:\n")
async def test_what_does_not_exist_has_no_views(counting: Apart) -> None:
    there, unknown = await product(counting.resources), uuid4()
    await counting.resources.catalog.product(unknown)
    await look(counting, there, 1)  # handed over after it, so with it
    assert await gathered(counting, unknown) == 0


@pytest.mark.sabotage(
    "app/scaling/tally.py", "tally_batches.c.name == self._name, tally_batches.c.number < number", "True"
)
async def test_a_flusher_that_is_killed_between_its_commit_and_its_end_counts_nothing_twice(
    counting: Apart, tmp_path: Path
) -> None:
    viewed = await product(counting.resources)
    await look(counting, viewed, 3)
    async with counting.resources.database.writer() as writer:
        newest = await writer.first(select(tally.tally_batches.c.number))
    batch = 1 if newest is None else newest.number + 1
    (tmp_path / "plan.json").write_text(json.dumps({"tally.drop before": [str(batch)]}))

    async def flush() -> int:
        running = await asyncio.create_subprocess_exec(
            *(sys.executable, str(CRASHING), "flush_views", str(tmp_path)), env=counting.environment
        )
        return await running.wait()

    assert await flush() == -signal.SIGKILL
    assert await added(counting) == {viewed: 3}
    await counting.broker.delete("lock:upkeep.flush_views")  # its lease would end by itself, in half a minute
    await look(counting, viewed, 4)
    assert await flush() == 0
    assert await added(counting) == {viewed: 7}


async def test_a_flusher_that_was_held_up_neither_adds_nor_drops_another_ones_batch(
    counting: Apart, monkeypatch: pytest.MonkeyPatch
) -> None:
    viewed = await product(counting.resources)
    await look(counting, viewed, 3)
    held, go_on = asyncio.Event(), asyncio.Event()
    async with open_resources(counting.settings) as slow:
        settle = slow.views._settle

        async def wait_and_settle(number: int, counts: tally.Counts) -> int:
            held.set()
            await go_on.wait()
            return await settle(number, counts)

        monkeypatch.setattr(slow.views, "_settle", wait_and_settle)
        flushing = asyncio.create_task(slow.views.flush())
        await held.wait()
        assert await counting.resources.views.flush() == 1
        await look(counting, viewed, 2)
        # The next batch is set aside and not added yet when the slow one goes on.
        with monkeypatch.context() as cut_off:
            cut_off.setattr(counting.resources.views, "_settle", _fail)
            with pytest.raises(RedisDown):
                await counting.resources.views.flush()
        go_on.set()
        await flushing
    await counting.resources.views.flush()
    assert await added(counting) == {viewed: 5}


async def _fail(_number: int, _counts: tally.Counts) -> int:
    raise RedisDown("test")


async def test_a_redis_that_came_back_without_anything_is_counted_in_again(counting: Apart) -> None:
    viewed = await product(counting.resources)
    await look(counting, viewed, 1)
    await counting.resources.views.flush()
    await counting.broker.flushdb()
    await look(counting, viewed, 1)
    await counting.resources.views.flush()
    assert await added(counting) == {viewed: 2}


@pytest.mark.sabotage(
    "app/scaling/tally.py",
    "if tonumber(redis.call('GET', KEYS[2]) or '0') >= tonumber(ARGV[1]) then return 0 end",
    "",
)
async def test_a_handing_over_whose_answer_is_lost_is_repeated_and_counted_once(
    counting: Apart, monkeypatch: pytest.MonkeyPatch
) -> None:
    viewed, views = await product(counting.resources), counting.resources.views
    run, lost = views._pipe.run, 0

    async def lose(digest: str, *arguments: object) -> object:
        nonlocal lost
        answer = await run(digest, *arguments)  # type: ignore[arg-type]  # passed on as they are
        if digest == views._gather and lost < 2:
            lost += 1
            raise RedisDown("no answer")
        return answer

    with monkeypatch.context() as deaf:
        deaf.setattr(views._pipe, "run", lose)
        await look(counting, viewed, 3)
        await until(_is_idle, counting)
    assert lost == 2
    assert await gathered(counting, viewed) == 3


async def _is_idle(apart: Apart) -> bool:
    return not apart.resources.views._outgoing and not apart.resources.views._gathered


@pytest.mark.sabotage(
    "app/scaling/tally.py",
    "            with suppress(RedisDown):\n                await",
    "            if True:\n                await",
)
async def test_views_wait_while_redis_is_away_up_to_a_bound_that_the_metric_tells_of(
    counting: Apart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tally, "MOST_GATHERED", 3)
    dropped = TALLIED.labels("product_views", "dropped")._value
    views, before, keys = counting.resources.views, dropped.get(), [str(uuid4()) for _ in range(5)]
    tries = 0

    async def refuse(_digest: str, *_arguments: object) -> object:
        nonlocal tries
        tries += 1
        raise RedisDown("not connected")

    async def tried_again() -> bool:
        return tries > 2

    with monkeypatch.context() as away:
        away.setattr(views._pipe, "run", refuse)
        views.count(keys[0])
        await until(tried_again)  # these are on their way already
        for key in keys:
            views.count(key)
        views.count(keys[1])
    assert dropped.get() == before + 2
    await until(_is_idle, counting)
    assert [await gathered(counting, UUID(key)) for key in keys] == [2, 2, 1, 0, 0]


async def test_more_views_than_one_batch_holds_are_added_all(counting: Apart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "MOST_AT_ONCE", 4)
    keys = [uuid4() for _ in range(11)]
    for key in keys:
        counting.resources.views.count(str(key))
    await until(_is_idle, counting)
    assert await counting.resources.views.flush() == 11
    assert await added(counting) == dict.fromkeys(keys, 1)
