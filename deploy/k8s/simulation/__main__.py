"""Runs the autoscaler of an overlay's manifest against a load and draws what happened.

`python -m deploy.k8s.simulation docs/deployment/autoscaling.svg` prints the same as a table. The load is a file with a
line for each step: the second, and the requests a second from then on, with a straight line between two steps.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from deploy.k8s.manifests import OVERLAYS, Manifest, build
from deploy.k8s.simulation.autoscaler import Autoscaler
from deploy.k8s.simulation.picture import Curve, draw
from deploy.k8s.simulation.service import Pod, Second, run

HERE = Path(__file__).parent


def load_of(file: Path) -> list[float]:
    """The requests a second of each second of a file of `second,requests_per_second`."""
    with file.open(newline="") as lines:
        steps = [(int(row["second"]), float(row["requests_per_second"])) for row in csv.DictReader(lines)]
    return [
        rate + (later_rate - rate) * (second - start) / (end - start)
        for (start, rate), (end, later_rate) in pairwise(steps)
        for second in range(start, end)
    ]


def pod_of(built: Sequence[Manifest], cpu_seconds: float, memory_bytes: float) -> Pod:
    """What the instances' Deployment asks for, with what was measured of one."""
    (deployment,) = (one for one in built if (one["kind"], one["metadata"]["name"]) == ("Deployment", "api"))
    requests = deployment["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"]
    cpu = float(requests["cpu"].removesuffix("m")) / (1000 if requests["cpu"].endswith("m") else 1)
    memory = float(requests["memory"].removesuffix("Mi")) * 1024 * 1024
    return Pod(cpu_request=cpu, memory_share=memory_bytes / memory, cpu_seconds=cpu_seconds)


def simulate(built: Sequence[Manifest], load: Sequence[float], pod: Pod) -> list[Second]:
    """Run the autoscaler of the instances against `load`."""
    (scaler,) = (one for one in built if (one["kind"], one["metadata"]["name"]) == ("HorizontalPodAutoscaler", "api"))
    return list(run(load, Autoscaler.parse(scaler), pod))


def table(seconds: Sequence[Second]) -> str:
    """The run as text: each minute's end with its worst latency and what failed in it, then what failed in all."""
    lines = [f"{'minute':>6} {'requests/s':>11} {'pods':>5} {'ready':>5} {'latency ms':>10} {'failed':>7}"]
    for start in range(0, len(seconds), 60):
        minute = seconds[start : start + 60]
        worst, failed = max(second.latency for second in minute), sum(second.failed for second in minute)
        last = minute[-1]
        lines.append(
            f"{start // 60:>6} {last.arriving:>11,.0f} {last.pods:>5} {last.ready:>5} "
            f"{worst * 1000:>10.1f} {failed:>7,.0f}"
        )
    total, failed = sum(second.arriving for second in seconds), sum(second.failed for second in seconds)
    return "\n".join([*lines, f"{failed:,.0f} of {total:,.0f} requests failed ({failed / total:.3%})", ""])


def main() -> None:
    """Simulate, print the table, and write the picture where one is asked for."""
    parser = argparse.ArgumentParser(prog="python -m deploy.k8s.simulation", description=__doc__)
    parser.add_argument("picture", nargs="?", type=Path, help="an SVG to write")
    parser.add_argument("--overlay", default="production", choices=OVERLAYS, help="whose manifests (production)")
    parser.add_argument("--load", type=Path, default=HERE / "sale.csv", help="a load (sale.csv)")
    # Measured in Compose, see docs/deployment/autoscaling.md: the mean of three kinds of reads.
    parser.add_argument("--cpu-ms", type=float, default=3.0, help="CPU of one request in milliseconds (3.0)")
    parser.add_argument("--memory-mb", type=float, default=120.0, help="memory of an instance in megabytes (120)")
    options = parser.parse_args()
    built = build(options.overlay)
    pod = pod_of(built, options.cpu_ms / 1000, options.memory_mb * 1_000_000)
    seconds = simulate(built, load_of(options.load), pod)
    sys.stdout.write(table(seconds))
    if options.picture:
        capacity = Curve("capacity", "#2a7", lambda second: second.ready / pod.cpu_seconds)
        options.picture.write_text(
            draw(
                seconds,
                f"The autoscaler of overlay {options.overlay} against {options.load.name}",
                [
                    [Curve("requests/s", "#c50", lambda second: second.arriving), capacity],
                    [
                        Curve("pods", "#26a", lambda second: second.pods),
                        Curve("ready", "#2a7", lambda second: second.ready),
                    ],
                    [Curve("mean latency, ms", "#739", lambda second: second.latency * 1000)],
                    [Curve("failed requests/s", "#c22", lambda second: second.failed)],
                ],
            )
        )


if __name__ == "__main__":
    main()
