"""A mover that dies at the points at which a kill leaves something half done, to be run again until it is through.

As a program, `python moving.py FOLDER FIRST LAST TARGET`, it is `scaleout shards move` that kills itself with SIGKILL:
`FOLDER/<point>` stands for a death to come, and is gone after it. `arm` does the same to a mover of this process.
"""

import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from app import operations
from app.scaling import dialect, mover
from app.scaling.mover import Mover

HELD = "writes are held"
HANDED_OVER = "handed over and not written down"
POINTS = (
    "a table is half copied",
    "copied and not written down",
    "caught up and not written down",
    HELD,
    HANDED_OVER,
    "switched",
    "cleared and not written down",
)


def arm(die: Callable[[str], None], put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Have a move call `die` with each of POINTS when it comes there; `put` replaces a function by another."""

    def after(point: str, owner: Any, name: str, *, only: Callable[..., bool] = lambda *_: True) -> None:
        original: Callable[..., Awaitable[Any]] = getattr(owner, name)

        async def armed(*arguments: Any, **options: Any) -> Any:
            answer = await original(*arguments, **options)
            if only(*arguments):
                die(point)
            return answer

        put(owner, name, armed)

    copied, written, caught_up, held, handed_over, switched, cleared = POINTS
    after(copied, mover, "_pipe")
    after(written, Mover, "_copy")
    after(caught_up, Mover, "_hold")
    after(held, mover, "_fence", only=lambda _connection, _place, state: state == "held")
    after(handed_over, dialect, "commit_position")
    after(switched, Mover, "_publish", only=lambda _mover, _catalog, places: _is_switched(places))
    after(cleared, Mover, "_clear")


def _is_switched(places: mover.ShardMap) -> bool:
    return places.move is not None and places.move.phase is mover.Phase.SWITCHED


if __name__ == "__main__":

    def die_once(point: str) -> None:
        """Kill this process, without a word, if it has not died there before."""
        death = Path(sys.argv[1]) / point
        if death.exists():
            death.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    arm(die_once)
    sys.exit(operations.move_shards(*map(int, sys.argv[2:])))
