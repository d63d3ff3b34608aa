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
from app.domain.profiles.tables import profiles
from app.domain.tables import metadata
from app.scaling import dialect
from app.scaling.database import shard_map
from app.scaling.dialect import logical_shard_of
from app.scaling.sharding import ShardMap
from migrations import citus

FOLDER = Path(__file__).parent
# Any number that nothing else in the database uses for an advisory lock: "scaleout" in base 36, cut to 63 bits.
LOCK = 2_200_371_428_573
GREETING_SECONDS = 10.0  # a server that has just been started is slow
MIGRATION_SECONDS = 300  # an index on a big table takes longer than any request may


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
        OSError, SQLAlchemyError: a shard refuses a step, or is lost in it; it is as it was before that step.
        SettingsError: the settings name fewer shards than hold something, or put elsewhere what is there already.
    """
    shards = settings.database.shards
    for shard in shards:
        asyncio.run(_greet(shard.primary))
        asyncio.run(_on(shard.primary, _upgrade))
        if settings.database.spread == "citus":
            asyncio.run(_on(shard.primary, _distribute))
    asyncio.run(_on(shards[0].primary, partial(_state_map, [shard.held for shard in shards])))


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


def _upgrade(connection: Connection) -> None:
    dialect.hold_for_migrations(connection, lock=LOCK, seconds=MIGRATION_SECONDS)
    config = configuration()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _distribute(connection: Connection) -> None:
    dialect.hold_for_migrations(connection, lock=LOCK, seconds=MIGRATION_SECONDS)
    citus.distribute(connection, metadata.sorted_tables)


def _state_map(held: list[tuple[int, int] | None], connection: Connection) -> None:
    """Make the settings' map the first one. From then on only moves change it, and the settings only name servers."""
    dialect.hold_for_migrations(connection, lock=LOCK, seconds=MIGRATION_SECONDS)
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
