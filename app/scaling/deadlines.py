"""Deadlines of many blocks at once, for the price of one timer.

`asyncio.timeout` sets a timer for each block and takes it back, which costs more than all else it does. Blocks that all
have the same time end in the order in which they began: only the oldest one has to be looked after.
"""

import asyncio


class Deadlines:
    """Ends what takes too long. The moments of its blocks never decrease: each is so many seconds after its request."""

    def __init__(self) -> None:
        self._running: dict[_Block, None] = {}
        self._watch: asyncio.TimerHandle | None = None

    def until(self, moment: float) -> "_Block":
        """Return a block (`with`) that is ended by a `TimeoutError` at that moment of the loop's clock."""
        return _Block(self, moment)

    def begin(self, block: "_Block") -> None:
        """Look after a block from now on."""
        self._running[block] = None
        if self._watch is None:
            self._watch = asyncio.get_running_loop().call_at(block.moment, self._look)

    def end(self, block: "_Block") -> None:
        """Look after it no more."""
        del self._running[block]

    def _look(self) -> None:
        self._watch = None
        loop = asyncio.get_running_loop()
        for block in self._running:
            if block.moment > loop.time():
                self._watch = loop.call_at(block.moment, self._look)
                return
            block.expire()


class _Block:
    """What `Deadlines.until` returns."""

    __slots__ = ("_cancelling", "_deadlines", "_expired", "_task", "moment")

    def __init__(self, deadlines: Deadlines, moment: float) -> None:
        self._deadlines = deadlines
        self._expired = False
        self.moment = moment
        self._task: asyncio.Task[object]
        self._cancelling: int

    def __enter__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a deadline is kept inside a task")
        self._task, self._cancelling = task, task.cancelling()
        self._deadlines.begin(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._deadlines.end(self)
        # Somebody else may have ended the task, too: then that is what it is told.
        if self._expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def expire(self) -> None:
        """End the block, once."""
        if not self._expired:
            self._expired = True
            self._task.cancel()
