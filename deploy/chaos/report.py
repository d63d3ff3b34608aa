"""A storm as a file for programs and a picture for people: what was asked, what failed, what was broken, by seconds.

The picture is SVG text. Above, the requests of each second: answered, refused or unanswered. Below them how long the
slowest took, and on the same axis the faults.
"""

from collections import Counter
from collections.abc import Sequence
from html import escape
from math import log10
from typing import Any

from deploy.chaos.faults import Kind
from deploy.chaos.history import Call
from deploy.chaos.play import Storm, failed

_WIDTH, _LEFT, _RIGHT = 1200, 190, 20
_BARS, _SLOW, _ROW = 180, 90, 22
_GOOD, _BAD, _LINE = "#1f6f54", "#b3522f", "#2f5d8a"
_KINDS = {
    Kind.KILLED: "#7a1f1f",
    Kind.STOPPED: "#d9a441",
    Kind.SLOW: "#8fb3d9",
    Kind.CUT: "#8a5fa8",
    Kind.SILENT: "#777777",
}
_SLOWEST = 20_000  # milliseconds: the top of the scale, as long as a client waits
_TARGETS_FIRST = 34  # pixels between the picture of latencies and the first row of faults


def summary(storm: Storm, calls: Sequence[Call], seed: int) -> dict[str, Any]:
    """Return a storm as JSON can hold it; moments are seconds from its beginning."""
    return {
        "seed": seed,
        "seconds": round(storm.ended - storm.begun, 1),
        "settled_after": round(storm.settled, 1),
        "violations": storm.problems,
        "requests": len(calls),
        "failed": {str(status): times for status, times in _troubles(calls).items()},
        "faults": [
            {
                "target": each.fault.target.value,
                "kind": each.fault.kind.value,
                "begun": round(each.begun - storm.begun, 2),
                "ended": round(each.mended - storm.begun, 2),
            }
            for each in storm.faults
        ],
        "by_second": _by_second(storm, calls),
    }


def draw(told: dict[str, Any]) -> str:
    """Return the picture of a `summary`."""
    seconds = told["by_second"]
    targets = sorted({fault["target"] for fault in told["faults"]})
    most = max((second["answered"] + second["failed"] for second in seconds), default=1)
    step = (_WIDTH - _LEFT - _RIGHT) / max(len(seconds), 1)
    bars_end, slow_end = 60 + _BARS, 60 + _BARS + 20 + _SLOW
    height = slow_end + _TARGETS_FIRST + _ROW * len(targets) + 30
    parts = [
        _text(
            16,
            28,
            f"Seed {told['seed']}: {told['requests']} requests, {len(told['faults'])} faults, {_verdict(told)}",
            bold=True,
        ),
        *_legend(),
        _text(_LEFT - 10, 72, f"{most} requests a second", end=True),
        _text(_LEFT - 10, bars_end, "0", end=True),
        _text(_LEFT - 10, bars_end + 32, f"slowest, {_SLOWEST // 1000} s", end=True),
        _text(_LEFT - 10, slow_end, "1 ms", end=True),
    ]
    for number, second in enumerate(seconds):
        left, good, bad = _LEFT + number * step, second["answered"] * _BARS / most, second["failed"] * _BARS / most
        width = max(step - 0.5, 0.5)
        parts.append(_box(left, bars_end - good, width, good, _GOOD))
        if bad:
            # At least three pixels: one request of a hundred must be seen.
            parts.append(_box(left, bars_end - good - max(bad, 3), width, max(bad, 3), _BAD))
    scale = _SLOW / log10(_SLOWEST)
    line = [
        f"{_LEFT + (number + 0.5) * step:.1f},{slow_end - scale * log10(max(second['slowest_ms'], 1)):.1f}"
        for number, second in enumerate(seconds)
    ]
    parts.append(f'<polyline points="{" ".join(line)}" fill="none" stroke="{_LINE}" stroke-width="1.5"/>')
    for row, target in enumerate(targets):
        top = slow_end + _TARGETS_FIRST + row * _ROW
        parts.append(_text(_LEFT - 10, top + 14, target, end=True))
        parts.append(f'<line x1="{_LEFT}" y1="{top + 9}" x2="{_WIDTH - _RIGHT}" y2="{top + 9}" stroke="#ddd"/>')
        for fault in told["faults"]:
            if fault["target"] == target:
                width = max((fault["ended"] - fault["begun"]) * step, 2)
                parts.append(_box(_LEFT + fault["begun"] * step, top, width, 18, _KINDS[Kind(fault["kind"])]))
    parts += [
        _text(_LEFT + number * step, height - 10, f"{number} s")
        for number in range(0, len(seconds) + 1, max(10, len(seconds) // 12 // 10 * 10))
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _by_second(storm: Storm, calls: Sequence[Call]) -> list[dict[str, float]]:
    # Clients rest once nothing fails any more: until their last call.
    last = max((call.ended for call in calls), default=storm.ended)
    seconds = [{"answered": 0, "failed": 0, "slowest_ms": 0.0} for _ in range(int(last - storm.begun) + 1)]
    for call in calls:
        # By its end: that is when a client learns what came of it.
        number = int(call.ended - storm.begun)
        if 0 <= number < len(seconds):
            second = seconds[number]
            second["failed" if failed(call) else "answered"] += 1
            second["slowest_ms"] = max(second["slowest_ms"], round((call.ended - call.begun) * 1000, 1))
    return seconds


def _troubles(calls: Sequence[Call]) -> Counter[int]:
    return Counter(call.status for call in calls if failed(call))


def _verdict(told: dict[str, Any]) -> str:
    if told["violations"]:
        return f"{len(told['violations'])} promises broken"
    return f"every promise kept, all work done {told['settled_after']} s after the last"


def _legend() -> list[str]:
    entries = [(_GOOD, "answered"), (_BAD, "refused or unanswered"), (_LINE, "slowest request")]
    entries += [(colour, kind.value) for kind, colour in _KINDS.items()]
    parts = []
    for number, (colour, name) in enumerate(entries):
        left = _LEFT + number * 120 + (40 if number > 1 else 0)
        parts += [_box(left, 38, 12, 12, colour), _text(left + 18, 49, name)]
    return parts


def _box(left: float, top: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _text(left: float, top: float, said: str, *, end: bool = False, bold: bool = False) -> str:
    more = (' text-anchor="end"' if end else "") + (' font-weight="bold"' if bold else "")
    return f'<text x="{left:.1f}" y="{top:.1f}"{more}>{escape(said)}</text>'
