"""A whole cluster with two shards, as `make run SHARDS=2` starts it: everything works for the profiles of both."""

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from books import as_long_as_it_goes_on
from conftest import ENVIRONMENT, PATIENCE, Customer, until
from moving import HANDED_OVER, HELD, POINTS

from app.core.ids import LOGICAL_SHARDS, logical_shard
from deploy.local.cluster import Cluster
from deploy.local.programs import Sizes

pytestmark = pytest.mark.postgresql("it runs a cluster of its own, on PostgreSQL")

PASSWORD = "a long enough pass phrase"
PRIMARIES = ("primary", "shard1-primary")
QUARTERS = 4
MOVED = (512, 767)  # the third quarter
SCRIPT = Path(__file__).parent.parent / "moving.py"
# The two after which others have to wait; all seven in the long form.
DEATHS = POINTS if os.environ.get("MOVER_DEATHS") == "all" else (HELD, HANDED_OVER)


@pytest.fixture(scope="module")
def sharded() -> Iterator[Cluster]:
    """A cluster of its own with two shards; the second has one replica, as the first has here."""
    with tempfile.TemporaryDirectory(prefix="scaleout-shards-") as folder:
        sizes = Sizes(replicas=1, shards=2)
        running = Cluster(Path(folder) / "c", sizes=sizes, environment=ENVIRONMENT, durable=False)
        running.up()
        yield running
        running.down(wipe=True)


@pytest.fixture
async def people(sharded: Cluster) -> AsyncIterator[list[Customer]]:
    """One signed-in customer of each quarter of the logical shards; two quarters are a shard."""
    found: dict[int, Customer] = {}
    while len(found) < QUARTERS:
        client = httpx.AsyncClient(base_url=sharded.url, timeout=15)
        email = f"{uuid4().hex}@example.com"
        body = {"email": email, "password": PASSWORD, "name": "Of a shard"}
        profile = (await client.post("/api/v1/profiles", json=body)).raise_for_status().json()
        quarter = logical_shard(UUID(profile["id"])) * QUARTERS // LOGICAL_SHARDS
        if quarter in found:
            await client.aclose()
            continue
        signed_in = await client.post("/api/v1/sessions", json={"email": email, "password": PASSWORD})
        token = signed_in.raise_for_status().json()["token"]
        client.cookies.clear()
        client.headers["Authorization"] = f"Bearer {token}"
        found[quarter] = Customer(client, profile, email, token)
    yield [found[quarter] for quarter in sorted(found)]
    for customer in found.values():
        await customer.client.aclose()


async def count(sharded: Cluster, node: str, statement: str, *arguments: Any) -> int:
    """Run a counting statement as superuser on a node."""
    connection = await asyncpg.connect(sharded.process(node).address)
    try:
        return int(await connection.fetchval(statement, *arguments))
    finally:
        await connection.close()


@pytest.mark.sabotage(
    path="deploy/local/programs.py",
    take_out='                addresses["SHARDS"] = json.dumps(shards)',
    put="                pass",
)
async def test_the_main_job_works_for_the_profiles_of_every_shard(sharded: Cluster, people: list[Customer]) -> None:
    for shard, customer in ((0, people[0]), (1, people[3])):
        products = (await customer.client.get("/api/v1/products", params={"limit": 1})).raise_for_status().json()
        order = (await customer.order(products["items"][0]["id"], 2)).raise_for_status().json()
        assert (await customer.ended(order["id"]))["status"] == "confirmed"
        await customer.invoiced(order["id"])
        invoice = await customer.client.get(f"/api/v1/orders/{order['id']}/invoice", follow_redirects=True)
        assert invoice.raise_for_status().content.startswith(b"%PDF")
        await until(mail_to, sharded, customer.email)
        changed = await customer.client.patch(
            f"/api/v1/profiles/{customer.profile['id']}", json={"bio": "moved in"}, headers={"If-Match": '"v1"'}
        )
        assert changed.raise_for_status().json()["bio"] == "moved in"
        for number, node in enumerate(PRIMARIES):
            for table in ("profiles", "sessions", "orders", "order_items", "payment_attempts", "invoices", "mails"):
                statement = f"SELECT count(*) FROM {table} WHERE profile_id = $1"  # noqa: S608  # our own tables
                rows = await count(sharded, node, statement, UUID(customer.profile["id"]))
                assert bool(rows) is (number == shard), (table, node)


async def mail_to(sharded: Cluster, email: str) -> list[Any]:
    """Return the mails that have arrived for an address."""
    async with httpx.AsyncClient(base_url=sharded.process("smtp").http_address or "") as client:
        found: list[Any] = (await client.get("/messages", params={"to": email})).raise_for_status().json()
        return found


async def test_every_server_of_every_shard_is_shown_and_the_demonstration_data_is_spread_over_both(
    sharded: Cluster,
) -> None:
    servers = {process.name for process in sharded.processes if process.kind in {"primary", "replica"}}
    assert servers == {"primary", "replica-1", "shard1-primary", "shard1-replica-1"}
    assert set(sharded.status().values()) == {"ready"}
    seeded = [
        await count(sharded, node, "SELECT count(*) FROM profiles WHERE email LIKE '%@example.com'")
        for node in PRIMARIES
    ]
    assert min(seeded) > 4_000
    async with httpx.AsyncClient(base_url=sharded.url, timeout=15) as client:
        body = {"email": "admin@example.com", "password": "correct horse battery"}
        token = (await client.post("/api/v1/sessions", json=body)).raise_for_status().json()["token"]
        client.cookies.clear()
        client.headers["Authorization"] = f"Bearer {token}"
        shown = (await client.get("/api/v1/admin/shards")).raise_for_status().json()
        assert [shard["ranges"] for shard in shown["items"]] == [
            [{"first": 0, "last": 511}],
            [{"first": 512, "last": 1023}],
        ]
        page = (await client.get("/api/v1/profiles", params={"limit": 100})).raise_for_status().json()
        ids = [UUID(item["id"]) for item in page["items"]]
        assert ids == sorted(ids, reverse=True)
        assert {logical_shard(identifier) // 512 for identifier in ids} == {0, 1}


class Shopper:
    """Orders and reads without a pause, and remembers what was promised.

    Attributes:
        orders: ids of the orders that were accepted.
        refused: codes of the answers after which an order had to be sent again.
        wrong: answers that nobody may ever get.
    """

    def __init__(self, customer: Customer) -> None:
        self.customer = customer
        self.orders: list[str] = []
        self.refused: set[str] = set()
        self.wrong: list[str] = []

    async def shop(self, product: str, done: asyncio.Event) -> None:
        """Go on until `done`; an order that is refused is sent again with its key until it is accepted."""
        client = self.customer.client
        while not done.is_set():
            key = {"Idempotency-Key": uuid4().hex}
            body = {"items": [{"product_id": product, "quantity": 1}], "payment_method": "tok_ok"}
            while (answer := await client.post("/api/v1/orders", json=body, headers=key)).status_code != 202:
                self.refused.add(answer.json()["code"])
                await asyncio.sleep(0.2)
            self.orders.append(answer.json()["id"])
            for _ in range(6):
                await self._look(self.orders[-1])
                await asyncio.sleep(0.25)

    async def was_refused(self) -> bool:
        """Return whether an order had to be sent again."""
        return bool(self.refused)

    async def _look(self, newest: str) -> None:
        """Read what was just promised, over any instance."""
        client = self.customer.client
        order, own, listed = await asyncio.gather(
            client.get(f"/api/v1/orders/{newest}"),
            client.get("/api/v1/profiles/me"),
            client.get("/api/v1/orders", params={"limit": 1}),
        )
        self.wrong += [answer.text for answer in (order, own, listed) if answer.status_code != 200]
        if listed.status_code == 200 and listed.json()["items"][0]["id"] != newest:
            self.wrong.append(f"{newest} is not in the list")


async def move(sharded: Cluster, deaths: Path) -> int:
    """Run the mover, which dies where `deaths` says, and return its exit code."""
    environment = sharded.environment | {"REQUEST_DEADLINE": "2", "PYTHONPATH": str(SCRIPT.parents[1])}
    process = await asyncio.create_subprocess_exec(
        sys.executable, SCRIPT, deaths, *map(str, MOVED), "0", env=environment, stdout=asyncio.subprocess.DEVNULL
    )
    return await process.wait()


async def sold_more(shoppers: list[Shopper]) -> None:
    """Wait until each of them has had an order accepted that is sent from now on."""
    before = [len(shopper.orders) + 1 for shopper in shoppers]

    async def more() -> bool:
        return all(len(shopper.orders) > sold for shopper, sold in zip(shoppers, before, strict=True))

    await until(more, seconds=2 * PATIENCE)


@pytest.mark.sabotage(
    path="app/scaling/mover.py",
    take_out="        while await self._catch_up(ends):\n",
    put="        while False:\n",
)
@pytest.mark.sabotage(
    path="migrations/fence.py",
    take_out="      INSERT INTO shard_changes (profile_id) VALUES (owner);\n",
    put="      NULL;\n",
)
async def test_a_mover_that_is_killed_again_and_again_loses_and_doubles_nothing_while_people_shop(
    sharded: Cluster, people: list[Customer], tmp_path: Path
) -> None:
    products = (await people[0].client.get("/api/v1/products", params={"limit": 1})).raise_for_status().json()
    product = products["items"][0]["id"]
    of_range = (
        "SELECT count(*) FROM profiles WHERE (get_byte(uuid_send(profile_id), 6) & 15) * 64 "
        "+ get_byte(uuid_send(profile_id), 7) / 4 BETWEEN $1 AND $2"
    )
    there = await count(sharded, PRIMARIES[1], of_range, *MOVED)
    shoppers = [Shopper(customer) for customer in people]
    moved, others = shoppers[2], [shopper for shopper in shoppers if shopper is not shoppers[2]]
    done = asyncio.Event()
    async with asyncio.TaskGroup() as shopping:  # of which nobody goes on when it fails
        for shopper in shoppers:
            shopping.create_task(shopper.shop(product, done))
        for point in DEATHS:
            (tmp_path / point).touch()
            assert await move(sharded, tmp_path) == -signal.SIGKILL, f"it came past: {point}"
            if point == HANDED_OVER:  # and not written down: nobody takes writes of the range until the next run
                await until(moved.was_refused, seconds=2 * PATIENCE)
                await sold_more(others)
            else:
                await sold_more(shoppers)
        assert await move(sharded, tmp_path) == 0
        await sold_more(shoppers)
        done.set()
    assert [shopper.wrong for shopper in shoppers] == [[]] * QUARTERS
    assert [shopper.refused for shopper in others] == [set()] * len(others)
    assert moved.refused == {"shard_moving"}

    await everything_is_done(sharded)
    for shopper, shard in zip(shoppers, (0, 0, 0, 1), strict=True):
        customer, owner = shopper.customer, UUID(shopper.customer.profile["id"])
        ended = [await customer.ended(order) for order in shopper.orders]
        confirmed = [order["id"] for order in ended if order["status"] == "confirmed"]
        for node, here in zip(PRIMARIES, (1 - shard, shard), strict=True):
            orders = await count(sharded, node, "SELECT count(*) FROM orders WHERE profile_id = $1", owner)
            assert orders == here * len(shopper.orders)
            paid = "SELECT count(*) FROM payment_attempts WHERE profile_id = $1 AND state = 'captured'"
            assert await count(sharded, node, paid, owner) == here * len(confirmed)
            sessions = await count(sharded, node, "SELECT count(*) FROM sessions WHERE profile_id = $1", owner)
            assert sessions == here
    assert await count(sharded, PRIMARIES[0], of_range, *MOVED) == there
    assert await count(sharded, PRIMARIES[1], of_range, *MOVED) == 0


async def everything_is_done(sharded: Cluster) -> None:
    """Wait until no message waits on any shard, as long as any is done meanwhile."""

    async def sum_of(what: str) -> int:
        statement = f"SELECT count(*) FROM outbox WHERE {what}"  # noqa: S608  # our own words
        return sum([await count(sharded, node, statement) for node in PRIMARIES])

    async def none_waits() -> bool:
        return await sum_of("done_at IS NULL") == 0

    # A task that met the fence comes again by its row, four times `WORKER_STALE_AFTER` later at the latest.
    await as_long_as_it_goes_on(none_waits, partial(sum_of, "done_at IS NOT NULL"), 2 * PATIENCE)
