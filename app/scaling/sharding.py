"""Where a profile lives: ids carry one of 1024 logical shards, and a versioned map puts ranges of them on databases.

Logical shards never change for an id; moving data changes only the map. Nothing here hashes: the logical shard is part
of the id (`core/ids.py`), so every process, in every language, agrees on it. A map is a value; each change is another
map with the next epoch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from time import time
from typing import Any
from uuid import UUID

from app.core.ids import LOGICAL_SHARDS, logical_shard

# By then every replica that takes reads has replayed what has arrived: the largest allowed lag is 300 s, the rest is
# for clocks that differ.
ARRIVAL_SECONDS = 330


class Phase(StrEnum):
    """How far a move is."""

    ANNOUNCED = "announced"  # every process gets to know of it, then the rows are copied
    COPIED = "copied"  # what changes meanwhile is carried over
    HOLDING = "holding"  # writes wait, the last changes are carried over
    SWITCHED = "switched"  # reads and writes go to the target; the source's rows are removed


@dataclass(frozen=True, slots=True)
class Range:
    """The logical shards `first` to `last`, both included, on one database, numbered as in the settings."""

    first: int
    last: int
    shard: int

    def __contains__(self, logical: object) -> bool:
        """Return whether a logical shard is in the range."""
        return isinstance(logical, int) and self.first <= logical <= self.last


@dataclass(frozen=True, slots=True)
class Move:
    """A range on its way; `place.shard` is where it comes from."""

    place: Range
    target: int
    phase: Phase


@dataclass(frozen=True, slots=True)
class Arrival:
    """What has moved to a shard is in its log up to `position`; `at` is when it came, in seconds since 1970."""

    shard: int
    position: int
    at: float


@dataclass(frozen=True, slots=True)
class ShardMap:
    """Ranges of logical shards on databases.

    Attributes:
        epoch: grows with every change; 0 is the map of the settings, before anything has moved.
        ranges: together they hold each of 0..1023 exactly once.
        move: the one move that is under way, if any.
        arrivals: for each shard that something has moved to, the last time.
    """

    epoch: int
    ranges: tuple[Range, ...]
    move: Move | None = None
    arrivals: tuple[Arrival, ...] = ()
    _holders: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse a map with a gap or an overlap."""
        holders: list[int] = []
        for place in sorted(self.ranges, key=lambda place: place.first):
            if place.first != len(holders) or place.last < place.first:
                raise ValueError(f"logical shard {len(holders)} must be held by exactly one database")
            holders += [place.shard] * (place.last - place.first + 1)
        if len(holders) != LOGICAL_SHARDS:
            raise ValueError(f"nobody holds the logical shards from {len(holders)} to {LOGICAL_SHARDS - 1}")
        object.__setattr__(self, "_holders", tuple(holders))

    @classmethod
    def of_settings(cls, held: Sequence[tuple[int, int] | None]) -> "ShardMap":
        """Return the map before anything has moved: for each database the first and last logical shard, or None."""
        return cls(0, tuple(Range(*ends, shard) for shard, ends in enumerate(held) if ends is not None))

    def shard_of(self, owner: UUID) -> int:
        """Return the number of the database that holds everything of `owner`."""
        return self._holders[logical_shard(owner)]

    def held_by(self, shard: int) -> tuple[Range, ...]:
        """Return the ranges of one database."""
        return tuple(place for place in self.ranges if place.shard == shard)

    def parts(self, first: int, last: int) -> tuple[Range, ...]:
        """Return where the logical shards `first` to `last` are, one range for each database and stretch."""
        return tuple(
            Range(max(first, place.first), min(last, place.last), place.shard)
            for place in self.ranges
            if place.first <= last and first <= place.last
        )

    def arrived(self, shard: int) -> int:
        """Return the position that a replica of the shard must have reached to have what has moved there."""
        for arrival in self.arrivals:
            if arrival.shard == shard and time() < arrival.at + ARRIVAL_SECONDS:
                return arrival.position
        return 0

    def may_change(self, logical: int | None) -> bool:
        """Return whether a logical shard, or any of them, may be elsewhere at the next moment."""
        move = self.move
        if move is None or move.phase is Phase.SWITCHED:
            return False
        return logical is None or logical in move.place

    def holds_back(self, logical: int) -> bool:
        """Return whether writes for a logical shard have to wait."""
        return self.move is not None and self.move.phase is Phase.HOLDING and logical in self.move.place

    def in_phase(self, move: Move, phase: Phase) -> "ShardMap":
        """Return the next map, with a move in that phase."""
        return replace(self, epoch=self.epoch + 1, move=replace(move, phase=phase))

    def switched(self, move: Move, position: int) -> "ShardMap":
        """Return the next map, with the range on the target, where it is in the log up to `position`."""
        place = move.place
        pieces = [*self.parts(0, place.first - 1), Range(place.first, place.last, move.target)]
        pieces += self.parts(place.last + 1, LOGICAL_SHARDS - 1)
        merged = pieces[:1]
        for piece in pieces[1:]:
            if piece.shard == merged[-1].shard:
                merged[-1] = replace(merged[-1], last=piece.last)
            else:
                merged.append(piece)
        others = tuple(arrival for arrival in self.arrivals if arrival.shard != move.target)
        return ShardMap(
            self.epoch + 1,
            tuple(merged),
            replace(move, phase=Phase.SWITCHED),
            (*others, Arrival(move.target, position, time())),
        )

    def settled(self) -> "ShardMap":
        """Return the next map, without a move."""
        return replace(self, epoch=self.epoch + 1, move=None)

    def to_json(self) -> dict[str, Any]:
        """Return what is kept of it beside its epoch."""
        move = self.move
        return {
            "ranges": [[place.first, place.last, place.shard] for place in self.ranges],
            "move": move and [move.place.first, move.place.last, move.place.shard, move.target, move.phase],
            "arrivals": [[arrival.shard, arrival.position, arrival.at] for arrival in self.arrivals],
        }

    @classmethod
    def from_json(cls, epoch: int, value: dict[str, Any]) -> "ShardMap":
        """Read a map back."""
        move = None
        if value["move"] is not None:
            first, last, source, target, phase = value["move"]
            move = Move(Range(first, last, source), target, Phase(phase))
        return cls(
            epoch,
            tuple(Range(*place) for place in value["ranges"]),
            move,
            tuple(Arrival(*arrival) for arrival in value["arrivals"]),
        )


def parse_range(text: str) -> tuple[int, int]:
    """Read `512-767`, or `512` for one logical shard.

    Raises:
        ValueError: in words, if it is not a range of 0..1023.
    """
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise ValueError(f"{text!r} is no range of logical shards; write it like 512-767.")
    ends = int(first), int(last or first)
    if not 0 <= ends[0] <= ends[1] < LOGICAL_SHARDS:
        raise ValueError(f"Logical shards go from 0 to {LOGICAL_SHARDS - 1}, and a range from its lower end.")
    return ends
