"""Deadlines of many blocks at once, for the price of one timer.

`asyncio.timeout` sets a timer for each block and takes it back, which costs more than all else it does. Blocks that all
have the same time end in the order in which they began: only the oldest one has to be looked after. One that ends
before others that began sooner, or is given more time, has a timer of its own.
"""

import asyncio
from typing import Self


class Deadlines:
    """Ends what takes too long."""

    def __init__(self) -> None:
        self._running: dict[Block, None] = {}  # their moments never decrease
        self._latest = 0.0
        self._watch: asyncio.TimerHandle | None = None

    def until(self, moment: float) -> "Block":
        """Return a block (`with`) that is ended by a `TimeoutError` at that moment of the loop's clock."""
        return Block(self, moment)

    def begin(self, block: "Block") -> None:
        """Look after a block from now on."""
        if block.moment < self._latest:
            block.watch_alone()
            return
        self._latest = block.moment
        self._running[block] = None
        if self._watch is None:
            self._watch = asyncio.get_running_loop().call_at(block.moment, self._look)

    def end(self, block: "Block") -> None:
        """Look after it no more."""
        self._running.pop(block, None)

    def _look(self) -> None:
        self._watch = None
        loop = asyncio.get_running_loop()
        for block in self._running:
            if block.moment > loop.time():
                self._watch = loop.call_at(block.moment, self._look)
                return
            block.expire()


class Block:
    """What `Deadlines.until` returns.

    Attributes:
        moment: of the loop's clock at which it is ended.
        expired: whether it was.
    """

    __slots__ = ("_alone", "_cancelling", "_deadlines", "_task", "expired", "moment")

    def __init__(self, deadlines: Deadlines, moment: float) -> None:
        self._deadlines = deadlines
        self._alone: asyncio.TimerHandle | None = None
        self.expired = False
        self.moment = moment
        self._task: asyncio.Task[object]
        self._cancelling: int

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a deadline is kept inside a task")
        self._task, self._cancelling = task, task.cancelling()
        self._deadlines.begin(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._end()
        # Somebody else may have ended the task, too: then that is what it is told.
        if self.expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def postpone(self, moment: float) -> None:
        """End the block at another moment, unless it has been."""
        self._end()
        self.moment = moment
        self.watch_alone()

    def watch_alone(self) -> None:
        """Have a timer for this block."""
        self._alone = asyncio.get_running_loop().call_at(self.moment, self.expire)

    def expire(self) -> None:
        """End the block, once."""
        if not self.expired:
            self.expired = True
            self._task.cancel()

    def _end(self) -> None:
        self._deadlines.end(self)
        if self._alone is not None:
            self._alone.cancel()
