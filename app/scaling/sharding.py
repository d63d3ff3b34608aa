"""Where a profile lives: ids carry one of 1024 logical shards, and a map puts ranges of them on databases.

Logical shards never change for an id; moving data changes only the map. Nothing here hashes: the logical shard is part
of the id (`core/ids.py`), so every process, in every language, agrees on it.
"""

from bisect import bisect_right
from uuid import UUID

from app.core.ids import LOGICAL_SHARDS, logical_shard


class ShardMap:
    """Ranges of logical shards on databases.

    Args:
        ranges: for each database, in the order of the settings, the first and last logical shard that it holds;
            together they hold each of 0..1023 exactly once.
    """

    def __init__(self, ranges: tuple[tuple[int, int], ...]) -> None:
        ordered = sorted((first, last, number) for number, (first, last) in enumerate(ranges))
        self._firsts = [first for first, _, _ in ordered]
        self._numbers = [number for _, _, number in ordered]
        expected = 0
        for first, last, _ in ordered:
            if first != expected or last < first:
                raise ValueError(f"logical shard {expected} must be held by exactly one database")
            expected = last + 1
        if expected != LOGICAL_SHARDS:
            raise ValueError(f"nobody holds the logical shards from {expected} to {LOGICAL_SHARDS - 1}")

    def shard_of(self, owner: UUID) -> int:
        """Return the number of the database that holds everything of `owner`."""
        return self._numbers[bisect_right(self._firsts, logical_shard(owner)) - 1]
