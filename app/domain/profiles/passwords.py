"""Password hashes: Argon2id in a bounded executor of its own, so that sign-ins never slow the event loop.

A hash costs about 20 ms of a core and 19 MiB. When all threads are busy and the queue is full, the answer is 503 at
once. An unknown address costs the same hash as a wrong password.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from argon2.low_level import Type

from app.core.errors import Unavailable
from app.core.settings import SessionSettings

T = TypeVar("T")


class Passwords:
    """The hasher of one process.

    Args:
        settings: what a hash costs, how many run at a time and how many may wait.
    """

    def __init__(self, settings: SessionSettings) -> None:
        self._hasher = PasswordHasher(
            time_cost=settings.hash_passes, memory_cost=settings.hash_memory, parallelism=1, type=Type.ID
        )
        self._threads = ThreadPoolExecutor(settings.hash_threads, thread_name_prefix="argon2")
        self._limit = settings.hash_threads + settings.hash_queue
        self._present = 0
        self._nobody = self._hasher.hash("nobody has this password")

    def stop(self) -> None:
        """End the threads once they are idle."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def hash(self, password: str) -> str:
        """Return the hash to store.

        Raises:
            Unavailable: `hashing_busy`, past the bound.
        """
        return await self._run(lambda: self._hasher.hash(password))

    async def matches(self, stored: str | None, password: str) -> bool:
        """Return whether `password` is the one behind `stored`; without one, take as long and return False.

        Raises:
            Unavailable: `hashing_busy`, past the bound.
        """

        def verify() -> bool:
            try:
                return self._hasher.verify(stored or self._nobody, password) and stored is not None
            except (VerificationError, InvalidHashError):
                return False

        return await self._run(verify)

    async def _run(self, work: Callable[[], T]) -> T:
        if self._present >= self._limit:
            raise Unavailable("Too many people are signing in right now; try again.", code="hashing_busy")
        self._present += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._present -= 1
