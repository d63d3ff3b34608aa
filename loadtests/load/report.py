"""A run as JSON for programs and as one HTML file for people: figures, thresholds, and pictures over time.

The pictures are SVG in the file itself; nothing is loaded from anywhere.
"""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from loadtests.load.samples import Second, Sums

# The objectives of the service, see deploy/prometheus/rules/slo.yml.
LEAST_ANSWERED = 0.9999
LONGEST_P95 = 100.0  # milliseconds
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 900, 170, 60, 24
_COLOURS = ("#1f6f54", "#d9a441", "#b3522f", "#2f5d8a")
_POINTS = 600  # of a line; more than the picture has pixels nobody sees

Series = tuple[str, Sequence[float]]


def summary(sums: Sums, run: dict[str, Any], users_at: Callable[[int], int]) -> dict[str, Any]:
    """Return a run as JSON holds it.

    Args:
        sums: what was answered.
        run: what was asked: scenario, tool, url, users, seconds, date.
        users_at: how many users were there in a second of the run.
    """
    every, began = sums.everything, min(sums.seconds, default=0)
    seconds = max(sums.seconds, default=0) - began + 1
    answered = 1 - every.failed / every.requests if every.requests else 0.0
    return {
        **run,
        "figures": {
            "requests": every.requests,
            "requests_per_second": round(every.requests / seconds, 1),
            "answered": round(answered, 6),
            "failed": every.failed,
            "limited": every.limited,
            "hit_rate": _rate(every),
            **_percentiles(every),
        },
        "kinds": {kind: {"requests": of.requests, **_percentiles(of)} for kind, of in sorted(sums.kinds.items())},
        "thresholds": [
            _threshold("share of requests that are answered", answered, "at least", LEAST_ANSWERED),
            _threshold("95th percentile, ms", every.latencies.percentile(0.95), "at most", LONGEST_P95),
        ],
        "series": [
            {
                "second": number,
                "users": users_at(number),
                "requests": of.requests,
                "failed": of.failed,
                "limited": of.limited,
                "hit_rate": _rate(of),
                **_percentiles(of),
                "instances": len(of.instances),
                "replicas": len(of.replicas),
            }
            for number in range(seconds)
            for of in (sums.seconds.get(began + number, Second()),)
        ],
    }


def held(told: dict[str, Any]) -> bool:
    """Return whether every threshold of a run was kept."""
    return all(threshold["held"] for threshold in told["thresholds"])


def page(told: dict[str, Any]) -> str:
    """Return the HTML of a `summary`."""
    series, figures = told["series"], told["figures"]

    def of(*names: str) -> list[Series]:
        return [(name.replace("_", " "), [float(each[name] or 0) for each in series]) for name in names]

    rows = "".join(
        f"<tr><td>{escape(threshold['what'])}</td><td>{threshold['measured']:g}</td>"
        f"<td>{threshold['bound']} {threshold['wanted']:g}</td>"
        f"<td class={'good' if threshold['held'] else 'bad'}>{'kept' if threshold['held'] else 'missed'}</td></tr>"
        for threshold in told["thresholds"]
    )
    kinds = "".join(
        f"<tr><td>{escape(kind)}</td><td>{of['requests']:,}</td><td>{of['p50']:g}</td><td>{of['p95']:g}</td>"
        f"<td>{of['p99']:g}</td></tr>"
        for kind, of in told["kinds"].items()
    )
    hit_rate = "none" if figures["hit_rate"] is None else f"{figures['hit_rate']:.0%}"
    pictures = "".join(
        (
            _picture("Requests a second, and users", of("requests", "users")),
            _picture("Milliseconds: p50, p95, p99", of("p50", "p95", "p99")),
            _picture("Failed and limited requests a second", of("failed", "limited")),
            _picture("Share of reads that the cache answered", of("hit_rate"), top=1.0),
            _picture("Instances and replicas that answered", of("instances", "replicas")),
        )
    )
    title = f"{told['scenario']}: {told['users']} users, {told['seconds']:g} s, {told['tool']}"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title>
<style>body{{font:15px/1.5 sans-serif;max-width:{_WIDTH + 40}px;margin:2em auto;padding:0 1em;
color:#222;background:#fff}}
table{{border-collapse:collapse;margin:1em 0}}td,th{{padding:.3em .9em;border-bottom:1px solid #ddd;text-align:left}}
svg{{width:100%;height:auto}}.good{{color:#1f6f54}}.bad{{color:#b3522f;font-weight:bold}}</style></head><body>
<h1>{escape(title)}</h1>
<p>{escape(told["url"])}, {escape(told["date"])}. {escape(told["mix"])}.</p>
<p>{figures["requests"]:,} requests, {figures["requests_per_second"]:g} a second; {figures["failed"]:,} failed,
{figures["limited"]:,} limited; {hit_rate} of the reads from the cache.</p>
<h2>Thresholds</h2><table><tr><th>what</th><th>measured</th><th>wanted</th><th></th></tr>{rows}</table>
<h2>Over time</h2>{pictures}
<h2>By kind, ms</h2><table><tr><th>kind</th><th>requests</th><th>p50</th><th>p95</th><th>p99</th></tr>{kinds}</table>
</body></html>
"""


def _percentiles(of: Second) -> dict[str, float]:
    return {f"p{round(share * 100)}": of.latencies.percentile(share) for share in (0.5, 0.95, 0.99)}


def _rate(of: Second) -> float | None:
    return round(of.hits / of.reads, 3) if of.reads else None


def _threshold(what: str, measured: float, bound: str, wanted: float) -> dict[str, Any]:
    kept = measured >= wanted if bound == "at least" else measured <= wanted
    return {"what": what, "measured": round(measured, 6), "bound": bound, "wanted": wanted, "held": kept}


def _picture(title: str, lines: Sequence[Series], top: float | None = None) -> str:
    """Return a picture of lines over the seconds of a run."""
    count = max((len(values) for _, values in lines), default=0)
    highest = top or max((value for _, values in lines for value in values), default=0.0) or 1.0
    wide, high = _WIDTH - _LEFT - 10, _HEIGHT - _BOTTOM - 30
    every = max(1, count // _POINTS)
    drawn = []
    for number, (name, values) in enumerate(lines):
        colour = _COLOURS[number]
        across = wide / max(count - 1, 1)
        points = " ".join(
            f"{_LEFT + across * at:.1f},{30 + high * (1 - max(values[at : at + every]) / highest):.1f}"
            for at in range(0, count, every)
        )
        drawn.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
            f'<text x="{_WIDTH - 10 - 110 * (len(lines) - number - 1)}" y="18" fill="{colour}" text-anchor="end">'
            f"{escape(name)}</text>"
        )
    base = 30 + high
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">'
        f'<text x="{_LEFT}" y="18" font-weight="bold">{escape(title)}</text>'
        f'<line x1="{_LEFT}" y1="{base}" x2="{_WIDTH - 10}" y2="{base}" stroke="#bbb"/>'
        f'<text x="{_LEFT - 8}" y="36" text-anchor="end">{highest:g}</text>'
        f'<text x="{_LEFT - 8}" y="{base}" text-anchor="end">0</text>'
        f'<text x="{_LEFT}" y="{base + 16}">0 s</text>'
        f'<text x="{_WIDTH - 10}" y="{base + 16}" text-anchor="end">{max(count - 1, 0)} s</text>'
        f"{''.join(drawn)}</svg>"
    )
