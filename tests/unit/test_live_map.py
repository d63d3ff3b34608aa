"""How a process keeps its map of shards fresh: off the path of requests, except where a range is on its way."""

import asyncio
from dataclasses import dataclass

import pytest
from conftest import until

from app.core.errors import Unavailable
from app.scaling import live_map
from app.scaling.live_map import LiveMap
from app.scaling.sharding import Move, Phase, Range, ShardMap

SETTLED = ShardMap.of_settings([(0, 511), (512, 1023)])
MOVE = Move(Range(0, 99, 0), 1, Phase.ANNOUNCED)
INSIDE, OUTSIDE = 50, 500


@dataclass
class Catalog:
    """A catalog that answers with `places`, or not at all, and counts who asks."""

    places: ShardMap = SETTLED
    down: bool = False
    asked: int = 0
    asked_older: int = 0

    async def load(self) -> ShardMap:
        self.asked += 1
        await asyncio.sleep(0)
        if self.down:
            raise Unavailable("The catalog does not answer.", code="database_down")
        return self.places

    async def load_older(self) -> ShardMap:
        self.asked_older += 1
        return self.places


@pytest.fixture
def catalog() -> Catalog:
    return Catalog()


@pytest.fixture
def live(catalog: Catalog) -> LiveMap:
    return LiveMap(2, catalog.load, catalog.load_older)


async def test_with_one_shard_nobody_is_asked(catalog: Catalog) -> None:
    alone = LiveMap(1, catalog.load, catalog.load_older)
    await alone.start()
    assert (await alone.now(INSIDE)).shard_of == alone.latest.shard_of
    assert (await alone.for_writing(OUTSIDE)).held_by(0) == (Range(0, 1023, 0),)
    await alone.stop()
    assert catalog.asked == 0


@pytest.mark.sabotage(
    path="app/scaling/live_map.py",
    take_out="lease = 0.0 if self._known is None or self._known.may_change(logical) else LEASE",
    put="lease = 0.0",
)
async def test_a_settled_map_serves_without_a_question_until_its_lease_is_over(
    live: LiveMap, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(50):
        await live.now(INSIDE)
    assert catalog.asked == 1
    monkeypatch.setattr(live_map, "LEASE", -1.0)
    await live.now(INSIDE)
    assert catalog.asked == 2


@pytest.mark.sabotage(
    path="app/scaling/live_map.py",
    take_out="lease = 0.0 if self._known is None or self._known.may_change(logical) else LEASE",
    put="lease = LEASE",
)
async def test_where_a_range_is_on_its_way_every_use_asks_first_and_others_do_not(
    live: LiveMap, catalog: Catalog
) -> None:
    catalog.places = SETTLED.in_phase(MOVE, Phase.ANNOUNCED)
    assert (await live.now(OUTSIDE)).epoch == 1
    catalog.places = moved = catalog.places.switched(MOVE, 7)
    assert (await live.now(OUTSIDE)).epoch == 1
    assert (await live.now(INSIDE)) == moved
    before = catalog.asked
    await live.now(INSIDE)  # switched is final: nothing goes back from there
    assert catalog.asked == before


async def test_callers_at_once_share_one_look(live: LiveMap, catalog: Catalog) -> None:
    catalog.places = SETTLED.in_phase(MOVE, Phase.COPIED)
    await live.now(INSIDE)
    before = catalog.asked
    await asyncio.gather(*(live.now(INSIDE) for _ in range(100)))
    assert catalog.asked - before <= 2


@pytest.mark.sabotage(
    path="app/scaling/live_map.py", take_out="while found.holds_back(logical) and", put="while False and"
)
async def test_a_write_waits_while_its_range_is_held_and_goes_where_it_went(live: LiveMap, catalog: Catalog) -> None:
    catalog.places = held = SETTLED.in_phase(MOVE, Phase.HOLDING)
    writing = asyncio.create_task(live.for_writing(INSIDE))
    assert await live.for_writing(OUTSIDE) == held
    asked = catalog.asked

    async def looked_again_and_again() -> bool:
        return catalog.asked >= asked + 3

    await until(looked_again_and_again)
    assert not writing.done()
    catalog.places = held.switched(MOVE, 7)
    assert (await writing).held_by(1)[0] == Range(0, 99, 1)


async def test_a_mover_that_died_while_writes_were_held_holds_nobody_for_long(
    live: LiveMap, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_map, "LONGEST_HOLD", 0.05)
    catalog.places = held = SETTLED.in_phase(MOVE, Phase.HOLDING)
    assert await live.for_writing(INSIDE) == held


async def test_while_the_catalog_is_silent_the_last_map_serves_and_few_ask(live: LiveMap, catalog: Catalog) -> None:
    catalog.places = known = SETTLED.in_phase(MOVE, Phase.ANNOUNCED)
    await live.now()
    catalog.down = True
    before = catalog.asked
    for _ in range(20):
        assert await live.now(INSIDE) == known
    assert catalog.asked == before + 1


async def test_a_start_while_the_catalog_has_no_primary_takes_the_map_from_a_replica(
    live: LiveMap, catalog: Catalog
) -> None:
    catalog.down = True
    await live.start()
    assert live.latest == SETTLED
    assert catalog.asked_older == 1
    await live.stop()


async def test_an_older_map_never_replaces_a_newer_one(live: LiveMap, catalog: Catalog) -> None:
    catalog.places = newer = SETTLED.in_phase(MOVE, Phase.ANNOUNCED)
    await live.now()
    catalog.places = SETTLED
    live.doubt()
    assert await live.now() == newer
