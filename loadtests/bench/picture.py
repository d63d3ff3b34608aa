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


def draw_curve(result: dict[str, Any]) -> str:
    """Return the picture of `results/scale.json`: measured points, the fitted law, the simulation, and the ideal."""
    measured = {int(count): rate for count, rate in result["requests_per_second"].items()}
    simulated = {int(count): rate for count, rate in result["simulation"]["requests_per_second"].items()}
    fit, most = result["fit"], max(measured)
    one, sigma, kappa = fit["one"], fit["sigma"], fit["kappa"]
    left, top, width, high = 70, 60, 620, 300
    highest = max(one * most, *measured.values(), *simulated.values())

    def at(count: float, rate: float) -> tuple[float, float]:
        return round(left + width * count / most, 1), round(top + high * (1 - rate / highest), 1)

    counts = [step / 10 for step in range(10, most * 10 + 1)]
    law = [at(n, one * n / (1 + sigma * (n - 1) + kappa * n * (n - 1))) for n in counts]
    (x0, y0), (x1, y1) = at(0, 0), at(most, one * most)
    parts = [
        f'<line x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}" stroke="#9aa5ad" stroke-dasharray="4 4"/>',
        f'<polyline points="{" ".join(f"{x},{y}" for x, y in law)}" fill="none" stroke="#1f6f54" stroke-width="2"/>',
        f'<line x1="{x0}" y1="{y0}" x2="{left + width}" y2="{y0}" stroke="#222"/>',
    ]
    for count, rate in measured.items():
        x, y = at(count, rate)
        parts.append(f'<circle cx="{x}" cy="{y}" r="5" fill="#1f6f54"/>')
        parts.append(f'<text x="{x}" y="{y0 + 18}" text-anchor="middle">{count}</text>')
        parts.append(f'<text x="{x + 8}" y="{y + 18}">{rate:,.0f}/s</text>')
    for count, rate in simulated.items():
        x, y = at(count, rate)
        parts.append(f'<path d="M{x - 5} {y - 5}L{x + 5} {y + 5}M{x - 5} {y + 5}L{x + 5} {y - 5}" stroke="#b3522f"/>')
    title = f"Instances with {result['share_of_a_core']:g} of a core each: requests in a second"
    legend = f"● measured   — law: sigma {sigma:g}, kappa {kappa:g}   x simulation   - - as many times one"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{top + high + 60}" '
        f'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="16" y="24" font-weight="bold">{escape(title)}</text><text x="16" y="44">{escape(legend)}</text>'
        f'{"".join(parts)}<text x="{left + width / 2}" y="{y0 + 40}" text-anchor="middle">instances</text></svg>\n'
    )
