"""The confirmation mail: the invoice attached, sent once as far as SMTP can tell.

A send log keeps a repeated task from sending again. Between the server's answer and the log's commit a crash can still
repeat a mail: no protocol of SMTP closes that gap. The Message-ID is derived from the order, so the copy can be
recognised as one.
"""

from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime, parseaddr
from urllib.parse import unquote, urlsplit
from uuid import UUID

import aiosmtplib
from sqlalchemy import select

from app.core.errors import Unavailable
from app.core.settings import MailSettings
from app.domain.orders.invoicing import Invoices
from app.domain.orders.rules import Order
from app.domain.orders.tables import mails
from app.domain.profiles.tables import profiles
from app.scaling.database import Database, Writer
from app.scaling.dialect import insert_ignore
from app.scaling.outbound import Outbound

CONFIRMATION = "order_confirmation"


class Mail:
    """Sends mails about orders.

    Args:
        settings: the mail server.
        database: knows the customers and keeps the send log.
        invoices: has the PDF.
    """

    def __init__(self, settings: MailSettings, database: Database, invoices: Invoices) -> None:
        self._settings = settings
        self._server = urlsplit(settings.url)
        self._database = database
        self._invoices = invoices
        self.outbound = Outbound(
            "smtp",
            timeout=settings.timeout,
            concurrency=4,
            waiting=32,
            failures=(aiosmtplib.SMTPException, OSError),
        )

    async def order_confirmation(self, order: Order) -> None:
        """Send the confirmation with the invoice, unless the send log has it or the customer's data are erased.

        Raises:
            Unavailable: `mail_down`, if the server does not take it; repeat later.
        """
        reader = self._database.reader(order.profile_id)
        known = await reader.first(
            select(mails.c.sent_at).where(
                mails.c.profile_id == order.profile_id, mails.c.order_id == order.id, mails.c.kind == CONFIRMATION
            )
        )
        customer = await reader.first(
            select(profiles.c.email, profiles.c.name).where(
                profiles.c.profile_id == order.profile_id, profiles.c.erased_at.is_(None)
            )
        )
        if known is not None or customer is None:
            return
        message = self._compose(order, customer.email, customer.name, await self._invoices.pdf(order))
        try:
            await self.outbound.call(lambda: self._send(message))
        except (aiosmtplib.SMTPException, OSError, TimeoutError) as error:
            raise Unavailable("The mail server does not take the mail.", code="mail_down") from error

    async def sent(self, writer: Writer, order: Order) -> None:
        """Note in the send log that the confirmation is sent."""
        await writer.run(
            insert_ignore(mails).values(
                profile_id=order.profile_id, order_id=order.id, kind=CONFIRMATION, sent_at=datetime.now(UTC)
            )
        )

    async def _send(self, message: EmailMessage) -> None:
        await aiosmtplib.send(
            message,
            hostname=self._server.hostname,
            port=self._server.port,
            username=unquote(self._server.username) if self._server.username else None,
            password=unquote(self._server.password) if self._server.password else None,
            use_tls=self._server.scheme == "smtps",
            timeout=self._settings.timeout,
        )

    def _compose(self, order: Order, address: str, name: str, pdf: bytes) -> EmailMessage:
        message = EmailMessage()
        message["From"] = self._settings.sender
        message["To"] = address
        message["Subject"] = f"Your order {order.id} is confirmed"
        message["Message-ID"] = message_id(order.id, self._settings.sender)
        message["Date"] = format_datetime(datetime.now(UTC))
        lines = "\n".join(f"  {line.quantity} x {line.name} ({line.sku})" for line in order.lines)
        whole, cents = divmod(order.amount, 100)
        message.set_content(
            f"Hello {name},\n\nthank you for your order. It is confirmed and on its way:\n\n{lines}\n\n"
            f"Total: {whole}.{cents:02d} {order.currency}, tax included. The invoice is attached.\n\n"
            f"Order {order.id}\n"
        )
        message.add_attachment(pdf, maintype="application", subtype="pdf", filename=f"invoice-{order.id}.pdf")
        return message


def message_id(order_id: UUID, sender: str) -> str:
    """Return the Message-ID of an order's confirmation, the same whenever it is sent."""
    domain = parseaddr(sender)[1].rpartition("@")[2]
    return f"<{CONFIRMATION}.{order_id}@{domain}>"
