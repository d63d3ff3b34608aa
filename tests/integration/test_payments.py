"""The provider fails in every way it can: an order is charged once or not at all, and both ledgers agree."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import httpx
import pytest
from sagas import Shop
from sqlalchemy import delete, update

from app.core.telemetry import PAYMENT_DIFFERENCES
from app.domain.orders.rules import Order, Step
from app.domain.payments.attempts import payment_attempts
from app.domain.payments.reconciliation import Comparison, reconcile
from app.domain.payments.rules import State
from workers.task import Outcome

pytest_plugins = ("sagas",)


@pytest.fixture
async def shop(shop: Shop) -> Shop:
    async with shop.apart.resources.database.writer() as writer:
        await writer.run(delete(payment_attempts))
    return shop


@asynccontextmanager
async def provider(shop: Shop, mode: str) -> AsyncIterator[None]:
    """Have the provider in a mode inside the block."""
    async with httpx.AsyncClient(base_url=shop.apart.settings.payments.url) as client:
        (await client.post("/mode", json={"mode": mode})).raise_for_status()
        try:
            yield
        finally:
            (await client.post("/mode", json={"mode": "ok"})).raise_for_status()


async def compared(shop: Shop) -> Comparison:
    """Compare everything there is, also what has moved just now."""
    return await reconcile(shop.apart.resources.database, shop.apart.resources.payments, on_its_way=timedelta(0))


async def check_paid_once(shop: Shop, order: Order) -> None:
    (entry,) = await shop.ledger(order)
    assert (entry["charges"], entry["status"], entry["captured"]) == (1, "captured", order.amount)
    attempt = await shop.attempt(order)
    assert attempt is not None
    assert attempt.state is State.CAPTURED
    assert (await shop.now(order)).step is Step.CONFIRMED


async def run_only(shop: Shop) -> Outcome:
    (message,) = await shop.due()
    return await shop.run(message, "orders.authorise_payment")


@pytest.mark.sabotage("workers/tasks/orders.py", "        await resources.orders.payment_waits(order)\n", "")
async def test_while_the_provider_is_down_orders_are_pending_at_once_and_charged_once_later(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = [await shop.order(1) for _ in range(3)]
    await shop.step()
    outbound = shop.apart.resources.payments.outbound
    # However long a busy machine takes for what follows: it probes when this test says so.
    monkeypatch.setattr(outbound.breaker, "_reset_after", 3600.0)
    async with provider(shop, "down"):
        while outbound.breaker.state != "open":
            for message in await shop.due():
                await shop.run(message, "orders.authorise_payment")
        asked = outbound.breaker._states.fail_counter
        late = await shop.order(1)
        for message in await shop.due():
            if message.event == "order.placed":
                await shop.run(message, "orders.reserve_stock")
        for message in await shop.due():
            assert await shop.run(message, "orders.authorise_payment") is Outcome.DEFERRED
        assert outbound.breaker._states.fail_counter == asked, "an open breaker asks nobody"
        assert {(await shop.now(order)).status for order in (*orders, late)} == {"payment_pending"}
    outbound.breaker._probe_at = 0.0
    await shop.drain()
    for order in (*orders, late):
        await check_paid_once(shop, order)
    assert (await compared(shop)).differences == ()


@pytest.mark.sabotage(
    "app/domain/payments/service.py", "key=str(attempt.id), body=body", 'key=f"{attempt.id}-{id(body)}", body=body'
)
@pytest.mark.parametrize("method", ["tok_lost", "tok_flaky", "tok_ok"])
async def test_a_worker_that_dies_between_charge_and_record_does_not_charge_again(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    order = await shop.order(1, method=method)
    await shop.step()

    async def die(*_arguments: Any) -> None:
        monkeypatch.undo()
        raise ConnectionResetError

    monkeypatch.setattr(shop.apart.resources.orders, "payment_authorised", die)
    assert await run_only(shop) is Outcome.DEFERRED
    await shop.drain()
    await check_paid_once(shop, order)


async def test_what_the_provider_refuses_as_a_request_ends_as_declined(shop: Shop) -> None:
    order = await shop.order(10, amount=99_999_999)
    await shop.drain()
    ended = await shop.now(order)
    assert (ended.status, ended.reason) == ("rejected", "payment_declined")
    assert await shop.free(order) == [10]
    assert (await compared(shop)).differences == ()


@pytest.mark.sabotage("app/domain/payments/rules.py", "if status not in expected:", "if held is None:")
async def test_the_comparison_names_what_moved_behind_our_back(shop: Shop) -> None:
    kept, refunded, forgotten = [await shop.order(2) for _ in range(3)]
    cancelled, declined = await shop.order(1), await shop.order(1, method="tok_declined")
    await shop.drain()
    await shop.apart.resources.orders.cancel(cancelled.profile_id, cancelled.id)
    await shop.drain()
    agreed = await compared(shop)
    assert (agreed.compared, agreed.differences) == (5, ())
    (entry,) = await shop.ledger(refunded)
    async with httpx.AsyncClient(base_url=shop.apart.settings.payments.url) as client:
        answer = await client.post(f"/authorizations/{entry['id']}/refund", headers={"Idempotency-Key": entry["id"]})
        answer.raise_for_status()
    async with shop.apart.resources.database.writer() as writer:
        for order, changes in ((forgotten, {"state": State.PENDING, "provider_id": None}), (kept, {"amount": 1})):
            await writer.run(update(payment_attempts).where(payment_attempts.c.order_id == order.id).values(**changes))
    found = {each.attempt.order_id: each.words for each in (await compared(shop)).differences}
    assert found == {
        refunded.id: "we have captured, the provider refunded",
        forgotten.id: "we have pending, the provider captured",
        kept.id: "amount 1 here, 2500 there",
    }
    assert PAYMENT_DIFFERENCES._value.get() == 3
    assert declined.id not in found


async def test_what_has_just_moved_is_left_for_the_next_time(shop: Shop) -> None:
    await shop.order(1)
    await shop.drain()
    recent = await reconcile(shop.apart.resources.database, shop.apart.resources.payments)
    assert recent.compared == 0
