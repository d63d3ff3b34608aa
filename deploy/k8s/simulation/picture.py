"""Three curves over time as an SVG that any browser shows: load and capacity, pods, latency with what failed.

Written by hand because the drawing is a dozen lines of text, and a plotting library is larger than the service.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deploy.k8s.simulation.service import Second

WIDTH, PANEL, LEFT, TOP, GAP = 860, 130, 64, 40, 34


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a panel: its name, colour and value at a second."""

    name: str
    colour: str
    value: Callable[[Second], float]


def draw(seconds: Sequence[Second], title: str, panels: Sequence[Sequence[Curve]]) -> str:
    """Return the picture: one panel under the other, each from zero to its largest value."""
    height = TOP + len(panels) * (PANEL + GAP) + 10
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"',
        '  font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{title}</text>',
    ]
    for number, curves in enumerate(panels):
        lines += _panel(seconds, curves, TOP + number * (PANEL + GAP))
    return "\n".join([*lines, "</svg>", ""])


def _panel(seconds: Sequence[Second], curves: Sequence[Curve], top: int) -> list[str]:
    highest = max(curve.value(second) for curve in curves for second in seconds) or 1.0
    right, bottom = WIDTH - 20, top + PANEL
    across = (right - LEFT) / len(seconds)
    lines = [
        f'<path d="M{LEFT} {top}V{bottom}H{right}" fill="none" stroke="#999"/>',
        f'<text x="{LEFT - 6}" y="{top + 10}" text-anchor="end">{highest:,.4g}</text>',
        f'<text x="{LEFT - 6}" y="{bottom}" text-anchor="end">0</text>',
    ]
    for minute in range(0, len(seconds) // 60 + 1, 5):
        x = LEFT + minute * 60 * across
        lines.append(f'<text x="{x:.0f}" y="{bottom + 14}" text-anchor="middle" fill="#666">{minute} min</text>')
    for number, curve in enumerate(curves):
        # Five seconds are a pixel; of each five the largest, so that no peak is lost.
        peaks = (max(seconds[at : at + 5], key=curve.value) for at in range(0, len(seconds), 5))
        points = " ".join(
            f"{LEFT + peak.time * across:.1f},{bottom - curve.value(peak) / highest * PANEL:.1f}" for peak in peaks
        )
        lines.append(f'<polyline points="{points}" fill="none" stroke="{curve.colour}" stroke-width="1.5"/>')
        lines.append(f'<text x="{LEFT + 10 + number * 190}" y="{top - 6}" fill="{curve.colour}">{curve.name}</text>')
    return lines
