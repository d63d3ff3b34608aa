"""kill -9 before and after each effect of the saga, in the relay, and a flushed Redis: every order still comes right.

`CRASH_ORDERS=200` makes a longer run, `CRASH_SEED=9` other deaths; `make test-failure` does both, with others each
time. A run that fails prints its seed, and everything that is known of the order that went wrong.
"""

import asyncio
import json
import os
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from uuid import UUID

import pytest
from apart import apart_from
from books import (
    Processes,
    as_long_as_it_goes_on,
    check_books,
    check_orders,
    made,
    open_messages,
    place,
    tasks_done,
    told,
    unsettled,
)
from conftest import PATIENCE
from crashing import EFFECTS, POINTS
from sagas import Shop
from sqlalchemy import select

from app.domain.orders.mail import Kind
from app.domain.orders.rules import Step
from app.domain.orders.tables import orders
from deploy.local.cluster import Cluster

ORDERS = int(os.environ.get("CRASH_ORDERS", "30"))
SEED = int(os.environ.get("CRASH_SEED", "7"))
LONG = 3 * PATIENCE  # seconds without a task done or a death: what was lost comes again after 5, 10, 20 … s
SCARCE = 3  # pieces of a product that more want
PIECES = 100_000
# Points that only an order meets whose customer cancels it once it is confirmed.
UNDOING = {point for point in POINTS if point.startswith(("payments.undo", "reports.take_back", "mail.order_cancel"))}


@pytest.fixture
async def shop(cluster: Cluster) -> AsyncIterator[Shop]:
    async with apart_from(cluster) as apart:
        yield await Shop(apart, cluster).open()


@pytest.mark.sabotage(
    "app/scaling/outbox.py", ".values(due_at=now + lease, tries=outbox.c.tries + 1)", ".values(due_at=None, tries=1)"
)
async def test_every_order_comes_right_whatever_is_killed_wherever(shop: Shop, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    plenty, scarce = await made(shop, PIECES), await made(shop, SCARCE)
    customers = [await shop.customer() for _ in range(3)]
    methods = ["tok_ok"] * 6 + ["tok_lost", "tok_flaky", "tok_declined", "tok_declined"]
    placed = []
    for number in range(ORDERS):
        product = scarce if number < 2 * SCARCE else plenty
        method = "tok_ok" if product is scarce else methods[number % len(methods)]
        placed.append(await place(shop, chance.choice(customers), product, method))
    declined = [order for order in placed if order.payment_method == "tok_declined"]
    paid = [order for order in placed[2 * SCARCE :] if order.payment_method != "tok_declined"]
    regretted = chance.sample(paid, len(paid) // 4)
    kept = [order for order in paid if order not in regretted]

    def deaths(point: str) -> list[str]:
        which = declined if point.startswith("catalog.release") else regretted if point in UNDOING else kept
        return [str(order.id) for order in chance.sample(which, max(1, ORDERS // 40))]

    plan = {point: deaths(point) for point in POINTS}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    crashing = [sys.executable, str(Path(__file__).with_name("crashing.py"))]
    commands = {kind: [*crashing, kind, str(tmp_path)] for kind in ("worker", "relay")}
    processes = Processes(shop.apart.environment, tmp_path, commands)
    to_cancel, flushed = {order.id: order for order in regretted}, False

    async def settled() -> bool:
        nonlocal flushed
        processes.keep_up()
        for order_id in await confirmed(shop, to_cancel):
            await shop.apart.resources.orders.cancel(to_cancel[order_id].profile_id, order_id)
            del to_cancel[order_id]
        if not flushed and deaths_in(tmp_path).total() > len(POINTS) // 3:
            await shop.apart.broker.flushdb()
            flushed = True
        return not to_cancel and not await open_messages(shop)

    async def progress() -> int:
        return deaths_in(tmp_path).total() + await tasks_done(shop)

    try:
        await as_long_as_it_goes_on(settled, progress, LONG)
    except TimeoutError:
        pytest.fail(f"seed {SEED}: not settled after {deaths_in(tmp_path)}\n{await unsettled(shop, placed)}")
    finally:
        await asyncio.to_thread(processes.end)
    assert flushed
    assert deaths_in(tmp_path) == {point.replace(" ", "-"): len(those) for point, those in plan.items()}, SEED
    repeated = {f"{kind}.{order}" for kind in Kind for order in plan[f"mail.{kind} after"]}
    sold = await check_orders(shop, placed, repeated)
    assert sold == Counter({scarce.id: SCARCE, plenty.id: len(kept)})
    await check_books(shop, {scarce.id: 0, plenty.id: PIECES - len(kept)}, sold.total(), len(regretted))


@pytest.mark.sabotage("tests/failure/books.py", '{await told(shop, order)}") from error', '") from error')
async def test_a_check_that_fails_tells_the_whole_history_of_the_order(shop: Shop) -> None:
    product, customer = await made(shop, PIECES), await shop.customer()
    order = await place(shop, customer, product, "tok_ok")
    with pytest.raises(AssertionError) as failure:  # nobody works on it, so it is at no end
        await check_orders(shop, [order], set())
    for fact in (
        "order: ",
        "processing",
        "order.placed",
        "receipts: none",
        "payments: none",
        "ledger: none",
        "mails: none",
        str(order.id),
    ):
        assert fact in str(failure.value)


@pytest.mark.sabotage("tests/failure/books.py", '        "payments": payments,\n', "")
@pytest.mark.sabotage("tests/failure/books.py", '        "ledger": await shop.ledger(order),\n', "")
async def test_what_is_told_of_an_order_shows_its_refund_here_and_at_the_provider(shop: Shop) -> None:
    order = await shop.order(1)
    await shop.drain()
    await shop.apart.resources.orders.cancel(order.profile_id, order.id)
    await shop.drain()
    facts = dict(line.split(": ", 1) for line in (await told(shop, order)).splitlines())
    assert "'refunded'" in facts["payments"]
    assert f"'refunded': {order.amount}" in facts["ledger"]


async def confirmed(shop: Shop, those: Collection[UUID]) -> list[UUID]:
    """Return which of the orders with these ids are confirmed."""
    async with shop.apart.resources.database.writer() as writer:
        is_confirmed = (orders.c.step == Step.CONFIRMED) & orders.c.id.in_(those)
        return [row.id for row in await writer.all(select(orders.c.id).where(is_confirmed))]


def deaths_in(folder: Path) -> Counter[str]:
    """Return how many processes have died at each point."""
    return Counter(path.name.removeprefix("died-").rsplit("-", 5)[0] for path in folder.glob("died-*"))


def test_every_effect_outside_has_its_two_points() -> None:
    assert {point.partition(" ")[0] for point in POINTS} >= set(EFFECTS)
    assert len(POINTS) == 2 * len(EFFECTS) + 3
