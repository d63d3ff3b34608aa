"""Brings every shard to the newest schema, and says whether models and migrations agree.

One run serves all shards. An advisory lock lets any number of processes start it at once: one migrates, the others
wait and find nothing left to do. Migrations only add, so old and new code run side by side over one.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, false, insert, or_, select
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from app.core.errors import Unavailable
from app.core.settings import DatabaseSettings, Settings, SettingsError
from app.core.telemetry import logger
from app.domain.profiles.tables import profiles
from app.domain.tables import metadata
from app.scaling import dialect
from app.scaling.database import shard_map
from app.scaling.dialect import logical_shard_of
from app.scaling.sharding import ShardMap
from migrations import citus

log = logger(__name__)

FOLDER = Path(__file__).parent
# Any number that nothing else in the database uses for an advisory lock: "scaleout" in base 36, cut to 63 bits.
LOCK = 2_200_371_428_573
GREETING_SECONDS = 10.0  # a server that has just been started is slow
MIGRATION_SECONDS = 300  # an index on a big table takes longer than any request may
# A change of a table waits for every transaction that uses the table, and all requests that come to it then stand
# behind the change. So it stands there for less than they wait for a connection, lets them pass, and tries again.
LOCK_SECONDS = 0.5
LET_PASS_SECONDS = 2.0


def configuration() -> Config:
    """Return Alembic's configuration; there is no alembic.ini to keep in step."""
    config = Config()
    config.set_main_option("script_location", str(FOLDER))
    config.set_main_option("path_separator", "os")
    return config


def upgrade(settings: Settings) -> None:
    """Bring every shard to the newest schema, and write down where everything is if that is not written down yet.

    Raises:
        Unavailable: a shard cannot be reached, or is of an engine that the service does not run on.
        OSError, SQLAlchemyError: a shard refuses a step, or is lost in it, or a transaction uses a table that changes
            for longer than `MIGRATION_SECONDS`; it is as it was before, and a further run goes on.
        SettingsError: the settings name fewer shards than hold something, or put elsewhere what is there already.
    """
    shards = settings.database.shards
    for shard in shards:
        asyncio.run(_greet(shard.primary))
        asyncio.run(_when_free(shard.primary, _upgrade))
        if settings.database.spread == "citus":
            asyncio.run(_when_free(shard.primary, _distribute))
    asyncio.run(_when_free(shards[0].primary, partial(_state_map, [shard.held for shard in shards])))


def check(url: str) -> list[str]:
    """Return what differs between the models and a database at `url` brought to the newest schema; empty is right."""
    asyncio.run(_on(url, _upgrade))
    return asyncio.run(_on(url, _differences))


def current(connection: Connection) -> bool:
    """Return whether a database is at the newest schema."""
    return MigrationContext.configure(connection).get_current_revision() == head()


def head() -> str | None:
    """Return the name of the newest step."""
    return ScriptDirectory.from_config(configuration()).get_current_head()


def is_behind(step: str) -> bool:
    """Return whether a database whose newest step is `step`, empty for none, lacks one that this code has.

    A step that this code does not know comes from newer code, whose tables serve this code too.
    """
    if not step:
        return True
    known = {revision.revision for revision in ScriptDirectory.from_config(configuration()).walk_revisions()}
    return step in known and step != head()


async def _greet(url: str) -> None:
    patient = DatabaseSettings(connect_timeout=GREETING_SECONDS)
    try:
        dialect.cut(await dialect.connect(url, patient, GREETING_SECONDS, name="migrations"))
    except dialect.ERRORS as error:
        parts = urlsplit(url)
        where = f"The database at {parts.hostname}:{parts.port}" if parts.port else f"The database at {parts.hostname}"
        words = error.args[-1] if error.args else "it does not answer in time"
        raise Unavailable(f"{where} cannot be used: {words}", code="database_down") from error


async def _on(url: str, work: Callable[[Connection], Any]) -> Any:
    engine = create_async_engine(dialect.driver_url(url), poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            return await connection.run_sync(work)
    finally:
        await engine.dispose()


async def _when_free(url: str, work: Callable[[Connection], Any]) -> Any:
    """Do the work, again and again while transactions use what it needs for itself."""
    loop = asyncio.get_running_loop()
    last = loop.time() + MIGRATION_SECONDS
    while True:
        try:
            return await _on(url, work)
        except dialect.ERRORS as error:
            if dialect.trouble(error) is not dialect.Trouble.BUSY or loop.time() > last:
                raise
            log.warning("migration waits for a transaction that uses its tables", reason=str(error).partition("\n")[0])
        await asyncio.sleep(LET_PASS_SECONDS)


def _upgrade(connection: Connection, step: str = "head") -> None:
    _hold(connection)
    config = configuration()
    config.attributes["connection"] = connection
    command.upgrade(config, step)


def _hold(connection: Connection) -> None:
    dialect.hold_for_migrations(connection, lock=LOCK, seconds=MIGRATION_SECONDS, lock_seconds=LOCK_SECONDS)


def _distribute(connection: Connection) -> None:
    _hold(connection)
    citus.distribute(connection, metadata.sorted_tables)


def _state_map(held: list[tuple[int, int] | None], connection: Connection) -> None:
    """Make the settings' map the first one. From then on only moves change it, and the settings only name servers."""
    _hold(connection)
    row = connection.execute(select(shard_map)).first()
    if row is None:
        first = ShardMap.of_settings(held)
        own = or_(*(logical_shard_of(profiles.c.profile_id).between(*ends) for ends in held[:1] if ends), false())
        if connection.execute(select(profiles.c.profile_id).where(~own).limit(1)).first():
            raise SettingsError(
                "SHARDS: the first shard holds profiles that SHARDS puts elsewhere. Give it 0 to 1023 and the others "
                "no first and last; then move ranges to them with `scaleout shards move`."
            )
        connection.execute(insert(shard_map).values(id=1, epoch=1, body=first.to_json()))
        return
    for place in ShardMap.from_json(row.epoch, row.body).ranges:
        if place.shard >= len(held):
            raise SettingsError(
                f"SHARDS: names {len(held)} shards, but logical shards {place.first} to {place.last} are on shard "
                f"{place.shard}. Name its servers too, or move them away first with `scaleout shards move`."
            )


def _differences(connection: Connection) -> list[str]:
    context = MigrationContext.configure(
        connection, opts={"compare_type": True, "target_metadata": metadata, "include_object": _is_of_the_models}
    )
    return [str(difference) for difference in compare_metadata(context, metadata)]


def _is_of_the_models(item: Any, _name: str | None, kind: str, reflected: bool, model: Any) -> bool:  # noqa: FBT001  # Alembic's
    """Leave out generated columns that no model names: an index stands on them, where it cannot on an expression."""
    return not (kind == "column" and reflected and model is None and item.computed is not None)
