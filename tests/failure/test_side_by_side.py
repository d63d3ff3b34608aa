"""A release with a migration, while customers order: old and new code run side by side on tables of either age."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from apart import apart_from
from conftest import PASSWORD, until
from expectations import check_problem
from instances import Instance, command, ready
from sagas import Shop

from deploy.local.cluster import Cluster
from deploy.local.layout import CHECKOUT
from migrations import runner

pytest_plugins = ("apart", "instances")
pytestmark = pytest.mark.postgresql("the steps of each engine are the same files")

STEP = """
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "next", "{head}", None, None


def upgrade():
    op.add_column("orders", sa.Column("note", sa.String(100)))
    op.create_index("ix_orders_note", "orders", ["note"])
"""
COLUMN = '    Column("version", Integer, nullable=False),\n'


def next_release(folder: Path) -> Path:
    """Make a tree of code whose orders have one more column, with the migration that adds it."""
    for room in ("app", "workers", "migrations", "deploy"):
        shutil.copytree(CHECKOUT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "migrations" / "versions" / "next.py").write_text(STEP.format(head=runner.head()), encoding="utf-8")
    tables = folder / "app" / "domain" / "orders" / "tables.py"
    before = tables.read_text(encoding="utf-8")
    head, _, rest = before.partition('"orders",')
    assert COLUMN in rest
    wider = rest.replace(COLUMN, f'{COLUMN}    Column("note", String(100)),\n', 1)
    tables.write_text(f'{head}"orders",{wider}', encoding="utf-8")
    return folder


async def order(instance: Instance, customer: dict[str, str], product: str) -> str:
    """Place an order through an instance and return its id."""
    placed = await instance.client.post(
        "/api/v1/orders",
        json={"items": [{"product_id": product, "quantity": 1}], "payment_method": "tok_ok"},
        headers=customer | {"Idempotency-Key": uuid4().hex},
    )
    identifier: str = placed.raise_for_status().json()["id"]
    return identifier


async def read(instance: Instance, customer: dict[str, str], identifier: str) -> dict[str, Any]:
    """Return an order as an instance shows it."""
    found: dict[str, Any] = (
        (await instance.client.get(f"/api/v1/orders/{identifier}", headers=customer)).raise_for_status().json()
    )
    return found


@pytest.mark.sabotage("migrations/runner.py", "return step in known and step != head()", "return step != head()")
async def test_old_and_new_code_serve_side_by_side_over_a_migration(
    cluster: Cluster, new_instance: Callable[..., Awaitable[Instance]], tmp_path: Path
) -> None:
    tree = next_release(tmp_path)
    async with apart_from(cluster) as apart:
        product = str((await (await Shop(apart, cluster).open()).product()).id)
        old, new = await asyncio.gather(new_instance(**apart.environment), new_instance(tree=tree, **apart.environment))
        await until(ready, old)
        credentials = {"email": f"{uuid4().hex}@example.com", "password": PASSWORD}
        (await old.client.post("/api/v1/profiles", json={**credentials, "name": "Ada"})).raise_for_status()
        token = (await old.client.post("/api/v1/sessions", json=credentials)).raise_for_status().json()["token"]
        old.client.cookies.clear()
        customer = {"Authorization": f"Bearer {token}"}

        # New code does not serve from old tables: it would ask for the column that is not there.
        async def says_so() -> httpx.Response | None:
            answer = await new.client.get("/health/ready")
            return answer if "migration next" in answer.text else None

        check_problem(await until(says_so), 503, "starting")

        # Old code goes on while the tables change under it.
        placed: list[str] = []
        over = asyncio.Event()

        async def customers() -> None:
            while not over.is_set():
                placed.append(await order(old, customer, product))
                assert (await read(old, customer, placed[-1]))["id"] == placed[-1]

        async with asyncio.TaskGroup() as load:
            load.create_task(customers())
            migration = await command(cluster, "migrate", tree=tree, **apart.environment)
            assert await migration.wait() == 0
            await until(ready, new)
            enough = len(placed) + 5

            async def went_on() -> bool:
                return len(placed) >= enough

            await until(went_on)
            over.set()

        # Both serve, each what the other has written, and old code starts anew on the new tables.
        third = await new_instance(**apart.environment)
        await until(ready, third)
        for writer, reader in ((old, new), (new, old), (new, third)):
            placed.append(await order(writer, customer, product))
            assert (await read(reader, customer, placed[-1]))["id"] == placed[-1]
        assert await ready(old)
        listed = (await new.client.get("/api/v1/orders?limit=100", headers=customer)).raise_for_status().json()
        assert {item["id"] for item in listed["items"]} == set(placed[-100:])
