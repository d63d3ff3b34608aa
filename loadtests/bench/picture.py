"""Draws what the bench has measured: one bar a side, as SVG text, so that a change of it can be read in a diff."""

from html import escape
from typing import Any

_WIDTH, _BAR, _GAP, _LEFT = 760, 26, 14, 300


def draw(result: dict[str, Any]) -> str:
    """Return the picture of `results/bench.json`."""
    rates: dict[str, int] = result["requests_per_second"]
    widest = max(rates.values())
    rows = []
    for number, (name, rate) in enumerate(rates.items()):
        top = 50 + number * (_BAR + _GAP)
        width = round((_WIDTH - _LEFT - 110) * rate / widest)
        colour = "#1f6f54" if name in {"l1", "l2"} else "#9aa5ad"
        label = escape(f"{name}: {result['sides'][name]}")
        rows.append(
            f'<text x="{_LEFT - 10}" y="{top + 18}" text-anchor="end">{label}</text>'
            f'<rect x="{_LEFT}" y="{top}" width="{width}" height="{_BAR}" fill="{colour}"/>'
            f'<text x="{_LEFT + width + 8}" y="{top + 18}">{rate / rates["a"]:.2f} times a</text>'
        )
    height = 60 + len(rates) * (_BAR + _GAP)
    title = "Signed-in GET /profiles/{id}, one core, 32 connections: requests in a second, against side a"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="16" y="28" font-weight="bold">{escape(title)}</text>{"".join(rows)}</svg>\n'
    )
