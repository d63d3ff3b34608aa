"""The gate in front of what costs something: so many requests at a time, a short queue, and a quick refusal past it.

Past its capacity a process that takes everything does nothing in time. Here those who are let in are served as fast as
ever, and the others are told soon. Callers take turns, so that the flood of one delays itself and nobody else. And
the gate foresees: a request that would be refused, or wait in vain, is known for one before anything is done for it.
"""

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from time import monotonic

from app.core.errors import Unavailable
from app.core.telemetry import REQUESTS_SHED

# Seconds in the queue. A client is told within 50 ms, its request and the answer included; who has waited that long is
# behind a queue that grows, and would be served after it has gone away.
PATIENCE = 0.04
# Of that patience, how much may be foreseen of a request that is still begun. Turns do not come evenly: with all of it
# every second one of those who are begun would be refused later, when that costs ten times as much.
FORESEEN = 0.5

_Turn = asyncio.Future[None]


class Gate:
    """Lets a bounded number of requests pass at a time.

    Args:
        places: requests at a time.
        queue: requests that may wait for a place; 0 refuses at once.
        patience: seconds that one waits.
    """

    def __init__(self, places: int, queue: int, *, patience: float = PATIENCE) -> None:
        self._free = places
        self._queue = queue
        self._patience = patience
        self._waiting = 0
        # Each caller's requests in the order of their arrival; whose turn is next stands first.
        self._lines: dict[Hashable, deque[_Turn]] = {}
        # When places came back of late, in one crowd: how fast the queue moves now, or would.
        self._turns: deque[float] = deque(maxlen=max(1, queue))
        self._full_since = 0.0
        self._full_until = -math.inf
        # Those whose arrival the event loop has seen and has not begun to serve: all, and by caller where it was asked.
        self._coming = 0
        self._coming_of: dict[Hashable, int] = {}

    @property
    def waiting(self) -> int:
        """How many wait for a place."""
        return self._waiting

    @property
    def full(self) -> bool:
        """Whether the next one has to wait."""
        return not self._free

    def announce(self) -> bool:
        """Count a request that is on its way here, and return whether there is a place for it, however many came first.

        An event loop reads all that has arrived before it serves any of it: who looked at the places only would let a
        whole crowd in. What was announced counts until then.
        """
        if not self._coming:
            asyncio.get_running_loop().call_soon(self._begin)
        self._coming += 1
        return self._coming <= self._free

    def withdraw(self) -> None:
        """Take back what was announced last: it needs no place."""
        self._coming -= 1

    def foresees_refusal(self, caller: Hashable) -> bool:
        """Return whether a request that was just announced had better be refused now.

        That is so when the queue is full and its caller has an even share of it, and when as many turns as are to come
        before it take longer than it should wait.
        """
        ahead = self._waiting + self._coming - 1 - self._free
        coming = self._coming_of.get(caller, 0)
        line = len(self._lines.get(caller, ())) + coming
        lines = max(1, len(self._lines), len(self._coming_of))
        if ahead >= self._queue and line >= self._queue // lines:
            return True
        before = min(ahead, lines * (line + 1))
        if before > 0 and before * self._seconds_a_turn() > self._patience * FORESEEN:
            return True
        self._coming_of[caller] = coming + 1
        return False

    def _seconds_a_turn(self) -> float:
        """Return how long a turn took of late.

        All that are remembered count: turns come in bursts, and behind one the queue looks quick to whoever sees only
        the last few. Whole crowds would be begun then, and refused when that costs ten times as much. So they would in
        the moment in which the queue is empty and a place is free, as it happens amidst a flood; only once there was no
        crowd for a while nothing is known, and one that comes then may wait.
        """
        now = monotonic()
        if self._free and self._is_calm(now):
            return 0.0
        since = self._turns[0] if len(self._turns) == self._turns.maxlen else self._full_since
        return (now - since) / max(1, len(self._turns))

    def _is_calm(self, now: float) -> bool:
        """Return whether the last crowd is over: a place has been free for as long as anybody would wait for one."""
        return now - self._full_until > self._patience

    def _begin(self) -> None:
        self._coming = 0
        self._coming_of.clear()

    @asynccontextmanager
    async def pass_through(self, caller: Hashable) -> AsyncIterator[None]:
        """Hold a place for the block.

        Args:
            caller: who asks; all requests of one caller stand in one line.

        Raises:
            Unavailable: `overloaded`, when the queue is full or no place became free in time.
        """
        if self._free:
            self._take()
        else:
            await self._wait(caller)
        try:
            yield
        finally:
            self._leave()

    def _take(self) -> None:
        self._free -= 1
        now = monotonic()
        if not self._free and self._is_calm(now):
            self._turns.clear()
            self._full_since = now

    async def _wait(self, caller: Hashable) -> None:
        if self._waiting >= self._queue:
            self._make_room(caller)
        loop = asyncio.get_running_loop()
        turn: _Turn = loop.create_future()
        self._lines.setdefault(caller, deque()).append(turn)
        self._waiting += 1
        timer = loop.call_later(self._patience, _refuse, turn, "patience")
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._leave()  # cancelled at the moment at which its turn came: the place is the next one's
            else:
                self._forget(caller, turn)
            raise
        finally:
            timer.cancel()

    def _make_room(self, caller: Hashable) -> None:
        """Refuse the latest of the caller with the longest line, which is this one if nobody has a longer one."""
        longest = max(self._lines, key=lambda one: len(self._lines[one]), default=caller)
        if len(self._lines.get(longest, ())) <= len(self._lines.get(caller, ())) + 1:
            raise _refused("queue")
        latest = self._lines[longest][-1]
        self._forget(longest, latest)
        _refuse(latest, "queue")

    def _leave(self) -> None:
        """Give the place to the next in the line whose turn it is; that line then waits behind all others."""
        now = monotonic()
        if not self._free:
            self._full_until = now
        if not self._is_calm(now):
            self._turns.append(now)
        while self._lines:
            caller = next(iter(self._lines))
            line = self._lines.pop(caller)
            turn = line.popleft()
            self._waiting -= 1
            if line:
                self._lines[caller] = line
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def _forget(self, caller: Hashable, turn: _Turn) -> None:
        line = self._lines.get(caller)
        if line is not None and turn in line:
            line.remove(turn)
            self._waiting -= 1
            if not line:
                del self._lines[caller]


def _refuse(turn: _Turn, reason: str) -> None:
    if not turn.done():
        turn.set_exception(_refused(reason))


def _refused(reason: str) -> Unavailable:
    REQUESTS_SHED.labels(reason).inc()
    return overloaded()


def overloaded() -> Unavailable:
    """Return the error of a request that is refused."""
    return Unavailable("This instance has more to do than it can; try again in a second.", code="overloaded")
