"""The saga's steps: stock, money and the warehouse, forwards and back.

Each is the domain's work and one transaction of ours. What goes out (the catalog's own transaction, the provider's
ledger) is keyed by the order or by its payment attempt, so that doing it again changes nothing.
"""

from app.core.errors import Unavailable
from app.domain.catalog.rules import Reserved, Wanted
from app.domain.orders.rules import Order, Step
from app.domain.payments.rules import Authorised, State
from app.wiring import Resources
from workers.task import Delivery, once
from workers.tasks.saga import saga_task, sold_in

# A transaction of the catalog and one of the shard, each of which may wait 3 s for a lock.
STOCK_SECONDS = 10.0
# Two tries of the provider at its own timeout of 8 s.
PAYMENT_SECONDS = 20.0


@saga_task("orders.reserve_stock", acts_on=frozenset({Step.PLACED}), seconds=STOCK_SECONDS)
async def reserve_stock(resources: Resources, delivery: Delivery, order: Order) -> None:
    """Set the order's lines aside, or reject the order."""
    wanted = [Wanted(line.product_id, line.quantity) for line in order.lines]
    outcome = await resources.catalog.reserve(order.id, wanted, await resources.orders.place_of(order))
    async with once(resources, delivery) as writer:
        if isinstance(outcome, Reserved):
            await resources.orders.stock_reserved(writer, order)
        else:
            await resources.orders.out_of_stock(writer, order)


@saga_task(
    "orders.authorise_payment", acts_on=frozenset({Step.RESERVED, Step.PAYMENT_PENDING}), seconds=PAYMENT_SECONDS
)
async def authorise_payment(resources: Resources, delivery: Delivery, order: Order) -> None:
    """Have the provider hold the money. While it does not answer, the customer sees that the payment is pending."""
    attempt = await resources.orders.attempt(order)
    try:
        answer = await resources.payments.authorise(attempt)
    except Unavailable:
        await resources.orders.payment_waits(order)
        raise
    async with once(resources, delivery) as writer:
        if isinstance(answer, Authorised):
            await resources.orders.payment_authorised(writer, order, attempt, answer)
        else:
            await resources.orders.payment_declined(writer, order, attempt, answer)


@saga_task("orders.release_stock", acts_on=frozenset({Step.DECLINED}), seconds=STOCK_SECONDS)
async def release_stock(resources: Resources, delivery: Delivery, order: Order) -> None:
    """Put the stock of a declined order back; with that the order is rejected."""
    await resources.catalog.release(order.id)
    async with once(resources, delivery) as writer:
        await resources.orders.stock_released(writer, order)


@saga_task("orders.undo", acts_on=frozenset({Step.CANCELLING}), seconds=PAYMENT_SECONDS)
async def undo(resources: Resources, delivery: Delivery, order: Order) -> None:
    """Give back what a cancelled order has taken: stock, its place in the sales, and the money last.

    Stock first, because a provider that is down must not keep pieces from the next customer.
    """
    await resources.catalog.release(order.id)
    if order.confirmed_at is not None:
        await resources.reports.take_back(order.id, order.created_at, order.currency, sold_in(order))
    attempt = await resources.orders.attempt_if_any(order)
    money = await resources.payments.undo(attempt) if attempt else None
    async with once(resources, delivery) as writer:
        await resources.orders.undone(writer, order, attempt, money)


@saga_task("orders.capture_payment", acts_on=frozenset({Step.CONFIRMED}), seconds=PAYMENT_SECONDS)
async def capture_payment(resources: Resources, delivery: Delivery, order: Order) -> None:
    """Take the money that is held."""
    attempt = await resources.orders.attempt(order)
    captured = attempt.state is State.AUTHORISED and await resources.payments.capture(attempt)
    async with once(resources, delivery) as writer:
        if captured:
            await resources.orders.payment_captured(writer, attempt)


@saga_task("orders.notify_warehouse", acts_on=frozenset({Step.CONFIRMED}), seconds=STOCK_SECONDS)
async def notify_warehouse(resources: Resources, delivery: Delivery, order: Order) -> None:
    """Put the order on the pick list of the nearest warehouse that has it."""
    await resources.catalog.dispatch(order.id)
    async with once(resources, delivery):
        pass
