"""Draws what the bench has measured: one bar a side, as SVG text, so that a change of it can be read in a diff."""

from html import escape
from typing import Any

_WIDTH, _BAR, _GAP, _LEFT = 760, 26, 14, 300


def draw(result: dict[str, Any]) -> str:
    """Return the picture of `results/bench.json`."""
    # Of one instance each: eight of them on one core are a question of CPU, not of requests in a second.
    rates: dict[str, int] = {
        name: of for name, of in result["requests_per_second"].items() if "x 8" not in name and "paced" not in name
    }
    widest = max(rates.values())
    rows = []
    for number, (name, rate) in enumerate(rates.items()):
        top = 50 + number * (_BAR + _GAP)
        width = round((_WIDTH - _LEFT - 110) * rate / widest)
        colour = "#1f6f54" if name in {"l1", "l2", "routes"} else "#9aa5ad"
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


def draw_ratios(title: str, ratios: dict[str, dict[str, Any]]) -> str:
    """Return a picture of ratios with the bound that each should keep: the mark across its bar."""
    left, width = 420, 900
    widest = max(max(ratio.values()) for ratio in ratios.values())
    rows = []
    for number, (name, ratio) in enumerate(ratios.items()):
        top, scale = 50 + number * (_BAR + _GAP), (width - left - 200) / widest
        measured, (bound, wanted) = ratio["measured"], next(pair for pair in ratio.items() if pair[0] != "measured")
        kept = measured >= wanted if bound == "at least" else measured <= wanted
        mark = left + round(wanted * scale)
        rows.append(
            f'<text x="{left - 10}" y="{top + 18}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{left}" y="{top}" width="{round(measured * scale)}" height="{_BAR}" '
            f'fill="{"#1f6f54" if kept else "#b3522f"}"/>'
            f'<line x1="{mark}" y1="{top - 4}" x2="{mark}" y2="{top + _BAR + 4}" stroke="#222" stroke-width="2"/>'
            f'<text x="{left + round(max(measured, wanted) * scale) + 8}" y="{top + 18}">'
            f"{measured:.2f}, {bound} {wanted}</text>"
        )
    height = 60 + len(ratios) * (_BAR + _GAP)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="16" y="28" font-weight="bold">{escape(title)}</text>{"".join(rows)}</svg>\n'
    )
