"""An SMTP server for the local cluster that keeps every message and delivers none, with an HTTP listing to read them.

It stands for the mail provider that the service does not own, and can be told to misbehave (`POST /mode`). A message
that was answered with 250 is on the disk and survives a kill -9; the oldest go when there are more than it keeps.
"""

import asyncio
import contextlib
import email
import json
import re
import sqlite3
from collections.abc import AsyncIterator
from email.message import EmailMessage
from email.policy import default as modern
from typing import Any, AnyStr
from urllib.parse import quote

from aiosmtpd.smtp import SMTP, Envelope, Session
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from deploy.local.sandbox import (
    SLOW_SECONDS,
    Book,
    Mode,
    Refused,
    application,
    arguments,
    listen,
    log_to_stdout,
    now,
    serve,
)

MAX_MESSAGE_BYTES = 10 * 1024 * 1024
"""What common providers take at least (an invoice is under 100 KB); SMTP clients learn it from the SIZE extension."""

MAX_MESSAGES = 10_000
"""One mail for each seeded profile; at a usual 60 KB a mail with its invoice that is about 600 MB."""

SQLITE_MAX_ID = 2**63 - 1
"""SQLite's own bound; it refuses to look for more."""

RECEIPT = "250 2.6.0 Message kept"
UNAVAILABLE = "421 4.3.2 Service not available: try again later"
REJECTED = "550 5.1.1 Mailbox unavailable"

SCHEMA = """
CREATE TABLE IF NOT EXISTS messages (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    sender      TEXT NOT NULL,
    recipients  TEXT NOT NULL,
    subject     TEXT NOT NULL,
    message_id  TEXT NOT NULL,
    received_at TEXT NOT NULL,
    attachments TEXT NOT NULL,
    text        TEXT NOT NULL,
    raw         BLOB NOT NULL
);
"""


def keep(book: sqlite3.Connection, sender: str, recipients: list[str], raw: bytes) -> None:
    """Keep a message as received, with what the listing shows taken out of it, and let the oldest ones go.

    What the standard library cannot parse raises out of here; aiosmtpd then answers with a 500 and nothing is kept.
    """
    message = _parsed(raw)
    body = message.get_body(preferencelist=("plain", "html"))
    book.execute(
        """INSERT INTO messages (sender, recipients, subject, message_id, received_at, attachments, text, raw)
           VALUES (?, ?, ?, ?, ?, ?, ?, ?)""",
        (
            _text(sender),
            json.dumps([_text(recipient) for recipient in recipients]),
            _text(message["subject"]),
            _text(message["message-id"]).strip(),
            now(),
            json.dumps([_attachment_view(part) for part in message.iter_attachments()]),
            _text(body.get_content()) if body else "",
            raw,
        ),
    )
    book.execute("DELETE FROM messages WHERE id <= (SELECT MAX(id) FROM messages) - ?", (MAX_MESSAGES,))


def listing(book: sqlite3.Connection, recipient: str | None) -> list[dict[str, Any]]:
    """All messages, or those to `recipient` whatever the case of its letters, newest first, without their content."""
    rows = book.execute(
        """SELECT id, sender, recipients, subject, message_id, received_at, attachments FROM messages
           WHERE :to IS NULL OR EXISTS (SELECT 1 FROM json_each(recipients) WHERE lower(value) = lower(:to))
           ORDER BY id DESC""",
        {"to": recipient},
    )
    return [_view(row) for row in rows]


def message_of(book: sqlite3.Connection, message_id: int) -> sqlite3.Row:
    """The row of one message.

    Raises:
        Refused: 404 when there is none.
    """
    row = None
    if message_id <= SQLITE_MAX_ID:
        row = book.execute("SELECT * FROM messages WHERE id = ?", (message_id,)).fetchone()
    if not isinstance(row, sqlite3.Row):
        raise Refused(404, "not_found", "There is no message with this id.")
    return row


def attachment_of(raw: bytes, filename: str) -> tuple[str, bytes]:
    """Content type and bytes of the first attachment named `filename`.

    Raises:
        Refused: 404 when the message has none of that name.
    """
    for part in _parsed(raw).iter_attachments():
        view = _attachment_view(part)
        if view["filename"] == filename:
            return view["content_type"], _payload(part)
    raise Refused(404, "not_found", "The message has no attachment of this name.")


def _parsed(raw: bytes) -> EmailMessage:
    message = email.message_from_bytes(raw, policy=modern)
    if not isinstance(message, EmailMessage):
        raise TypeError("The modern policy makes EmailMessage objects.")
    return message


def _payload(part: EmailMessage) -> bytes:
    """The decoded bytes of an attachment; one that holds further parts, such as a forwarded mail, as it is."""
    payload = part.get_payload(decode=True)
    return payload if isinstance(payload, bytes) else bytes(part)


def _attachment_view(part: EmailMessage) -> dict[str, Any]:
    kind = part.get_content_type()
    return {
        "filename": _text(part.get_filename()),
        "content_type": kind if re.fullmatch(r"[a-z]+/[a-z0-9.+-]+", kind) else "application/octet-stream",
        "size": len(_payload(part)),
    }


def _text(value: object) -> str:
    """Text that UTF-8 can carry: bytes that a sender did not declare are replaced."""
    return str(value or "").encode("utf-8", "replace").decode()


def _view(row: sqlite3.Row) -> dict[str, Any]:
    return {
        "id": row["id"],
        "from": row["sender"],
        "to": json.loads(row["recipients"]),
        "subject": row["subject"],
        "message_id": row["message_id"],
        "received_at": row["received_at"],
        "attachments": json.loads(row["attachments"]),
    }


class Mailbox:
    """aiosmtpd's handler: accepts recipients and messages as the mode says."""

    def __init__(self, book: Book, mode: Mode) -> None:
        self._book = book
        self._mode = mode

    async def handle_RCPT(  # noqa: N802 - aiosmtpd finds it by this name
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        """Accept every recipient, or none in mode `reject`."""
        if self._mode.name == "reject":
            return REJECTED
        envelope.rcpt_tos.append(address)
        envelope.rcpt_options.extend(options)
        return "250 2.1.5 Recipient ok"

    async def handle_DATA(  # noqa: N802 - aiosmtpd finds it by this name
        self, _server: SMTP, _session: Session, envelope: Envelope
    ) -> str:
        """Keep the message, then say so; a client that leaves a slow server early has sent nothing."""
        if self._mode.name == "slow":
            await asyncio.sleep(SLOW_SECONDS)
        if self._mode.name == "down":
            return UNAVAILABLE
        sender, recipients, raw = envelope.mail_from or "", list(envelope.rcpt_tos), envelope.original_content or b""
        await self._book.run(lambda book: keep(book, sender, recipients, raw))
        return RECEIPT


class Sink(SMTP):
    """aiosmtpd's protocol, one object a connection, that in mode `down` greets and answers with 421 and hangs up."""

    def __init__(self, mailbox: Mailbox, mode: Mode) -> None:
        self._mode = mode
        super().__init__(
            mailbox,
            data_size_limit=MAX_MESSAGE_BYTES,
            enable_SMTPUTF8=True,
            hostname="localhost",  # else aiosmtpd asks the name server for it, once a connection
            ident="scaleout mail sink",
            loop=asyncio.get_running_loop(),
        )

    async def push(self, status: AnyStr) -> None:
        """Send a reply; when down, the 421 instead of any but the receipt of a message that is kept already."""
        if self._mode.name != "down" or status == RECEIPT:
            await super().push(status)
            return
        await super().push(UNAVAILABLE)
        if self.transport is not None:
            self.transport.close()


class Listing:
    """The HTTP face of the book."""

    def __init__(self, book: Book) -> None:
        self._book = book

    def routes(self) -> list[Route]:
        """The listing's calls, see each method."""
        return [
            Route("/messages", self.list, methods=["GET"]),
            Route("/messages", self.clear, methods=["DELETE"]),
            Route("/messages/{id:int}", self.show, methods=["GET"]),
            Route("/messages/{id:int}/raw", self.raw, methods=["GET"]),
            Route("/messages/{id:int}/attachments/{filename:path}", self.attachment, methods=["GET"]),
        ]

    async def list(self, request: Request) -> Response:
        """`GET [?to=]`: `{"items": [{id, from, to, subject, message_id, received_at, attachments}]}`, newest first."""
        recipient = request.query_params.get("to")
        return JSONResponse({"items": await self._book.run(lambda book: listing(book, recipient))})

    async def clear(self, _request: Request) -> Response:
        """`DELETE`: 204, and no message is left."""
        await self._book.run(lambda book: book.execute("DELETE FROM messages"))
        return Response(status_code=204)

    async def show(self, request: Request) -> Response:
        """`GET`: one message as in the listing, with `text`, its plain body, or its HTML where it has no plain one."""
        row = await self._row(request)
        return JSONResponse({**_view(row), "text": row["text"]})

    async def raw(self, request: Request) -> Response:
        """`GET`: the message as it came in."""
        return _download((await self._row(request))["raw"], "message/rfc822", "message.eml")

    async def attachment(self, request: Request) -> Response:
        """`GET`: the decoded bytes of one attachment."""
        row, filename = await self._row(request), request.path_params["filename"]
        kind, content = await asyncio.to_thread(attachment_of, row["raw"], filename)
        return _download(content, kind, filename)

    async def _row(self, request: Request) -> sqlite3.Row:
        message_id: int = request.path_params["id"]
        return await self._book.run(lambda book: message_of(book, message_id))


def _download(content: bytes, kind: str, filename: str) -> Response:
    """Bytes to be saved: what a mail brings along never runs in the browser of whoever reads the listing."""
    headers = {
        "Content-Disposition": f"attachment; filename*=utf-8''{quote(filename, safe='')}",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(content, headers=headers, media_type=kind)


def main() -> None:
    """Run the sink until SIGTERM or SIGINT: `python -m deploy.local.smtp_sink --port P --http-port Q --data DIR`."""
    options = arguments("Mail sink of the local cluster.", "--http-port")
    log_to_stdout()
    mode = Mode("ok", "down", "slow", "reject")
    with contextlib.closing(Book(options.data / "messages.sqlite3", SCHEMA)) as book:
        smtp_listener = listen("smtp", options.host, options.port)

        @contextlib.asynccontextmanager
        async def receiving(_app: Starlette) -> AsyncIterator[None]:
            loop = asyncio.get_running_loop()
            server = await loop.create_server(lambda: Sink(Mailbox(book, mode), mode), sock=smtp_listener)
            try:
                yield
            finally:
                server.close()

        app = application([*mode.routes(), *Listing(book).routes()], lifespan=receiving)
        serve(app, listen("http", options.host, options.http_port), HttpToolsProtocol)


if __name__ == "__main__":
    main()
