"""Two runs side by side: `python -m loadtests.load.compare A.json B.json`, or `make load-compare A=… B=…`.

It ends with 1 if B is worse where a threshold says what is wanted: missed where A kept it, or more than a tenth worse,
which is more than two runs of the same differ by.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtests.load import LoadError

MARGIN = 1.1
SAME, WORSE, MISUSED = 0, 1, 2
FIGURES = ("requests", "requests_per_second", "answered", "failed", "limited", "hit_rate", "p50", "p95", "p99")
ASKED = ("scenario", "tool", "users", "seconds")


def read(file: Path) -> dict[str, Any]:
    """Return the report in a file.

    Raises:
        LoadError: there is none.
    """
    try:
        found: dict[str, Any] = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise LoadError(f"{file} cannot be read as a report ({error}); `make load` writes them to load/.") from error
    if not {"figures", "thresholds", *ASKED} <= found.keys():
        raise LoadError(f"{file} is not a report of `make load`.")
    return found


def worse(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Return a sentence for each threshold at which the second run is worse."""
    before = {threshold["what"]: threshold for threshold in first["thresholds"]}
    found = []
    for threshold in second["thresholds"]:
        what, now = threshold["what"], threshold["measured"]
        was = before.get(what)
        if was is None:
            continue
        if was["held"] and not threshold["held"]:
            found.append(f"{what}: {now:g} is missed, {was['measured']:g} was kept.")
            continue
        # Of a share that should be near 1 the rest is what grows.
        at_least = threshold["bound"] == "at least"
        bad_before, bad_now = (1 - was["measured"], 1 - now) if at_least else (was["measured"], now)
        allowed = 1 - threshold["wanted"] if at_least else 0.0
        if bad_now > max(bad_before, allowed) * MARGIN:
            found.append(f"{what}: {now:g} after {was['measured']:g}.")
    return found


def table(first: dict[str, Any], second: dict[str, Any]) -> Table:
    """Return both runs, figure by figure."""
    shown = Table("", "A", "B", "B / A")
    for name in ASKED:
        shown.add_row(name, str(first[name]), str(second[name]), "")
    for name in FIGURES:
        one, other = first["figures"][name], second["figures"][name]
        ratio = f"{other / one:.2f}" if one and other is not None else ""
        shown.add_row(
            name.replace("_", " "), *("-" if value is None else f"{value:,g}" for value in (one, other)), ratio
        )
    return shown


def main() -> int:
    """Print the table and what is worse."""
    parser = argparse.ArgumentParser(description="Two load tests side by side.")
    parser.add_argument("first", type=Path, metavar="A")
    parser.add_argument("second", type=Path, metavar="B")
    chosen = parser.parse_args()
    console = Console()
    try:
        first, second = read(chosen.first), read(chosen.second)
    except LoadError as error:
        console.print(str(error), markup=False, soft_wrap=True)
        return MISUSED
    console.print(table(first, second))
    if any(first[name] != second[name] for name in ASKED):
        console.print("They were not asked the same, so the figures say little about each other.")
    found = worse(first, second)
    for sentence in found:
        console.print(f"Worse: {sentence}", markup=False, soft_wrap=True)
    return WORSE if found else SAME


if __name__ == "__main__":
    sys.exit(main())
