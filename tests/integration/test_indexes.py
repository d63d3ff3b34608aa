"""Each index is used by the statement that it is for, on 100,000 rows: what the service asks is explained as it is."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from conftest import settings_from
from quiet import database_on, environment_of, url_of
from sqlalchemy import Engine, event, text

from app.domain.payments.attempts import of_order
from app.domain.payments.reconciliation import reconcile
from app.domain.tables import ROOMS
from app.scaling.database import metadata
from app.scaling.outbox import claim
from app.wiring import Resources, open_resources
from deploy.local.cluster import Cluster
from migrations import runner
from workers.tasks.upkeep import KEPT, _delete

pytest_plugins = ("quiet",)
pytestmark = pytest.mark.postgresql("its plans are read")

DATABASE = "indexed"
PAGE = Path(__file__).parents[2] / "docs" / "patterns" / "queries.md"
# Tables that have a handful of rows however large the service is.
SMALL = {"shard_map"}
Use = Callable[[Resources], Awaitable[Any]]
# `id(n)` grows with n, as the service's ids do with time.
FILL = """
-- Nothing here has to survive, nor to reach the replicas.
DO $$ DECLARE name text; BEGIN
    -- Who refers to others first.
    FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY tablename <> 'stock' LOOP
        EXECUTE format('ALTER TABLE %I SET UNLOGGED', name);
    END LOOP;
END $$;
CREATE FUNCTION id(n bigint) RETURNS uuid IMMUTABLE LANGUAGE sql
RETURN (lpad(to_hex(n), 12, '0') || '80008000000000000000')::uuid;
CREATE VIEW n AS SELECT generate_series(1, 100000) AS n;
INSERT INTO profiles (profile_id, email, name, tier, role, attributes, version, created_at, updated_at)
    SELECT id(n), n || '@x', 'Name ' || n, 'free', 'member', jsonb_build_object('team', 'team-' || n % 5000), 1, now(),
           now() FROM n;
INSERT INTO email_directory (email_key, profile_id, confirmed, reserved_at)
    SELECT lpad(n::text, 64, '0'), id(n), (n % 1000 <> 0)::int, now() - interval '1 day' FROM n;
INSERT INTO sessions (profile_id, key, id, user_agent, created_at, seen_at, expires_at)
    SELECT id(n), lpad(n::text, 64, '0'), id(n), '', now(), now(), now() + (n - 100) * interval '1 second' FROM n;
INSERT INTO products (id, sku, name, description, category, amount, currency, attributes, available, version, revision,
                      created_at, updated_at)
    SELECT id(n), 'SKU-' || n, 'Thing word' || n % 1000, '', 'category-' || n % 1000, n, 'EUR', '{}', 1, 1, 1, now(),
           now() FROM n;
INSERT INTO orders (profile_id, id, step, amount, currency, payment_method, history, version, created_at, updated_at)
    SELECT id(n % 1000 + 1), id(n), 'confirmed', 1, 'EUR', 'tok_ok', '[]', 1, now(), now() FROM n;
INSERT INTO order_items (profile_id, order_id, line, product_id, sku, name, quantity, unit_amount)
    SELECT id(n % 1000 + 1), id(n), 0, id(n), 'SKU', 'Thing', 1, 1 FROM n;
INSERT INTO payment_attempts (profile_id, id, order_id, amount, currency, method, state, created_at, updated_at)
    SELECT id(n), id(n), id(n), 1, 'EUR', 'tok_ok', 'captured', now(), now() - n * interval '1 hour' FROM n;
INSERT INTO outbox (profile_id, id, event, subject_id, payload, request_id, created_at, due_at, tries, done_at)
    SELECT id(n), id(n), 'event', id(n), '{}', 'request', now(), CASE WHEN n % 1000 = 0 THEN now() END, 1,
           CASE WHEN n % 1000 <> 0 THEN now() - n * interval '1 second' END FROM n;
INSERT INTO receipts (profile_id, message_id, task, done_at)
    SELECT id(n), id(n), 'task', now() - n * interval '7 second' FROM n;
INSERT INTO dead_letters (profile_id, id, message_id, task, event, error, tries, created_at, replayed_at)
    SELECT id(n), id(n), id(n), 'task', 'event', 'error', 1, now(),
           CASE WHEN n % 2 = 0 THEN now() - n * interval '27 second' END FROM n;
INSERT INTO idempotency_keys (profile_id, route, key, fingerprint, reply, created_at)
    SELECT id(n), 'route', 'key', repeat('0', 64), '{}', now() - n * interval '1 second' FROM n;
INSERT INTO sales (order_id, product_id, day, quantity, amount, currency)
    SELECT id(n), id(n % 1000 + 1), current_date - n % 3650, 1, 1, 'EUR' FROM n;
INSERT INTO warehouses (id, name, lat, lon) SELECT id(n), 'W' || n, n % 181 - 90, n % 361 - 180 FROM n;
INSERT INTO reservations (order_id, state, allocations, warehouse_id, created_at, updated_at)
    SELECT id(n), 'dispatched', '[]', id(n % 1000), now(), now() FROM n;
INSERT INTO jobs (id, kind, parameters, status, progress, created_at, updated_at)
    SELECT id(n), 'sales', '{}', CASE WHEN n % 1000 = 0 THEN 'processing' ELSE 'done' END, 0,
           now() - n * interval '7 second', now() FROM n;
INSERT INTO product_views (product_id, views) SELECT id(n), n % 5000 FROM n;
INSERT INTO bought_together (product_id, other_id, orders) SELECT id(n), id(n + 7), 1 FROM n;
"""


def id_of(number: int) -> UUID:
    """Return what `id(number)` is in the database."""
    return UUID(f"{number:012x}80008000000000000000")


def indexes_of_the_page() -> set[str]:
    """Return the indexes that the page lists."""
    return set(re.findall(r"^\| `(ix_\w+)` \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE))


@pytest.fixture(scope="module")
async def indexed(cluster: Cluster) -> AsyncIterator[Resources]:
    """An instance on a database of its own with 100,000 rows in every table that grows, and no replica."""
    async with database_on(cluster, DATABASE) as url:
        settings = settings_from(environment_of(cluster, DATABASE) | {"REPLICA_URLS": "", "CACHE_LOCAL_ENTRIES": "0"})
        await asyncio.to_thread(runner.upgrade, settings)
        connection = await asyncpg.connect(url)
        try:
            await connection.execute(FILL)
            # With so many it looks at every row, not at a sample: plans are the same each time.
            await connection.execute("SET default_statistics_target = 400")
            await connection.execute("ANALYZE")
        finally:
            await connection.close()
        async with open_resources(settings) as opened:
            await opened.redis.client.flushdb()
            yield opened


@contextmanager
def heard() -> Iterator[list[tuple[str, Any]]]:
    """Collect the statements that are sent inside the block, with what is bound to them."""
    statements: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        statements.append((statement, parameters))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        event.remove(Engine, "before_cursor_execute", note)


def parts_of(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every node of a plan."""
    yield plan
    for part in plan.get("Plans", ()):
        yield from parts_of(part)


async def claimed(instance: Resources) -> None:
    async with instance.database.writer_of(0) as writer:
        await claim(writer, batch=100, lease=timedelta(seconds=60))


def purged(number: int) -> Use:
    async def use(instance: Resources) -> None:
        await _delete(instance, 0, KEPT[number])

    return use


async def asked(instance: Resources, statement: str) -> None:
    """Ask what no route asks, but people do."""
    await instance.database.reader().all(text(statement))


STUCK = "SELECT * FROM orders WHERE step = 'reserved' AND updated_at < now() - interval '1 hour' ORDER BY updated_at"
PICK_LIST = (
    "SELECT * FROM reservations WHERE warehouse_id = id(7) AND state = 'dispatched' ORDER BY created_at LIMIT 50"
)
NEAREST = "SELECT name FROM warehouses ORDER BY point(lon, lat) <-> point(9.99, 53.55) LIMIT 1"
# Each index with whoever asks the statement that it is for.
USES: dict[str, Use] = {
    "pk_profiles": lambda it: it.cache.page(it.profiles.listed(None, None, 20, None)),
    "ix_profiles_name_prefix": lambda it: it.cache.page(it.profiles.listed("name 7777", None, 20, None)),
    "ix_profiles_attributes": lambda it: it.cache.page(it.profiles.listed(None, ("team", "team-7"), 20, None)),
    "pk_email_directory": lambda it: it.directory.find("ada@example.com"),
    "ix_email_directory_unconfirmed": lambda it: it.directory.sweep(),
    "pk_sessions": lambda it: it.sessions.listed(id_of(7)),
    "ix_sessions_expires_at": purged(4),
    "pk_products": lambda it: it.cache.page(it.catalog.listed(20, None)),
    "ix_products_words": lambda it: it.cache.page(it.catalog.search("word7", 20, None)),
    "ix_products_category": lambda it: it.recommendations._alike(id_of(77)),
    "ix_product_views_views": lambda it: it.recommendations._selling(),
    "ix_bought_together_other": lambda it: it.recommendations._together(id_of(77)),
    "ix_sales_day": lambda it: it.recommendations._selling(),
    "pk_orders": lambda it: it.orders.listed(id_of(7), 20, None),
    "pk_order_items": lambda it: it.orders.load(id_of(8), id_of(1007)),
    "ix_payment_attempts_order": lambda it: of_order(it.database.reader(id_of(7)), id_of(7), id_of(7)),
    "ix_payment_attempts_updated_at": lambda it: reconcile(it.database, it.payments, period=timedelta(0)),
    "ix_outbox_due_at": claimed,
    "ix_outbox_done_at": purged(0),
    "ix_receipts_done_at": purged(1),
    "ix_dead_letters_replayed_at": purged(2),
    "ix_dead_letters_message": purged(0),
    "ix_dead_letters_id": lambda it: it.dead_letters.listed(20, None),
    "ix_idempotency_keys_created_at": purged(3),
    "ix_jobs_status": lambda it: it.jobs.fail_overdue(),
    "ix_jobs_created_at": lambda it: it.jobs.purge(100),
    "ix_orders_step": lambda it: asked(it, STUCK),
    "ix_reservations_pick_list": lambda it: asked(it, PICK_LIST),
    "ix_warehouses_place": lambda it: asked(it, NEAREST),
}


def test_the_page_lists_every_index_and_each_is_tried() -> None:
    assert ROOMS
    existing = {index.name for table in metadata.sorted_tables for index in table.indexes}
    assert indexes_of_the_page() == existing
    assert existing <= set(USES)


@pytest.mark.sabotage(
    path="migrations/versions/0008_products_by_category.py",
    take_out='    op.create_index("ix_products_category", "products", ["category"])\n',
    put="    return\n",
)
@pytest.mark.parametrize("index", USES)
async def test_an_index_is_used_by_the_statement_that_it_is_for(
    indexed: Resources, cluster: Cluster, index: str
) -> None:
    with heard() as statements:
        await USES[index](indexed)
    connection = await asyncpg.connect(url_of(cluster, "primary", DATABASE))
    used, read_whole = set(), set()
    try:
        await connection.set_type_codec("json", schema="pg_catalog", encoder=str, decoder=json.loads)
        for statement, parameters in dict(statements).items():  # a loop's statement once
            if statement.lstrip().startswith("INSERT"):
                continue
            plan = await connection.fetchval(f"EXPLAIN (FORMAT JSON) {statement}", *parameters)
            for part in parts_of(plan[0]["Plan"]):
                used.add(part.get("Index Name"))
                if part["Node Type"] == "Seq Scan":
                    read_whole.add(part["Relation Name"])
    finally:
        await connection.close()
    assert index in used
    assert not read_whole - SMALL
