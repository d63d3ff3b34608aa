"""Mails about orders: confirmed, with the invoice attached, and cancelled; sent once as far as SMTP can tell.

A send log keeps a repeated task from sending again. Between the server's answer and the log's commit a crash can still
repeat a mail: no protocol of SMTP closes that gap. The Message-ID is derived from the order, so the copy can be
recognised as one.
"""

from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime, parseaddr
from enum import StrEnum
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import UUID

import aiosmtplib
from sqlalchemy import Row, select

from app.core.errors import Conflict, Unavailable
from app.core.settings import MailSettings
from app.domain.orders.invoice import money
from app.domain.orders.invoicing import Invoices
from app.domain.orders.rules import Order
from app.domain.orders.tables import mails
from app.domain.profiles.tables import profiles
from app.scaling.database import Database, Writer
from app.scaling.dialect import insert_ignore
from app.scaling.outbound import Outbound

FOR_GOOD = 500  # an SMTP reply from here on does not change by asking again


class Kind(StrEnum):
    """What a mail is about; of each an order has one."""

    CONFIRMATION = "order_confirmation"
    CANCELLATION = "order_cancellation"


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

    async def order_confirmation(self, order: Order) -> bool:
        """Send the confirmation with the invoice, unless the send log has it or the customer's data are erased.

        Returns whether it was sent.

        Raises:
            Unavailable: `mail_down`, if the server does not take it; repeat later.
            Conflict: `mail_refused`, if it never will.
        """
        customer = await self._waiting(order, Kind.CONFIRMATION)
        if customer is None:
            return False
        message = self._compose(
            order,
            customer,
            Kind.CONFIRMATION,
            subject=f"Your order {order.id} is confirmed",
            opening="thank you for your order. It is confirmed and on its way:",
            closing=f"Total: {_money(order)}, tax included. The invoice is attached.",
        )
        pdf = await self._invoices.pdf(order)
        message.add_attachment(pdf, maintype="application", subtype="pdf", filename=f"invoice-{order.id}.pdf")
        await self._deliver(message)
        return True

    async def order_cancellation(self, order: Order) -> bool:
        """Tell that the order is cancelled, unless the send log has it or the customer's data are erased.

        Returns whether it was sent.

        Raises:
            Unavailable: `mail_down`, if the server does not take it; repeat later.
            Conflict: `mail_refused`, if it never will.
        """
        customer = await self._waiting(order, Kind.CANCELLATION)
        if customer is None:
            return False
        message = self._compose(
            order,
            customer,
            Kind.CANCELLATION,
            subject=f"Your order {order.id} is cancelled",
            opening="as you asked, this order is cancelled:",
            closing=f"You owe nothing. Of {_money(order)} nothing is held, and what was paid is refunded.",
        )
        await self._deliver(message)
        return True

    async def _waiting(self, order: Order, kind: Kind) -> Row[Any] | None:
        """Return address and name of the customer if the mail is still to be sent."""
        reader = self._database.reader(order.profile_id)
        known = await reader.first(
            select(mails.c.sent_at).where(
                mails.c.profile_id == order.profile_id, mails.c.order_id == order.id, mails.c.kind == kind
            )
        )
        if known is not None:
            return None
        return await reader.first(
            select(profiles.c.email, profiles.c.name).where(
                profiles.c.profile_id == order.profile_id, profiles.c.erased_at.is_(None)
            )
        )

    async def _deliver(self, message: EmailMessage) -> None:
        try:
            refusal = await self.outbound.call(lambda: self._attempt(message))
        except (aiosmtplib.SMTPException, OSError, TimeoutError) as error:
            # The chain would carry the customer's address into the log.
            raise Unavailable(
                f"The mail server does not take mails: {type(error).__name__}.", code="mail_down"
            ) from None
        if refusal is not None:
            raise Conflict(f"The mail server refuses this mail for good: {refusal}.", code="mail_refused")

    async def _attempt(self, message: EmailMessage) -> int | None:
        """Send the mail; return the code of a refusal for good, which is an answer and no illness of the server."""
        try:
            await self._send(message)
        except aiosmtplib.SMTPRecipientsRefused as error:
            code = min(refused.code for refused in error.recipients)
        except aiosmtplib.SMTPResponseException as error:
            code = error.code
        else:
            return None
        if code < FOR_GOOD:
            raise aiosmtplib.SMTPException(f"refused for now: {code}")
        return code

    async def sent(self, writer: Writer, order: Order, kind: Kind) -> None:
        """Note in the send log that the mail is sent."""
        await writer.run(
            insert_ignore(mails).values(
                profile_id=order.profile_id, order_id=order.id, kind=kind, sent_at=datetime.now(UTC)
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

    def _compose(
        self, order: Order, customer: Row[Any], kind: Kind, *, subject: str, opening: str, closing: str
    ) -> EmailMessage:
        message = EmailMessage()
        message["From"] = self._settings.sender
        message["To"] = customer.email
        message["Subject"] = subject
        message["Message-ID"] = message_id(order.id, kind, self._settings.sender)
        message["Date"] = format_datetime(datetime.now(UTC))
        lines = "\n".join(f"  {line.quantity} x {line.name} ({line.sku})" for line in order.lines)
        message.set_content(f"Hello {customer.name},\n\n{opening}\n\n{lines}\n\n{closing}\n\nOrder {order.id}\n")
        return message


def message_id(order_id: UUID, kind: Kind, sender: str) -> str:
    """Return the Message-ID of an order's mail of this kind, the same whenever it is sent."""
    domain = parseaddr(sender)[1].rpartition("@")[2]
    return f"<{kind}.{order_id}@{domain}>"


def _money(order: Order) -> str:
    return f"{money(order.amount, order.currency)} {order.currency}"
