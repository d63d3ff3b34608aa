"""The connections of this process to one server for one purpose: whose turn it is, and what is kept at hand.

Who asks through SQLAlchemy gets a connection of its pool. Who asks the driver itself, a lookup or an order, keeps the
connection beside the pool afterwards: to take one out and give it back costs more than to ask on it. Together they are
never more than the pool has, as each use has its turn, and turns come in the order of arrival.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TypeVar

from sqlalchemy import Connection, PoolProxiedConnection
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.util import greenlet_spawn

from app.scaling import dialect
from app.scaling.turns import Turns

T = TypeVar("T")


class Connections:
    """One pool, and what is kept beside it.

    Args:
        engine: opens connections and knows how many there may be.
        places: how many that is.
        patience: seconds that a turn is waited for.
        opening: seconds that waiting for a turn and opening a connection may take together; without it opening has
            its own time.
    """

    def __init__(self, engine: AsyncEngine, places: int, patience: float, opening: float | None = None) -> None:
        self.engine = engine
        self._turns = Turns(places, patience)
        self._opening = opening
        self._kept: list[PoolProxiedConnection] = []

    @property
    def full(self) -> bool:
        """Whether the next one has to wait."""
        return self._turns.full

    @property
    def in_use(self) -> int:
        """How many are in use."""
        return self._turns.taken

    async def take(self) -> PoolProxiedConnection:
        """Return a connection for the driver itself, once it is the caller's turn; `give` gives it back.

        Raises:
            PoolTimeout: if none became free, or could be opened, in time.
            One of `dialect.ERRORS`: if none can be opened.
        """
        since = await self._turn()
        try:
            kept = self._at_hand()
            return kept if kept is not None else await self._open(since, self.engine.raw_connection())
        except BaseException:
            self._turns.give()
            raise

    def give(self, connection: PoolProxiedConnection) -> None:
        """Keep a connection for the next one; whoever does not know what is still to come on it has invalidated it."""
        if connection.is_valid:
            self._kept.append(connection)
        else:
            connection.close()
        self._turns.give()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[AsyncConnection]:
        """Lend a connection of the pool for the block.

        Raises:
            As `take`.
        """
        since = await self._turn()
        try:
            self._make_room()
            async with AsyncExitStack() as stack:
                yield await self._open(since, stack.enter_async_context(self.engine.connect()))
        finally:
            self._turns.give()

    async def run(self, act: Callable[[Connection], T]) -> T:
        """Return what `act` does with a connection of the pool, in one step; it is written without `await`.

        SQLAlchemy's own async faces make four steps of connection, statement and rows.

        Raises:
            As `take`.
        """
        await self._turn()
        try:
            self._make_room()
            return await greenlet_spawn(self._run, act)
        finally:
            self._turns.give()

    async def replace(self) -> None:
        """Close all that are not in use: they lead to a server that is not the one any more."""
        while self._kept:
            self._kept.pop().close()
        await self.engine.dispose()

    def _run(self, act: Callable[[Connection], T]) -> T:
        with self.engine.sync_engine.connect() as connection:
            return act(connection)

    def _make_room(self) -> None:
        """Give one that is kept back to the pool, so that it has one for whoever asks it."""
        if self._kept:
            self._kept.pop().close()

    def _at_hand(self) -> PoolProxiedConnection | None:
        while self._kept:
            connection = self._kept.pop()
            if not dialect.is_cut(connection.driver_connection):
                return connection
            connection.invalidate()
            connection.close()
        return None

    async def _turn(self) -> float:
        since = asyncio.get_running_loop().time()
        try:
            await self._turns.take()
        except TimeoutError as error:
            raise PoolTimeout("no connection became free in time") from error
        return since

    async def _open(self, since: float, opening: Awaitable[T]) -> T:
        if self._opening is None:
            return await opening
        try:
            async with asyncio.timeout_at(since + self._opening):
                return await opening
        except TimeoutError as error:
            raise PoolTimeout("no connection was opened in time") from error
