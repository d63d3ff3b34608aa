"""Where everything is, as the catalog has it written down: one row, which only a move changes.

Whoever changes it names the epoch that it has seen. Without a row everything is where the settings put it.
"""

import asyncio
from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.exc import TimeoutError as PoolTimeout

from app.core.errors import Unavailable
from app.core.settings import DatabaseSettings
from app.scaling import dialect
from app.scaling.database.reader import Reader
from app.scaling.database.schema import shard_map
from app.scaling.database.shard import Place, Shard
from app.scaling.sharding import ShardMap


class MapRow:
    """Reads the row.

    Args:
        catalog: the shard that has it.
        settings: where things are while there is none, and how long to wait for the primary.
    """

    def __init__(self, catalog: Shard, settings: DatabaseSettings) -> None:
        self._catalog = catalog
        self._settings = settings

    async def newest(self) -> ShardMap:
        """Ask the primary.

        Raises:
            Unavailable: it does not answer in the time in which it should accept a connection.
        """
        silent = Unavailable("The map of shards cannot be read; try again.", code="database_down")
        primary = self._catalog.replicas.primary
        try:
            async with asyncio.timeout(self._settings.connect_timeout):
                rows = await primary.all(select(shard_map))
            return self._map(rows[0] if rows else None)
        except PoolTimeout as error:
            raise silent from error
        except dialect.ERRORS as error:
            raise silent from error

    async def any(self) -> ShardMap:
        """Ask whichever node answers; a replica may know only an older map."""
        return self._map(await Reader(self._find).first(select(shard_map)))

    async def _find(self) -> Place:
        return Place(self._catalog, 0)

    def _map(self, row: Row[Any] | None) -> ShardMap:
        if row is None:
            return ShardMap.of_settings([shard.held for shard in self._settings.shards])
        return ShardMap.from_json(row.epoch, row.body)
