"""The invoice of an order as a PDF: what it says, how its tax is computed, and how it is typeset.

Pure: equal invoices give equal bytes, so that a repeated task stores the same object. Whatever a customer or a product
is called is handed to the template as data and can neither run as markup nor break the page.
"""

import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import typst

TEMPLATE = Path(__file__).with_suffix(".typ").read_bytes()

DECIMALS = {"BHD": 3, "CLP": 0, "ISK": 0, "JOD": 3, "JPY": 0, "KRW": 0, "KWD": 3, "OMR": 3, "TND": 3, "VND": 0}
"""ISO 4217 currencies whose minor unit is not a hundredth."""

MAX_TEXT = 200
"""Longer names and addresses are cut: they would push the lines off the first page. Nobody's address is longer."""

NUMBER = re.compile(r"INV-\d{4}-\d{2}-\d{6,}")
"""Year, shard and a counter without gaps on that shard: `INV-2026-00-000001`."""

JOINERS = "\u200c\u200d"
"""Format characters that spell words and emoji; all others (such as bidi overrides) only disguise text."""


@dataclass(frozen=True, slots=True)
class Party:
    """The seller or the buyer; what is empty is left out of the invoice.

    `tax_id` and `registration` are printed as they are, such as `VAT ID DE 123 456 789`.
    """

    name: str
    address: tuple[str, ...] = ()
    email: str = ""
    tax_id: str = ""
    registration: str = ""


SHOP = Party(
    name="Northwind & Pine",
    address=("Am Kiefernhain 12", "21339 Lüneburg", "Germany"),
    email="orders@northwind-pine.example",
    tax_id="VAT ID DE 000 000 000",
    registration="Amtsgericht Lüneburg, HRB 000000",
)
"""The seller: a shop that does not exist, with numbers that nobody else can have."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line: `amount` is `quantity` times `unit_price`, both gross (tax included) in minor units."""

    sku: str
    name: str
    quantity: int
    unit_price: int

    @property
    def amount(self) -> int:
        """Gross amount of the line in minor units."""
        return self.quantity * self.unit_price


@dataclass(frozen=True, slots=True)
class Totals:
    """Net, tax and gross in minor units; `net + tax == total`, always."""

    net: int
    tax: int
    total: int


def totals(lines: Iterable[Line], rate: int) -> Totals:
    """Take the tax out of the gross amounts of all lines.

    The net is rounded once, on the sum, half a minor unit up; the tax is what remains:
    `tax = gross - round_half_up(gross * 100 / (100 + rate))`. So the customer pays exactly the sum of the prices seen.

    Args:
        lines: the lines; amounts are not negative.
        rate: the tax rate in whole per cent, such as 19.
    """
    gross = sum(line.amount for line in lines)
    divisor = 100 + rate
    net = (2 * 100 * gross + divisor) // (2 * divisor)
    return Totals(net, gross - net, gross)


@dataclass(frozen=True, slots=True)
class Invoice:
    """All that an invoice says. It cannot be made if it does not add up.

    Args:
        number: `INV-2026-00-000001`, see `NUMBER`.
        issued_at: with a time zone; also the creation time of the PDF.
        seller: who issues it.
        buyer: who is billed.
        order_id: the order's UUID as text.
        lines: at least one.
        net: minor units without tax.
        tax_rate: whole per cent.
        tax: minor units of tax.
        total: minor units paid, tax included.
        currency: ISO 4217 code.
        paid_with: how it was paid, in words for the customer.

    Raises:
        ValueError: the number is not one, there is no line, an amount is negative, or the sums are wrong.
    """

    number: str
    issued_at: datetime
    seller: Party
    buyer: Party
    order_id: str
    lines: tuple[Line, ...]
    net: int
    tax_rate: int
    tax: int
    total: int
    currency: str
    paid_with: str

    def __post_init__(self) -> None:
        if not NUMBER.fullmatch(self.number):
            raise ValueError(f"{self.number!r} is not an invoice number such as INV-2026-00-000001.")
        if self.issued_at.tzinfo is None:
            raise ValueError("issued_at needs a time zone.")
        if not self.lines or any(line.quantity < 1 or line.unit_price < 0 for line in self.lines):
            raise ValueError("An invoice needs lines of at least one piece each, at prices of zero or more.")
        if Totals(self.net, self.tax, self.total) != totals(self.lines, self.tax_rate):
            raise ValueError(f"Net {self.net}, tax {self.tax} and total {self.total} are not those of the lines.")


def render(invoice: Invoice) -> bytes:
    """Typeset `invoice` as an A4 PDF; equal invoices give equal bytes. CPU-bound, without the GIL: use a thread.

    The file is PDF/A-2a (readable for decades) and PDF/UA-1 (readable by a screen reader). The fonts are those of the
    `typst` wheel (Latin, Greek, Cyrillic, Hebrew, Arabic), never the machine's. A character that they lack, such as a
    Chinese one, is shown as an empty box; both profiles forbid that, so only such an invoice comes without them.

    Raises:
        typst.TypstError: the template is broken; no content of an invoice can cause it.
    """
    try:
        return _compile(invoice, archivable=True)
    except typst.TypstError as error:
        if not error.message.startswith("PDF/A"):
            raise
        return _compile(invoice, archivable=False)


def _compile(invoice: Invoice, *, archivable: bool) -> bytes:
    return typst.compile(
        TEMPLATE,
        font_paths=_fonts(),
        ignore_system_fonts=True,
        sys_inputs={"invoice": json.dumps(_shown(invoice))},
        pdf_standards=["a-2a", "ua-1"] if archivable else [],
        timestamp=int(invoice.issued_at.timestamp()),
    )


@cache
def _fonts() -> typst.Fonts:
    """The wheel's fonts, searched once a process: it takes longer than an invoice."""
    return typst.Fonts(include_system_fonts=False)


def _shown(invoice: Invoice) -> dict[str, Any]:
    """The template's data: every value a text that is safe to show, or a list of such."""
    data = asdict(invoice)
    del data["issued_at"]
    sums = {name: money(data[name], invoice.currency) for name in ("net", "tax", "total")}
    lines = [
        {
            "sku": line.sku,
            "name": line.name,
            "quantity": f"{line.quantity:,}",
            "unit_price": money(line.unit_price, invoice.currency),
            "amount": money(line.amount, invoice.currency),
        }
        for line in invoice.lines
    ]
    issued_on = invoice.issued_at.astimezone(UTC).date().isoformat()
    return {**_safe(data), **sums, "lines": _safe(lines), "issued_on": issued_on, "tax_rate": str(invoice.tax_rate)}


def money(minor: int, currency: str) -> str:
    """Minor units as an amount for people: 123456 is `1,234.56` in EUR and `123,456` in JPY."""
    decimals = DECIMALS.get(currency, 2)
    whole, rest = divmod(minor, 10**decimals)
    return f"{whole:,}.{rest:0{decimals}}" if decimals else f"{whole:,}"


def _safe(value: Any) -> Any:
    """The same value with every text cut to `MAX_TEXT` and rid of what is invisible or not a character at all."""
    if isinstance(value, str):
        shown = (c if c in JOINERS or unicodedata.category(c)[0] not in "CZ" else " " for c in value[:MAX_TEXT])
        return " ".join("".join(shown).split())
    if isinstance(value, dict):
        return {name: _safe(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_safe(item) for item in value]
    return value
