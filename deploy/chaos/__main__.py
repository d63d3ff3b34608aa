"""A storm of faults over the local cluster, for minutes, with a report.

    python -m deploy.chaos [--minutes 1] [--seed 7] [--into chaos]

The same seed brings the same faults; when clients meet them is up to the machine. It writes `chaos-SEED.json` and
`chaos-SEED.svg`, and its exit code is 1 if a promise was broken.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from deploy.chaos.load import Load
from deploy.chaos.play import opened
from deploy.chaos.report import draw, summary
from deploy.chaos.stage import open_stage
from deploy.local import ClusterError
from deploy.local.terminal import Display, console


def main() -> int:
    """Start a stage, let the storm pass, write the report; returns the exit code."""
    parser = argparse.ArgumentParser(description="Faults that come and go while clients use the local cluster.")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10_000))
    parser.add_argument("--into", type=Path, default=Path("chaos"), help="folder of the report")
    chosen = parser.parse_args()
    try:
        told = asyncio.run(_storm(chosen.minutes * 60, chosen.seed))
    except ClusterError as error:
        sys.exit(str(error))
    chosen.into.mkdir(parents=True, exist_ok=True)
    report = chosen.into / f"chaos-{chosen.seed}"
    report.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    report.with_suffix(".svg").write_text(draw(told), encoding="utf-8")
    for violation in told["violations"]:
        console.print(violation, style="red")
    console.print(
        f"{told['requests']} requests, {len(told['faults'])} faults, {len(told['violations'])} promises broken; "
        f"all work was done {told['settled_after']} s after the last fault. {report}.json, {report}.svg"
    )
    return 1 if told["violations"] else 0


async def _storm(seconds: float, seed: int) -> dict[str, Any]:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="scaleout-chaos-") as folder, Display() as display:
        async with (
            open_stage(Path(folder) / "cluster", chance=chance, progress=display) as stage,
            opened(stage, Load(stage.cluster.url, chance)) as play,
        ):
            with display.step(f"Faults for {seconds:.0f} s, seed {seed}"):
                storm = await play.storm(random.Random(seed), seconds)
            return summary(storm, [call for call in play.load.calls if call.ended > storm.begun], seed)


if __name__ == "__main__":
    sys.exit(main())
