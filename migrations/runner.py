"""Brings every shard to the newest schema, and says whether models and migrations agree.

One run serves all shards. An advisory lock lets any number of processes start it at once: one migrates, the others
wait and find nothing left to do. Migrations only add, so old and new code run side by side over one.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from app.core.settings import Settings
from app.domain.tables import metadata

FOLDER = Path(__file__).parent
# Any number that nothing else in the database uses for an advisory lock: "scaleout" in base 36, cut to 63 bits.
LOCK = 2_200_371_428_573
MIGRATION_TIMEOUT = 300_000  # milliseconds; an index on a big table takes longer than any request may


def configuration() -> Config:
    """Return Alembic's configuration; there is no alembic.ini to keep in step."""
    config = Config()
    config.set_main_option("script_location", str(FOLDER))
    config.set_main_option("path_separator", "os")
    return config


def upgrade(settings: Settings) -> None:
    """Bring every shard to the newest schema.

    Raises:
        OSError, SQLAlchemyError: a shard cannot be reached or refuses a step; it is as it was before that step.
    """
    for shard in settings.database.shards:
        asyncio.run(_on(shard.primary, _upgrade))


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


async def _on(url: str, work: Callable[[Connection], Any]) -> Any:
    engine = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://", 1), poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            return await connection.run_sync(work)
    finally:
        await engine.dispose()


def _upgrade(connection: Connection) -> None:
    connection.execute(text(f"SET statement_timeout = {MIGRATION_TIMEOUT}"))
    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
    config = configuration()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _differences(connection: Connection) -> list[str]:
    context = MigrationContext.configure(connection, opts={"compare_type": True, "target_metadata": metadata})
    return [str(difference) for difference in compare_metadata(context, metadata)]
