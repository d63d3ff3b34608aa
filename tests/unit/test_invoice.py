"""The invoice: its sums, its PDF read back, and what hostile or strange names can do to it (nothing)."""

import dataclasses
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from fractions import Fraction

import pypdf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.orders.invoice import SHOP, Invoice, Line, Party, render, totals

ADA = Party("Ada Lovelace", ("12 St James's Square", "London"), "ada@example.com")
LINES = (Line("PINE-0042", "Field notebook", 2, 1299), Line("LAMP-0007", "Desk lamp, brass", 1, 1_490_000))
amounts = st.builds(Line, st.just("S"), st.just("N"), st.integers(1, 10_000), st.integers(0, 10**9))


def invoice_of(lines: Sequence[Line] = LINES, buyer: Party = ADA, currency: str = "EUR") -> Invoice:
    sums = totals(lines, 19)
    return Invoice(
        number="INV-2026-00-000042",
        issued_at=datetime(2026, 11, 21, 23, 30, tzinfo=UTC),
        seller=SHOP,
        buyer=buyer,
        order_id="018f3a5c-7b2e-8c1d-9f00-3a5c7b2e8c1d",
        lines=tuple(lines),
        net=sums.net,
        tax_rate=19,
        tax=sums.tax,
        total=sums.total,
        currency=currency,
        paid_with="card (tok_ok)",
    )


def read(pdf: bytes) -> pypdf.PdfReader:
    return pypdf.PdfReader(io.BytesIO(pdf))


def text_of(pdf: bytes) -> str:
    return "\n".join(page.extract_text() for page in read(pdf).pages)


@given(st.lists(amounts, max_size=20), st.integers(0, 100))
def test_net_and_tax_are_the_total_and_at_most_half_a_minor_unit_off(lines: list[Line], rate: int) -> None:
    sums = totals(lines, rate)
    exact = Fraction(sums.total * 100, 100 + rate)
    assert sums.net + sums.tax == sums.total == sum(line.amount for line in lines)
    assert 0 <= sums.tax <= sums.total
    assert Fraction(-1, 2) < sums.net - exact <= Fraction(1, 2)


@pytest.mark.sabotage(
    "app/domain/orders/invoice.py", "(2 * 100 * gross + divisor) // (2 * divisor)", "100 * gross // divisor"
)
@pytest.mark.parametrize(
    ("gross", "rate", "net", "tax"), [(119, 19, 100, 19), (1, 19, 1, 0), (3, 100, 2, 1), (0, 19, 0, 0)]
)
def test_half_a_minor_unit_of_net_is_rounded_up(gross: int, rate: int, net: int, tax: int) -> None:
    sums = totals([Line("S", "N", 1, gross)], rate)
    assert (sums.net, sums.tax) == (net, tax)


def test_the_pdf_says_what_was_bought_by_whom_and_for_how_much() -> None:
    pdf = render(invoice_of())
    text = text_of(pdf)
    for expected in (
        "INV-2026-00-000042", "21 November 2026", "018f3a5c-7b2e-8c1d-9f00-3a5c7b2e8c1d", "card (tok_ok)",
        SHOP.name, SHOP.tax_id, "Ada Lovelace", "12 St James's Square", "ada@example.com",
        "Field notebook", "PINE-0042", "12.99", "25.98", "Desk lamp, brass", "14,900.00",
        "VAT 19 %", "12,542.84", "2,383.14", "Total, EUR 14,925.98", "1 / 1",
    ):  # fmt: skip
        assert expected in text
    metadata = read(pdf).metadata
    assert metadata is not None
    assert (metadata.title, metadata.author) == ("Invoice INV-2026-00-000042", SHOP.name)
    assert metadata.creation_date == datetime(2026, 11, 21, 23, 30, tzinfo=UTC)


def test_equal_invoices_are_equal_bytes_and_others_are_not() -> None:
    assert render(invoice_of()) == render(invoice_of())
    assert render(invoice_of()) != render(invoice_of(buyer=Party("Alan Turing")))


def test_a_hundred_lines_flow_over_pages_that_repeat_the_header_and_count_themselves() -> None:
    pdf = render(invoice_of([Line(f"SKU-{i:04}", f"Product {i}", 1, 1000 + i) for i in range(100)]))
    pages = [page.extract_text() for page in read(pdf).pages]
    assert len(pages) > 2
    for number, page in enumerate(pages, start=1):
        assert f"{number} / {len(pages)}" in page
        assert ("UNIT PRICE, EUR" in page) == ("SKU-" in page)
        assert "INV-2026-00-000042" in page
    whole = "".join(pages)
    assert all(whole.count(f"SKU-{i:04}") == 1 for i in range(100))


@pytest.mark.parametrize(
    "name",
    [
        '#include "/etc/passwd"', '#read("/etc/passwd")', "*bold* _it_ $x^2$ `raw`", '"; ] } #panic()', "= Heading",
        "<label> @ref // /* #pagebreak()", "\\u{41} \\", "{{name}}", '", "name": "other',
    ],
)  # fmt: skip
def test_markup_in_a_name_is_shown_and_never_run(name: str) -> None:
    pdf = render(invoice_of([Line("S", name, 1, 100)], Party(name, (name,))))
    assert len(read(pdf).pages) == 1
    assert text_of(pdf).count(name) == 3


@pytest.mark.parametrize(
    "name",
    [
        "漢字の名前", "🙂👩‍👩‍👧", "שלום עולם", "مرحبا",
        "a\x00b\x1b[31m", "\u202egnp.exe", "\ud800", "\ue000", "", " ", "W" * 200, "🏴" * 5000,
    ],
)  # fmt: skip
def test_names_of_any_script_length_or_rubbish_never_flood_the_pages(name: str) -> None:
    pdf = render(invoice_of([Line(name, name, 1, 100)], Party(name, (name,), name)))
    assert len(read(pdf).pages) <= 2
    assert "Total, EUR 1.00" in text_of(pdf)


@settings(max_examples=40)
@given(st.text(max_size=80))
def test_any_text_at_all_renders(text: str) -> None:
    assert render(invoice_of([Line("S", text, 1, 100)], Party(text))).startswith(b"%PDF-")


@pytest.mark.sabotage("app/domain/orders/invoice.typ", ".join(sym.zws)", '.join("")')
def test_a_long_word_stays_in_its_column() -> None:
    text = text_of(render(invoice_of([Line("S", "Ω" * 200, 1, 100)], Party("Ω" * 200))))
    rows = [row.count("Ω") for row in text.splitlines()]
    assert sum(rows) == 2 * 200
    assert max(rows) < 40


def test_an_invoice_for_the_archive_says_so_unless_a_glyph_is_missing() -> None:
    assert b"pdfaid:part" in render(invoice_of())
    assert b"pdfaid:part" not in render(invoice_of(buyer=Party("漢字")))


@pytest.mark.parametrize(("currency", "shown"), [("EUR", "14,925.98"), ("JPY", "1,492,598"), ("BHD", "1,492.598")])
def test_an_amount_has_the_decimals_of_its_currency(currency: str, shown: str) -> None:
    assert f"Total, {currency} {shown}" in text_of(render(invoice_of(currency=currency)))


@pytest.mark.parametrize(
    "change",
    [
        {"net": 1}, {"total": 1}, {"lines": ()}, {"number": "42"}, {"number": "INV-2026-00-000042\n"},
        {"lines": (Line("S", "N", 0, 100),)}, {"lines": (Line("S", "N", 1, -100),)}, {"tax_rate": 7},
        {"issued_at": datetime(2026, 11, 21)},  # noqa: DTZ001 - a time without a zone is the point
    ],
)  # fmt: skip
def test_an_invoice_that_does_not_add_up_cannot_be_made(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\.$"):
        dataclasses.replace(invoice_of(), **change)
