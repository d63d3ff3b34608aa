"""What follows an order's end, each task by itself and each once: the invoice, the mails, the read models.

Repeating one is harmless: the invoice has its number and its key from the order, the mail a send log and a Message-ID,
the read models a row for each line of the order.
"""

from app.domain.orders.mail import Kind
from app.domain.orders.rules import Order, Step
from app.wiring import Resources
from workers.task import Delivery, once, task
from workers.tasks.saga import saga_task, sold_in

CONFIRMED = frozenset({Step.CONFIRMED})
# Rendering takes well under a second; the rest is for an object storage that is slow.
INVOICE_SECONDS = 20.0
# A few thousand invoices at 20 ms each; what is not done then is done by the next delivery, over again.
FORGET_SECONDS = 120.0
# One conversation with a mail server at its timeout of 10 s, and reading the invoice.
MAIL_SECONDS = 20.0
# One transaction of the catalog, with a few hundred statements for the largest order.
RECORD_SECONDS = 15.0


@saga_task("invoices.issue", acts_on=CONFIRMED, seconds=INVOICE_SECONDS)
async def issue_invoice(resources: Resources, delivery: Delivery, order: Order) -> None:
    """Store the invoice under the order's key and link it; the confirmation mail follows from that."""
    stored = await resources.invoices.issue(order)
    async with once(resources, delivery) as writer:
        await resources.invoices.keep(writer, order, stored)
        await resources.orders.invoiced(writer, order, stored.key)


@task("invoices.forget_buyer", seconds=FORGET_SECONDS)
async def forget_buyer(resources: Resources, delivery: Delivery) -> None:
    """Issue the invoices of an erased profile again, under their numbers and keys, without its name and address."""
    for order in await resources.orders.invoiced_orders(delivery.message.profile_id):
        await resources.invoices.issue(order)
    async with once(resources, delivery):
        pass


@saga_task("emails.confirm_order", acts_on=CONFIRMED, seconds=MAIL_SECONDS)
async def confirm_order(resources: Resources, delivery: Delivery, order: Order) -> None:
    """Send the confirmation with the invoice attached."""
    sent = await resources.mail.order_confirmation(order)
    async with once(resources, delivery) as writer:
        if sent:
            await resources.mail.sent(writer, order, Kind.CONFIRMATION)


@saga_task("emails.confirm_cancellation", acts_on=frozenset({Step.CANCELLED}), seconds=MAIL_SECONDS)
async def confirm_cancellation(resources: Resources, delivery: Delivery, order: Order) -> None:
    """Tell the customer that the order is cancelled and nothing is owed."""
    sent = await resources.mail.order_cancellation(order)
    async with once(resources, delivery) as writer:
        if sent:
            await resources.mail.sent(writer, order, Kind.CANCELLATION)


@saga_task("reports.record_sale", acts_on=CONFIRMED, seconds=RECORD_SECONDS)
async def record_sale(resources: Resources, delivery: Delivery, order: Order) -> None:
    """Count the order in the sales of the day on which it was placed."""
    await resources.reports.record_sale(order.id, order.created_at, order.currency, sold_in(order))
    async with once(resources, delivery):
        pass
