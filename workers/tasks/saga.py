"""What all tasks of an order's saga have in common: they load the order and look where it is before they act.

A task that comes again after a crash between its effect and its receipt, or that was overtaken by a cancellation,
finds the order further on and only leaves its receipt.
"""

from collections.abc import Awaitable, Callable

from app.core.errors import Unavailable
from app.domain.orders.rules import Order, Step
from app.domain.reports.service import Sold
from app.wiring import Resources
from workers.task import Delivery, Task, once

SagaHandler = Callable[[Resources, Delivery, Order], Awaitable[None]]

_COURSE = tuple(Step)  # in the order in which a saga passes them


def saga_task(name: str, *, acts_on: frozenset[Step], seconds: float) -> Callable[[SagaHandler], Task]:
    """Make a task of a handler that acts on an order.

    Args:
        name: the task's name.
        acts_on: the steps in which there is something to do for it.
        seconds: its time limit.
    """
    earliest = min(_COURSE.index(step) for step in acts_on)

    def make(handler: SagaHandler) -> Task:
        async def act(resources: Resources, delivery: Delivery) -> None:
            order = await resources.orders.load(delivery.message.profile_id, delivery.message.subject_id)
            if order.step in acts_on:
                await handler(resources, delivery, order)
            elif _COURSE.index(order.step) < earliest:
                # The message is about a commit that this read did not see; after a failover that can be.
                raise Unavailable("The order is not that far yet.", code="order_behind")
            else:
                async with once(resources, delivery):
                    pass

        return Task(name, seconds, act)

    return make


def sold_in(order: Order) -> list[Sold]:
    """Return an order's lines as the sales count them."""
    return [Sold(line.product_id, line.quantity, line.amount) for line in order.lines]
