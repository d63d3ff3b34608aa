"""The fence of a shard: a trigger on each of its tables that lets a row be written only where it belongs.

It costs a write no round trip, holds whoever writes (an instance with an old map, an older version of the service, a
person in psql), and tells a mover which profiles have changed under its copying. Moving is for PostgreSQL; elsewhere
there is no fence and the map does not change. A migration that adds a table of a shard calls `set_up` for it.

    shard_fences.state   watched   the row may be written, and the change is noted in shard_changes
                         held      refused until `until`, then as watched: a mover that died holds nobody for long
                         closed    refused: the logical shard is elsewhere
"""

from collections.abc import Iterable

from alembic import op

# `pg_current_xact_id` comes first: from there on a mover that waits for transactions waits for this one, so none slips
# through between the look at the fence and the writing of the row. `FOR SHARE` meets a mover that is just closing a
# fence whose time has run out: it waits for its decision, or makes it see that it is too late.
_FUNCTION = """
CREATE OR REPLACE FUNCTION fence_shard() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  owner uuid := CASE WHEN TG_OP = 'DELETE' THEN OLD.profile_id ELSE NEW.profile_id END;
  here integer := ((get_byte(uuid_send(owner), 6) & 15) << 6) | (get_byte(uuid_send(owner), 7) >> 2);
  fence shard_fences;
BEGIN
  PERFORM pg_current_xact_id();
  SELECT * INTO fence FROM shard_fences WHERE logical = here;
  IF FOUND AND current_setting('scaleout.mover', true) IS DISTINCT FROM 'on' THEN
    IF fence.state = 'held' AND fence.until < clock_timestamp() THEN
      SELECT * INTO fence FROM shard_fences WHERE logical = here FOR SHARE;
    END IF;
    IF fence.state = 'watched' OR (fence.state = 'held' AND fence.until < clock_timestamp()) THEN
      INSERT INTO shard_changes (profile_id) VALUES (owner);
    ELSE
      RAISE EXCEPTION 'logical shard % is not written here', here USING ERRCODE = 'SH001';
    END IF;
  END IF;
  RETURN CASE WHEN TG_OP = 'DELETE' THEN OLD ELSE NEW END;
END
$$
"""


def set_up(tables: Iterable[str]) -> None:
    """Put the fence around tables; their rows carry `profile_id`."""
    if not _is_postgresql():
        return
    op.execute(_FUNCTION)
    for table in tables:
        op.execute(
            f"CREATE TRIGGER fence_shard BEFORE INSERT OR UPDATE OR DELETE ON {table} "
            "FOR EACH ROW EXECUTE FUNCTION fence_shard()"
        )


def take_down(tables: Iterable[str]) -> None:
    """Remove the fence from tables, and with the last of them what it does."""
    if not _is_postgresql():
        return
    for table in tables:
        op.execute(f"DROP TRIGGER fence_shard ON {table}")
    op.execute("DROP FUNCTION IF EXISTS fence_shard() RESTRICT")


def _is_postgresql() -> bool:
    return op.get_bind().dialect.name == "postgresql"
