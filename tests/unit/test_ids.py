"""Ids say when and where; the shard map sends each to exactly one database."""

import time
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.ids import LOGICAL_SHARDS, created_at, logical_shard, new_id
from app.scaling.sharding import ShardMap

any_uuid = st.integers(0, 2**128 - 1).map(lambda number: UUID(int=number))
logical = st.integers(0, LOGICAL_SHARDS - 1)


@st.composite
def partitions(draw: st.DrawFn) -> tuple[tuple[int, int], ...]:
    """All ways of cutting 0..1023 into ranges, in any order."""
    cuts = sorted(draw(st.sets(st.integers(1, LOGICAL_SHARDS - 1), max_size=8)))
    starts = [0, *cuts]
    ends = [*(cut - 1 for cut in cuts), LOGICAL_SHARDS - 1]
    return tuple(draw(st.permutations(list(zip(starts, ends, strict=True)))))


def with_shard(shard: int) -> UUID:
    return UUID(int=shard << 66)


@pytest.mark.sabotage(path="app/core/ids.py", take_out="_VERSION | shard << 66", put="_VERSION | shard << 67")
@given(any_uuid)
def test_an_id_lives_where_its_owner_lives(owner: UUID) -> None:
    mine = new_id(owner)
    assert logical_shard(mine) == logical_shard(owner)
    assert 0 <= logical_shard(owner) < LOGICAL_SHARDS
    assert (mine.version, mine.variant) == (8, "specified in RFC 4122")


def test_an_id_tells_the_millisecond_of_its_making() -> None:
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    made = created_at(new_id())
    assert before <= made <= datetime.now(UTC)
    assert made.tzinfo is UTC


@given(st.lists(st.integers(0, 2**48 - 1), min_size=2, max_size=20), logical)
def test_ids_sort_by_their_making_whatever_their_shard(milliseconds: list[int], shard: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        made = []
        for moment in milliseconds:
            patched.setattr(time, "time_ns", lambda moment=moment: moment * 1_000_000)
            made.append((moment, new_id(with_shard(shard))))
    assert [moment for moment, _ in sorted(made, key=lambda pair: pair[1])] == sorted(milliseconds)


def test_ids_of_one_millisecond_differ_and_new_owners_spread_over_all_shards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    made = [new_id() for _ in range(20_000)]
    assert len(set(made)) == len(made)
    assert len({logical_shard(one) for one in made}) > 1000


@given(partitions(), any_uuid)
def test_every_id_belongs_to_exactly_the_database_that_holds_its_logical_shard(
    ranges: tuple[tuple[int, int], ...], owner: UUID
) -> None:
    first, last = ranges[ShardMap.of_settings(ranges).shard_of(owner)]
    assert first <= logical_shard(owner) <= last


@given(partitions().filter(lambda ranges: len(ranges) > 1), st.data())
def test_a_map_with_a_gap_or_an_overlap_is_refused(ranges: tuple[tuple[int, int], ...], data: st.DataObject) -> None:
    without = list(ranges)
    gone = without.pop(data.draw(st.integers(0, len(ranges) - 1)))
    with pytest.raises(ValueError, match="logical shard"):
        ShardMap.of_settings(without)
    with pytest.raises(ValueError, match="logical shard"):
        ShardMap.of_settings((*ranges, gone))


@given(partitions(), any_uuid)
def test_splitting_a_database_moves_only_ids_of_the_part_that_is_split_off(
    ranges: tuple[tuple[int, int], ...], owner: UUID
) -> None:
    (first, last), *others = ranges
    middle = (first + last) // 2
    if middle == last:
        return
    was = ShardMap.of_settings(ranges).shard_of(owner)
    now = ShardMap.of_settings(((first, middle), *others, (middle + 1, last))).shard_of(owner)
    moved = middle < logical_shard(owner) <= last
    assert now == (len(ranges) if moved else was)
