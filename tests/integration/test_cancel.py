"""A customer may cancel at any moment, also between a step's effect and its record: everything is given back, once."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from sagas import STOCK, Shop
from sqlalchemy import update

from app.core.errors import Conflict, NotFound
from app.core.ids import new_id
from app.domain.orders.rules import CANCELLABLE, Order, Step
from app.domain.orders.tables import orders
from app.domain.payments.rules import State

pytest_plugins = ("sagas",)

SAGA = 6  # rounds of messages after which nothing is left to do


async def cancel(shop: Shop, order: Order) -> dict[str, Any]:
    return await shop.apart.resources.orders.cancel(order.profile_id, order.id)


async def check_undone(shop: Shop, order: Order) -> None:
    """Expect that nothing is left of the order but that it was there."""
    ended = await shop.now(order)
    assert (ended.step, ended.history[-1][0]) == (Step.CANCELLED, "cancelled")
    assert await shop.free(order) == [STOCK] * len(order.lines)
    assert await shop.counted(order) == (0, 0)
    attempt, entries = await shop.attempt(order), await shop.ledger(order)
    assert len(entries) <= 1, "asked for under one key only"
    for entry in entries:
        assert entry["status"] in {"declined", "voided", "refunded"}
        assert entry["captured"] == entry["refunded"]
        assert attempt is not None
        assert attempt.state == entry["status"]
    assert await shop.apart.dead_letters() == []
    assert (await shop.mails(order)).count("order_cancellation") == 1


@pytest.mark.parametrize("steps", range(SAGA))
async def test_an_order_is_cancelled_after_any_step_and_everything_is_given_back(shop: Shop, steps: int) -> None:
    order = await shop.order(2, 3)
    for _ in range(steps):
        await shop.step()
    assert (await cancel(shop, order))["status"] == "processing"
    assert (await cancel(shop, order))["status"] == "processing", "asked again it is the same"
    await shop.drain()
    await check_undone(shop, order)
    assert (await cancel(shop, order))["status"] == "cancelled"


EFFECTS = [
    ("catalog", "reserve"),
    ("payments", "authorise"),
    ("payments", "capture"),
    ("invoices", "issue"),
    ("catalog", "dispatch"),
    ("reports", "record_sale"),
]


@pytest.mark.sabotage("app/domain/catalog/service.py", "if await self._claim(writer, order_id):", "if False:")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("service", "effect"), EFFECTS)
async def test_a_cancellation_that_overtakes_a_step_in_its_middle_leaves_nothing_behind(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, service: str, effect: str, when: str
) -> None:
    order = await shop.order(2, 3)
    room = getattr(shop.apart.resources, service)
    original: Callable[..., Awaitable[Any]] = getattr(room, effect)

    async def overtaken(*arguments: Any) -> Any:
        monkeypatch.undo()
        if when == "after":
            answer = await original(*arguments)
        await cancel(shop, order)
        await shop.drain()
        assert (await shop.now(order)).step is Step.CANCELLED
        return answer if when == "after" else await original(*arguments)

    monkeypatch.setattr(room, effect, overtaken)
    await shop.drain()
    assert getattr(room, effect) == original, "the step was never reached"
    await check_undone(shop, order)


@pytest.mark.parametrize("method", ["tok_lost", "tok_flaky", "tok_declined"])
async def test_what_the_provider_never_answered_is_given_back_too(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    order = await shop.order(1, method=method)
    await shop.step()
    payments = shop.apart.resources.payments

    async def ask_and_die(attempt: Any) -> Any:
        # The request goes out; the process does not live to hear the answer.
        monkeypatch.undo()
        body = {
            "amount": attempt.amount,
            "currency": attempt.currency,
            "payment_method": attempt.method,
            "reference": str(attempt.order_id),
        }
        async with httpx.AsyncClient(base_url=shop.apart.settings.payments.url) as client:
            with suppress(httpx.TransportError):
                await client.post("/authorizations", json=body, headers={"Idempotency-Key": str(attempt.id)})
        raise ConnectionResetError

    monkeypatch.setattr(payments, "authorise", ask_and_die)
    await shop.step()
    attempt = await shop.attempt(order)
    assert attempt is not None
    assert attempt.state is State.PENDING
    await cancel(shop, order)
    await shop.drain()
    await check_undone(shop, order)


async def test_what_costs_nothing_is_ordered_and_cancelled_without_the_provider(shop: Shop) -> None:
    order = await shop.order(1, amount=0)
    await shop.drain()
    assert (await shop.now(order)).step is Step.CONFIRMED
    await cancel(shop, order)
    await shop.drain()
    await check_undone(shop, order)
    assert await shop.ledger(order) == []


async def test_a_rejected_order_a_packed_one_and_somebody_elses_cannot_be_cancelled(shop: Shop) -> None:
    rejected, packed = await shop.order(1, method="tok_declined"), await shop.order(1)
    await shop.drain()
    long_ago = (datetime.now(UTC) - CANCELLABLE - timedelta(seconds=1)).isoformat()
    async with shop.apart.resources.database.writer() as writer:
        await writer.run(update(orders).where(orders.c.id == packed.id).values(history=[["confirmed", long_ago]]))
    for order in (rejected, packed):
        with pytest.raises(Conflict) as refusal:
            await cancel(shop, order)
        assert refusal.value.code == "not_cancellable"
    with pytest.raises(NotFound):
        await shop.apart.resources.orders.cancel(new_id(), packed.id)
    assert await shop.due() == []
