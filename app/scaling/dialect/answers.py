"""What a server says of itself and of what befell a statement, in words that mean the same for every engine."""

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class State:
    """What a server says of itself.

    Attributes:
        is_primary: whether it takes writes.
        position: of a primary, up to where its log is safe and can be sent; of a replica, up to where it has replayed.
            It is not what `commit_position` says of a primary: that one may lie behind the header of a page whose first
            record is still to come, and no replica reaches it until then.
        received: up to where a replica has received the log.
        history: number of the history that its log follows, raised by each promotion (PostgreSQL: the timeline);
            0 if it cannot say.
    """

    is_primary: bool
    position: int
    received: int
    history: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server allows whoever asks.

    Attributes:
        connections: how many may be open together, those kept for administrators not counted.
        endless: the time limits that it lacks, each with what sets it.
    """

    connections: int
    endless: tuple[tuple[str, str], ...]


class Trouble(Enum):
    """Why a statement failed with which nothing is wrong."""

    LOST = "the node is gone, hangs up or refuses"
    READ_ONLY = "the node takes no writes: it is no primary, or not any more"
    SLOW = "the time of the statement was up"
    BUSY = "it had to give way: to a lock, a deadlock, or the replay of a replica"
