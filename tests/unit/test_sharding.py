"""The map of shards is a value: every change keeps each logical shard on exactly one database, and nothing hashes."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.ids import LOGICAL_SHARDS, logical_shard
from app.scaling.sharding import Move, Phase, Range, ShardMap, parse_range

APP = Path(__file__).parents[2] / "app"
logical = st.integers(0, LOGICAL_SHARDS - 1)
moves = st.tuples(logical, logical, st.integers(0, 3)).map(lambda drawn: (*sorted(drawn[:2]), drawn[2]))


def with_shard(shard: int) -> UUID:
    return UUID(int=shard << 66)


def test_the_logical_shard_of_an_id_never_changes_and_no_python_hash_is_used() -> None:
    known = UUID("019aa3c4-7b10-8e97-a5d2-0b6f7c1d2e3f")
    assert logical_shard(known) == 0xE97 >> 2 == 933
    script = (
        f"from uuid import UUID; from app.core.ids import logical_shard; print(logical_shard(UUID({str(known)!r})))"
    )
    for seed in ("0", "1", "4711"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)  # noqa: S603
        assert done.stdout.strip() == b"933"
    called = {
        (file.name, node.func.id)
        for file in APP.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hash"
    }
    assert called == set()


@pytest.mark.sabotage(
    path="app/scaling/sharding.py",
    take_out="pieces += self.parts(place.last + 1, LOGICAL_SHARDS - 1)",
    put="pieces += self.parts(place.last, LOGICAL_SHARDS - 1)",
)
@given(st.lists(moves, max_size=6))
def test_whatever_is_moved_each_logical_shard_stays_on_one_database_and_only_the_range_moves(
    asked: list[tuple[int, int, int]],
) -> None:
    places = ShardMap.of_settings([(0, 511), (512, 1023)])
    for first, last, target in asked:
        for part in places.parts(first, last):
            before = places
            places = places.in_phase(Move(part, target, Phase.ANNOUNCED), Phase.HOLDING)
            assert [places.holds_back(one) for one in (part.first, part.last)] == [True, True]
            places = places.switched(places.move or pytest.fail("no move"), 7)
            for one in range(LOGICAL_SHARDS):
                expected = target if one in part else before.shard_of(with_shard(one))
                assert places.shard_of(with_shard(one)) == expected
            assert places.arrived(target) == 7
            places = places.settled()
            assert ShardMap.from_json(places.epoch, places.to_json()) == places
    neighbours = zip(places.ranges, places.ranges[1:], strict=False)
    assert all(one.shard != other.shard for one, other in neighbours)


def test_a_range_is_read_as_people_write_it() -> None:
    assert [parse_range(text) for text in ("0-1023", "5-5", "7")] == [(0, 1023), (5, 5), (7, 7)]
    for text in ("", "-", "5-", "-5", "9-3", "0-1024", "a-b", "1-2-3", "1.5"):
        with pytest.raises(ValueError, match="ogical shards"):
            parse_range(text)


def test_a_map_says_which_parts_of_a_range_are_where() -> None:
    places = ShardMap.of_settings([(0, 99), (100, 1023), None])
    assert places.parts(50, 149) == (Range(50, 99, 0), Range(100, 149, 1))
    assert places.held_by(2) == ()
