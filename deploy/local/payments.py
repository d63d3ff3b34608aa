"""A payment provider for the local cluster that can be told to misbehave; it stands for what the service does not own.

It promises what Stripe and its like promise: one effect for one `Idempotency-Key`, the same answer for every repeat,
and a ledger that loses nothing acknowledged, not even to a kill -9. Everything else about it may fail: the payment
methods `tok_…` and `POST /mode` choose how.

    authorized ─ capture → captured ─ refund → refunded
        └─ void → voided                                        (declined is final)
"""

import asyncio
import contextlib
import hashlib
import json
import re
import secrets
import sqlite3
import time
from dataclasses import dataclass
from typing import Any

from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
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
    read_object,
    serve,
)

SCHEMA = """
CREATE TABLE IF NOT EXISTS authorizations (
    idempotency_key TEXT PRIMARY KEY,
    id              TEXT NOT NULL UNIQUE,
    amount          INTEGER NOT NULL,
    currency        TEXT NOT NULL,
    payment_method  TEXT NOT NULL,
    reference       TEXT NOT NULL,
    status          TEXT NOT NULL,
    decline_reason  TEXT,
    captured        INTEGER NOT NULL DEFAULT 0,
    refunded        INTEGER NOT NULL DEFAULT 0,
    charges         INTEGER NOT NULL,
    created_at      TEXT NOT NULL,
    updated_at      TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS answers (
    idempotency_key TEXT PRIMARY KEY,
    fingerprint     TEXT NOT NULL,
    status          INTEGER NOT NULL,
    body            TEXT NOT NULL,
    ready_at        REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS flaky_calls (
    idempotency_key TEXT PRIMARY KEY,
    count           INTEGER NOT NULL
);
"""

DECLINES = {"tok_ok": None, "tok_slow": None, "tok_flaky": None, "tok_lost": None, "tok_declined": "card_declined"}
"""The known payment methods and why they are declined; any other is declined as `unknown_payment_method`."""

FLAKY_FAILURES = 2
"""How often `tok_flaky` answers 503 for a key before it works (API.md)."""

MAX_AMOUNT = 99_999_999
"""Stripe's bound: eight digits of minor units."""

_CURRENCY = re.compile("[A-Z]{3}")

MAX_TEXT = 255
"""Stripe's bound for an idempotency key; long enough for a reference and a payment method."""

ALWAYS_OPEN = ("/mode", "/ledger", "/health/live")
"""What answers at once in every mode: whoever switches the mode or judges the outcome is not a customer."""


OUT_OF_ORDER = {"error": {"code": "unavailable", "message": "The provider is out of order: try again later."}}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a key is answered: an HTTP status and JSON text, not to be sent before the Unix time `ready_at`.

    `replayed` marks a repeat, `lost` an answer that never reaches the caller.
    """

    status: int
    body: str
    ready_at: float = 0.0
    replayed: bool = False
    lost: bool = False


@dataclass(frozen=True, slots=True)
class AuthorizationRequest:
    """A valid request to authorise `amount` minor units of `currency` on `payment_method` for `reference`."""

    amount: int
    currency: str
    payment_method: str
    reference: str

    @classmethod
    def parse(cls, body: dict[str, Any]) -> "AuthorizationRequest":
        """Check a request body.

        Raises:
            Refused: 400 with the name of the first bad field, and what it should be.
        """
        wanted = {
            "amount": f"an integer of 1 to {MAX_AMOUNT} minor units",
            "currency": "three capital letters, as EUR",
            "payment_method": f"a token such as tok_ok, of 1 to {MAX_TEXT} printable characters",
            "reference": f"1 to {MAX_TEXT} printable characters",
        }
        for unknown in sorted(set(body) - set(wanted)):
            raise Refused(400, "invalid_field", f"Remove the unknown field {unknown[:MAX_TEXT]!a}.")
        amount, currency = body.get("amount"), body.get("currency")
        good = {
            "amount": type(amount) is int and 1 <= amount <= MAX_AMOUNT,
            "currency": isinstance(currency, str) and _CURRENCY.fullmatch(currency) is not None,
            "payment_method": _is_text(body.get("payment_method")),
            "reference": _is_text(body.get("reference")),
        }
        for field, holds in good.items():
            if not holds:
                raise Refused(400, "invalid_field", f"Send {field} as {wanted[field]}.")
        return cls(**body)


@dataclass(frozen=True, slots=True)
class Step:
    """What may follow an authorisation: from which status to which, and which column takes the whole amount."""

    before: str
    after: str
    moves: str | None


STEPS = {
    "capture": Step("authorized", "captured", "captured"),
    "void": Step("authorized", "voided", None),
    "refund": Step("captured", "refunded", "refunded"),
}


def authorize(book: sqlite3.Connection, key: str, request: AuthorizationRequest) -> Answer:
    """Answer an authorisation once for `key`; a repeat with the same content gets the first answer.

    The 503 of `tok_flaky` are answers too, but not the key's own: they are counted and not kept.

    Raises:
        Refused: 409 when the key was used for anything else.
    """
    content = ["authorize", request.amount, request.currency, request.payment_method, request.reference]
    if repeated := _repeated(book, key, content):
        return repeated
    if request.payment_method == "tok_flaky" and _count_call(book, key) <= FLAKY_FAILURES:
        return Answer(503, json.dumps(OUT_OF_ORDER))
    reason = DECLINES.get(request.payment_method, "unknown_payment_method")
    identity = f"auth_{secrets.token_hex(12)}"
    row = {
        "idempotency_key": key,
        "id": identity,
        "amount": request.amount,
        "currency": request.currency,
        "payment_method": request.payment_method,
        "reference": request.reference,
        "status": "declined" if reason else "authorized",
        "decline_reason": reason,
        "charges": 0 if reason else 1,
        "now": now(),
    }
    book.execute(
        """INSERT INTO authorizations (idempotency_key, id, amount, currency, payment_method, reference, status,
                                       decline_reason, charges, created_at, updated_at)
           VALUES (:idempotency_key, :id, :amount, :currency, :payment_method, :reference, :status,
                   :decline_reason, :charges, :now, :now)""",
        row,
    )
    body = json.dumps(_view(_authorization(book, identity)))
    ready_at = time.time() + (SLOW_SECONDS if request.payment_method == "tok_slow" else 0.0)
    return _keep(book, key, content, Answer(201, body, ready_at, lost=request.payment_method == "tok_lost"))


def advance(book: sqlite3.Connection, key: str, authorization_id: str, action: str) -> Answer:
    """Capture, void or refund an authorisation as a whole, once for `key`; a repeat gets the first answer.

    Raises:
        Refused: 404 for an unknown authorisation, 409 when its status forbids the action or the key was used.
    """
    content = [action, authorization_id]
    if repeated := _repeated(book, key, content):
        return repeated
    step, found = STEPS[action], _authorization(book, authorization_id)
    if found["status"] != step.before:
        raise Refused(409, "illegal_transition", f"{action} needs {step.before}; this one is {found['status']}.")
    moved = {"captured": found["captured"], "refunded": found["refunded"]}
    if step.moves:
        moved[step.moves] = found["amount"]
    book.execute(
        "UPDATE authorizations SET status = ?, captured = ?, refunded = ?, updated_at = ? WHERE id = ?",
        (step.after, moved["captured"], moved["refunded"], now(), authorization_id),
    )
    return _keep(book, key, content, Answer(200, json.dumps(_view(_authorization(book, authorization_id)))))


def ledger(book: sqlite3.Connection) -> dict[str, dict[str, Any]]:
    """Everything ever asked for, keyed by the idempotency key of the authorisation, oldest first.

    `charges` is how often the customer's money was taken hold of under the key: 0 when declined, 1 otherwise. A caller
    that charges twice does so under two keys; both rows then carry the same `reference`.
    """
    entries = [dict(row) for row in book.execute("SELECT * FROM authorizations ORDER BY rowid")]
    return {entry.pop("idempotency_key"): entry for entry in entries}


def find(book: sqlite3.Connection, key: str) -> list[sqlite3.Row]:
    """The authorisation made under `key`: one row, or none, and then it never happened."""
    return book.execute("SELECT * FROM authorizations WHERE idempotency_key = ?", (key,)).fetchall()


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and value.isprintable()


def _count_call(book: sqlite3.Connection, key: str) -> int:
    row = book.execute(
        """INSERT INTO flaky_calls VALUES (?, 1)
           ON CONFLICT (idempotency_key) DO UPDATE SET count = count + 1 RETURNING count""",
        (key,),
    ).fetchone()
    return int(row["count"])


def _fingerprint(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _repeated(book: sqlite3.Connection, key: str, content: list[Any]) -> Answer | None:
    row = book.execute("SELECT * FROM answers WHERE idempotency_key = ?", (key,)).fetchone()
    if row is None:
        return None
    if row["fingerprint"] != _fingerprint(content):
        raise Refused(409, "idempotency_key_reused", "This Idempotency-Key was used before: send a new one.")
    return Answer(row["status"], row["body"], row["ready_at"], replayed=True)


def _keep(book: sqlite3.Connection, key: str, content: list[Any], answer: Answer) -> Answer:
    book.execute(
        "INSERT INTO answers VALUES (?, ?, ?, ?, ?)",
        (key, _fingerprint(content), answer.status, answer.body, answer.ready_at),
    )
    return answer


def _authorization(book: sqlite3.Connection, authorization_id: str) -> sqlite3.Row:
    row = book.execute("SELECT * FROM authorizations WHERE id = ?", (authorization_id,)).fetchone()
    if not isinstance(row, sqlite3.Row):
        raise Refused(404, "not_found", "There is no authorization with this id.")
    return row


def _view(row: sqlite3.Row) -> dict[str, Any]:
    """What a caller sees of an authorisation; `decline_reason` only where there is one."""
    shown = ("id", "status", "amount", "currency", "reference", "decline_reason", "created_at")
    return {name: row[name] for name in shown if row[name] is not None}


class DroppableProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with a way for an application to drop the connection: `scope["extensions"]["drop"]()`.

    ASGI knows no such thing, and an application that just returns is answered for with a 500 by uvicorn.
    """

    def on_message_begin(self) -> None:
        """Offer the extension in the scope that uvicorn has just made."""
        super().on_message_begin()
        self.scope["extensions"] = {"drop": {"connection": self.transport.abort}}


class Dropped(Response):
    """No answer at all: the caller sees its connection closed and cannot know what became of the call."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        """Drop, and return once uvicorn knows: it answers with a 500 for whoever returns before that."""
        scope["extensions"]["drop"]["connection"]()
        while (await receive())["type"] != "http.disconnect":
            pass


class Misbehaviour:
    """ASGI middleware: in mode `down` every call is a 503, in mode `slow` each takes `SLOW_SECONDS` longer."""

    def __init__(self, app: ASGIApp, mode: Mode) -> None:
        self._app = app
        self._mode = mode

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hold the call back or refuse it, unless its path is in `ALWAYS_OPEN`."""
        customer = scope["type"] == "http" and scope["path"] not in ALWAYS_OPEN
        if customer and self._mode.name == "slow":
            await asyncio.sleep(SLOW_SECONDS)
        if customer and self._mode.name == "down":
            await JSONResponse(OUT_OF_ORDER, 503)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class Provider:
    """The HTTP face of the book; every answer to a `POST` comes from the book, so that a repeat cannot differ."""

    def __init__(self, book: Book) -> None:
        self._book = book

    def routes(self) -> list[Route]:
        """The provider's calls, see each method."""
        return [
            Route("/authorizations", self.authorize, methods=["POST"]),
            Route("/authorizations", self.find, methods=["GET"]),
            Route("/authorizations/{id}", self.show, methods=["GET"]),
            Route("/authorizations/{id}/{action}", self.advance, methods=["POST"]),
            Route("/ledger", self.ledger, methods=["GET"]),
        ]

    async def authorize(self, request: Request) -> Response:
        """`POST {amount, currency, payment_method, reference}`: 201 `{id, status, …}`, authorized or declined."""
        key = _key(request)
        wanted = AuthorizationRequest.parse(await read_object(request))
        return await _send(await self._book.run(lambda book: authorize(book, key, wanted)))

    async def advance(self, request: Request) -> Response:
        """`POST …/capture`, `/void` or `/refund` without fields: 200 with the authorisation as it is then."""
        authorization_id, action, key = request.path_params["id"], request.path_params["action"], _key(request)
        if action not in STEPS:
            raise Refused(404, "not_found", f"Use one of: {', '.join(STEPS)}.")
        if await read_object(request):
            raise Refused(400, "invalid_field", f"Send no fields: {action} always takes the whole amount.")
        return await _send(await self._book.run(lambda book: advance(book, key, authorization_id, action)))

    async def show(self, request: Request) -> Response:
        """`GET`: the authorisation as it is now."""
        authorization_id = request.path_params["id"]
        return JSONResponse(_view(await self._book.run(lambda book: _authorization(book, authorization_id))))

    async def find(self, request: Request) -> Response:
        """`GET ?idempotency_key=`: `{"items": […]}` with the one authorisation made under the key, or none."""
        key = request.query_params.get("idempotency_key")
        if not key:
            raise Refused(400, "idempotency_key_missing", "Send the query parameter idempotency_key.")
        found = await self._book.run(lambda book: find(book, key))
        return JSONResponse({"items": [_view(row) for row in found]})

    async def ledger(self, _request: Request) -> Response:
        """`GET`: the whole ledger, for whoever judges the outcome; see `ledger`."""
        return JSONResponse(await self._book.run(ledger))


def _key(request: Request) -> str:
    key = request.headers.get("idempotency-key", "")
    if not (_is_text(key) and key.isascii()):
        raise Refused(
            400, "idempotency_key_missing", f"Send the header Idempotency-Key: 1 to {MAX_TEXT} ASCII characters."
        )
    return key


async def _send(answer: Answer) -> Response:
    await asyncio.sleep(min(answer.ready_at - time.time(), SLOW_SECONDS))
    if answer.lost:
        return Dropped()
    headers = {"Idempotent-Replayed": "true"} if answer.replayed else None
    return Response(answer.body, answer.status, headers, "application/json")


def main() -> None:
    """Run the provider until SIGTERM or SIGINT: `python -m deploy.local.payments --port P --data DIR`."""
    options = arguments("Payment provider of the local cluster.")
    log_to_stdout()
    mode = Mode("ok", "down", "slow")
    with contextlib.closing(Book(options.data / "payments.sqlite3", SCHEMA)) as book:
        app = application([*mode.routes(), *Provider(book).routes()], Middleware(Misbehaviour, mode=mode))
        serve(app, listen("http", options.host, options.port), DroppableProtocol)


if __name__ == "__main__":
    main()
