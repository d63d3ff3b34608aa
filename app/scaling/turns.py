"""A bounded number of places, and a line of those who wait for one, each for the same time at most.

It does what a semaphore and a timeout do, for a third of their price: whoever came first is also the first to be late,
so one timer looks after all who wait. On a busy instance nearly every read waits its turn for a connection.
"""

import asyncio
from collections import deque


class Turns:
    """Places that are taken in the order of arrival.

    Args:
        places: how many.
        patience: seconds that one waits at most.
    """

    def __init__(self, places: int, patience: float) -> None:
        self._places = self._free = places
        self._patience = patience
        self._line: deque[tuple[float, asyncio.Future[None]]] = deque()
        self._watch: asyncio.TimerHandle | None = None

    @property
    def full(self) -> bool:
        """Whether the next one has to wait."""
        return not self._free

    @property
    def taken(self) -> int:
        """How many places are taken."""
        return self._places - self._free

    async def take(self) -> None:
        """Take a place; `give` gives it back.

        Raises:
            TimeoutError: if none became free in time.
        """
        if self._free:
            self._free -= 1
            return
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        late_at = loop.time() + self._patience
        self._line.append((late_at, turn))
        if self._watch is None:
            self._watch = loop.call_at(late_at, self._look)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.give()  # cancelled at the moment at which its turn came: the place is the next one's
            raise

    def give(self) -> None:
        """Give a place back: to whoever waits longest, if anybody does."""
        while self._line:
            _, turn = self._line.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def _look(self) -> None:
        self._watch = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._line:
            late_at, turn = self._line[0]
            if late_at > now:
                self._watch = loop.call_at(late_at, self._look)
                return
            self._line.popleft()
            if not turn.done():
                turn.set_exception(TimeoutError("no place became free in time"))
