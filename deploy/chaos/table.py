"""The failure table as it was measured: every cell played once, as JSON and as the table of a page.

    python -m deploy.chaos.table [--seconds 3] [--only redis]

It writes `loadtests/bench/results/failures.json` and what stands between the two marks of
`docs/patterns/failure-table.md`, unless a promise was broken; with `--only` it plays the cells whose name has that
part, and writes nothing.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deploy.chaos.faults import CELLS, Fault
from deploy.chaos.load import Load
from deploy.chaos.play import Played, Seen, opened
from deploy.chaos.stage import open_stage
from deploy.local import ClusterError
from deploy.local.layout import CHECKOUT
from deploy.local.terminal import Display, console

RESULTS = CHECKOUT / "loadtests" / "bench" / "results" / "failures.json"
PAGE = CHECKOUT / "docs" / "patterns" / "failure-table.md"
FIRST, LAST = "<!-- measured: make failure-table -->", "<!-- end -->"


def main() -> int:
    """Play the cells and write them down; returns 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description="Play the failure table.")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each fault lasts")
    parser.add_argument("--only", default="", help="cells whose name has this part, like redis or -killed")
    chosen = parser.parse_args()
    cells = [cell for cell in CELLS if chosen.only in cell.name]
    try:
        played = asyncio.run(_play(cells, chosen.seconds))
    except ClusterError as error:
        sys.exit(str(error))
    if any(each.problems for each in played):
        console.print("A promise was broken, as told above: nothing is written down.")
        return 1
    if not chosen.only:
        measured = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "cores": os.cpu_count()}
        told = {"measured": measured, "seconds": chosen.seconds, "cells": [entry(each) for each in played]}
        RESULTS.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(FIRST)
        _, _, after = rest.partition(LAST)
        when = f"On {measured['date']}, on {measured['cores']} cores."
        PAGE.write_text(f"{before}{FIRST}\n\n{when}\n\n{rows(told['cells'])}\n{LAST}{after}", encoding="utf-8")
    return 0


async def _play(cells: list[Fault], seconds: float) -> list[Played]:
    chance, done = random.Random(1), list[Played]()
    with tempfile.TemporaryDirectory(prefix="scaleout-chaos-") as folder, Display() as display:
        async with (
            open_stage(Path(folder) / "cluster", chance=chance, progress=display) as stage,
            opened(stage, Load(stage.cluster.url, chance)) as play,
        ):
            for cell in cells:
                with display.step(str(cell)):
                    done.append(await play.fault(cell, seconds))
                for problem in done[-1].problems:
                    console.print(f"  {problem}", style="red")
    return done


def entry(played: Played) -> dict[str, Any]:
    """Return what came of a cell as JSON can hold it; times are seconds, latencies milliseconds."""
    return {
        "target": played.fault.target.value,
        "kind": played.fault.kind.value,
        "reads": _seen(played.reads),
        "writes": _seen(played.writes),
        "served_after": round(played.served, 1),
        "settled_after": round(played.settled, 1),
        "problems": played.problems,
    }


def rows(cells: list[dict[str, Any]]) -> str:
    """Return the table of a page."""
    lines = [
        "| what breaks | how | reads meanwhile | writes meanwhile | served again after | all work done after |",
        "|---|---|---|---|---|---|",
    ]
    before = ""
    for cell in cells:
        named = "" if cell["target"] == before else cell["target"]
        before = cell["target"]
        seen = " | ".join(_in_words(cell[what]) for what in ("reads", "writes"))
        lines.append(
            f"| {named} | {cell['kind']} | {seen} | {_after(cell['served_after'])} | {cell['settled_after']} s |"
        )
    return "\n".join(lines) + "\n"


def _seen(seen: Seen) -> dict[str, Any]:
    told = asdict(seen)
    return told | {"median": round(seen.median), "slowest": round(seen.slowest)}


def _in_words(seen: dict[str, Any]) -> str:
    troubles = ", ".join(
        f"{times} times {status if int(status) else 'no answer'}" for status, times in sorted(seen["troubles"].items())
    )
    outcome = f"{troubles} of {seen['calls']}" if troubles else f"{seen['calls']}, all answered"
    return f"{outcome}; slowest {seen['slowest'] / 1000:.1f} s"


def _after(seconds: float) -> str:
    return f"{seconds} s" if seconds else "at once"


if __name__ == "__main__":
    sys.exit(main())
