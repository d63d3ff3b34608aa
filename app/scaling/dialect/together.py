"""One question for all who ask it at the same time, where only an answer from after their asking will do.

Where a log is has to be asked after a commit has ended, by a statement that costs as much as a third of the commit.
Under load many commits end while one such question is under way: none of them may use its answer, and one more question
answers them all.
"""

import asyncio
from collections.abc import Awaitable, Callable


class Together:
    """Puts one question at a time. Nobody gets an answer to a question that was put before they asked."""

    def __init__(self) -> None:
        # Both are told the answer, or None by an asker that has failed or gone away.
        self._under_way: asyncio.Future[int | None] | None = None
        self._next: asyncio.Future[int | None] | None = None

    async def ask(self, put: Callable[[], Awaitable[int]]) -> int:
        """Return the answer to a question that is put from now on, by the caller or by somebody who came just before.

        Args:
            put: puts the question, on the caller's own connection; what it raises is raised to this caller only.
        """
        while self._next is not None:
            answer = await asyncio.shield(self._next)
            if answer is not None:
                return answer
        mine: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        answer = None
        try:
            if self._under_way is not None:
                self._next = mine
                await asyncio.shield(self._under_way)
                self._next = None
            self._under_way = mine
            answer = await put()
            return answer
        finally:
            if self._next is mine:
                self._next = None
            if self._under_way is mine:
                self._under_way = None
            mine.set_result(answer)
