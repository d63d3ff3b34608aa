"""What more instances do: the throughput of 1, 2, 4 and 8 with the same share of a core each, and what follows.

    python -m loadtests.bench.scale [--rounds 3] [--seconds 4] [--share 0.1]

Instances have core 0 together and a share of it each by a control group, as if each were a small machine; the
databases, Redis and the load have core 1. The universal scalability law (Gunther) is fitted to the medians: its sigma
is the share of the work that waits for others, its kappa what each pair costs to agree. A simulation with the measured
service times is held to the same curve, and then says what one machine cannot show. It writes `results/scale.json` and
`.svg`, and the tables of docs/operations/scale.md.
"""

import argparse
import asyncio
import json
import math
import os
import resource
import statistics
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from scipy.optimize import curve_fit

from deploy.capacity.model import BESIDES, TARGET
from loadtests.bench.__main__ import LOAD, PASSWORD, RESULTS, Side, ask, machine, pin, serve, spent
from loadtests.bench.picture import draw_curve
from loadtests.bench.servers import servers
from loadtests.bench.share import share_of_a_core
from loadtests.bench.simulation import Times, closed, crowd

COUNTS = (1, 2, 4, 8)
# A read that asks Redis and a replica each time, as most routes do: what is shared is asked, too.
PATH = "/api/v1/profiles/me"
CLIENTS = 6  # of each instance: enough that it never waits for them
SERVERS = ("primary", "replica-1", "redis")
THOUGHT = 2.0  # seconds between two requests of a person, the mean of what the load tests take
CROWD_SECONDS = 3.0
MANY = 100  # instances
REGIONS = 4
PAGE = Path(__file__).parents[2] / "docs" / "operations" / "scale.md"
BEGIN, END = "<!-- measured: make bench-scale -->\n", "<!-- end -->\n"
console = Console()


def main() -> None:
    """Start the servers, measure, simulate, print, write, stop the servers."""
    parser = argparse.ArgumentParser(description="Throughput against instances.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--share", type=float, default=0.1, help="of a core, that each instance has")
    chosen = parser.parse_args()
    if (os.cpu_count() or 1) <= LOAD:
        sys.exit("The bench needs two cores: one for the instances, one for the servers and the load.")
    if not 0 < chosen.share * max(COUNTS) <= 1:
        sys.exit(
            f"--share {chosen.share:g}: {max(COUNTS)} instances have one core, so at most {1 / max(COUNTS):g} each."
        )
    with ExitStack() as running:
        cluster, folder = running.enter_context(servers(replicas=1))
        beside = [psutil.Process(cluster.process(name).pid or 0) for name in SERVERS]
        for server in beside:
            for each in (server, *server.children(recursive=True)):
                pin(each.pid, LOAD)
        command = [sys.executable, "-m", "app.cli", "api", "--host", "127.0.0.1", "--port"]
        # Small pools: eight instances on one server.
        own = cluster.environment | {"LOG_LEVEL": "warning", "DATABASE_POOL_SIZE": "3"}
        start = partial(serve, running, folder, command=command, environment=own)
        instances = [start(f"api-{number}", "this service") for number in range(1, max(COUNTS) + 1)]
        token = signed_in(instances[0].urls[0])
        for instance in instances:
            running.enter_context(share_of_a_core(instance.name, instance.processes[0].pid, chosen.share))
        result = measure(instances, beside, token, chosen.rounds, chosen.seconds)
    result |= fitted(result["requests_per_second"])
    result |= simulated(result, chosen.share)
    result |= {"share_of_a_core": chosen.share, "machine": machine()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scale.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "scale.svg").write_text(draw_curve(result), encoding="utf-8")
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")
    console.print_json(data={name: result[name] for name in ("requests_per_second", "fit", "simulation")})


def signed_in(url: str) -> str:
    """Wait until an instance is ready, and return the token of somebody who signed in there."""

    async def ready() -> str:
        async with asyncio.timeout(120), httpx.AsyncClient(base_url=url) as client:
            while not (await client.get("/health/ready")).is_success:  # noqa: ASYNC110  # another process
                await asyncio.sleep(0.1)
            person = {"email": "ada@example.com", "password": PASSWORD}
            answer = (await client.post("/api/v1/sessions", json=person)).raise_for_status()
            return str(answer.json()["token"])

    return asyncio.run(ready())


def measure(
    instances: list[Side], beside: list[psutil.Process], token: str, rounds: int, seconds: float
) -> dict[str, Any]:
    """Ask 1, 2, 4 and 8 instances in turns, and return their rates and what a request cost whom."""
    rates: dict[int, list[float]] = {count: [] for count in COUNTS}
    at_instance, at_servers = [], []
    for number in range(rounds + 1):
        for count in COUNTS:
            side = Side(
                f"{count} instances",
                "this service",
                tuple(url for each in instances[:count] for url in each.urls),
                tuple(process for each in instances[:count] for process in each.processes),
            )
            before, load_before = _spent(beside), resource.getrusage(resource.RUSAGE_CHILDREN)
            answer = ask(side, PATH, token, CLIENTS * count, seconds)
            load_after = resource.getrusage(resource.RUSAGE_CHILDREN)
            if not number:  # the first round compiles and connects
                continue
            rates[count].append(answer["rate"])
            at_instance.append(answer["cpu"])
            # The load has the same core as the servers; a second of it is a second less for them.
            load = load_after.ru_utime + load_after.ru_stime - load_before.ru_utime - load_before.ru_stime
            at_servers.append((_spent(beside) - before + load) / answer["requests"] * 1e6)
        console.print(f"round {number}", {count: round(of[-1]) for count, of in rates.items() if of})
    return {
        "requests_per_second": {str(count): round(statistics.median(of), 1) for count, of in rates.items()},
        "rounds": {str(count): [round(rate, 1) for rate in of] for count, of in rates.items()},
        "cpu_us_per_request": {
            "instance": round(statistics.median(at_instance), 1),
            "shared": round(statistics.median(at_servers), 1),
        },
    }


def _spent(beside: list[psutil.Process]) -> float:
    """Return the seconds of CPU of the servers with their children, those that have ended included."""
    every = [each for server in beside for each in (server, *server.children(recursive=True))]
    return spent(Side("servers", "", (), tuple(every)))


def law(instances: Any, one: float, sigma: float, kappa: float) -> Any:
    """Return the universal scalability law: what so many instances do, where one does `one`."""
    return one * instances / (1 + sigma * (instances - 1) + kappa * instances * (instances - 1))


def fitted(rates: dict[str, float]) -> dict[str, Any]:
    """Fit the law to the measured rates; none of its numbers can be below nought."""
    counts, measured = [float(count) for count in rates], list(rates.values())
    found, _ = curve_fit(law, counts, measured, p0=(measured[0], 0.01, 0.0001), bounds=(0, float("inf")))
    one, sigma, kappa = map(float, found)
    errors = [abs(law(count, one, sigma, kappa) / rate - 1) for count, rate in zip(counts, measured, strict=True)]
    return {
        "fit": {
            "one": round(one, 1),
            "sigma": round(sigma, 5),
            "kappa": round(kappa, 6),
            "largest_error": round(max(errors), 3),
        }
    }


def simulated(result: dict[str, Any], share: float) -> dict[str, Any]:
    """Simulate the measured arrangement, then what one machine cannot show."""
    cost = result["cpu_us_per_request"]
    times = Times(cost["instance"] / 1e6, cost["shared"] / 1e6)
    check = {
        count: round(closed(int(count), CLIENTS, times, share=share, seconds=20.0), 1)
        for count in result["requests_per_second"]
    }
    compared = {count: round(check[count] / rate, 2) for count, rate in result["requests_per_second"].items()}
    return {"simulation": {"requests_per_second": check, "simulated / measured": compared, "crowds": crowds(times)}}


def crowds(times: Times) -> list[dict[str, Any]]:
    """Simulate 10,000 and 50,000 people on as many instances as headroom asks for, on a hundred, and a region lost."""
    # What comes beside, and the headroom, are those of `scaleout plan`.
    dearer = Times(times.instance * BESIDES, times.shared)
    found = []
    for users, instances, regions in ((10_000, 0, 1), (50_000, 0, 1), (50_000, 0, REGIONS), (50_000, MANY, REGIONS)):
        rate = users / THOUGHT
        count = instances or REGIONS * math.ceil(rate * dearer.instance / TARGET / REGIONS)
        cores = max(2, math.ceil(rate * times.shared / TARGET))
        seen = crowd(users, count, dearer, cores, seconds=CROWD_SECONDS, regions=regions)
        case: dict[str, Any] = {
            "users": users,
            "instances": count,
            "regions": regions,
            **seen.told(CROWD_SECONDS, after=False),
        }
        if regions > 1:
            case["after_a_region_is_lost"] = seen.told(CROWD_SECONDS, after=True)
        found.append(case)
        console.print(case)
    return found


def written(page: str, result: dict[str, Any]) -> str:
    """Return the page with the tables of a result in its place."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables(result)}\n{END}{rest.partition(END)[2]}"


def tables(result: dict[str, Any]) -> str:
    """Return the picture, what was measured and what was simulated, as Markdown."""
    fit, simulation, taken = result["fit"], result["simulation"], result["machine"]
    cost = result["cpu_us_per_request"]
    lines = [
        "| instances | measured, requests/s | times one | law | simulation / measured |",
        "|---:|---:|---:|---:|---:|",
    ]
    one = result["requests_per_second"]["1"]
    for count, rate in result["requests_per_second"].items():
        expected = law(int(count), fit["one"], fit["sigma"], fit["kappa"])
        ratio = simulation["simulated / measured"][count]
        lines.append(f"| {count} | {rate:,.0f} | {rate / one:.2f} | {expected:,.0f} | {ratio:.2f} |")
    lines += [
        "",
        (
            f"Sigma {fit['sigma']:g}, kappa {fit['kappa']:g}; the law is off by {fit['largest_error']:.1%} at most. "
            f"A request cost its instance {cost['instance']:,.0f} us of CPU, and the servers and the load "
            f"{cost['shared']:,.0f} us. Measured on {taken['date']}, {taken['cores']} cores of {taken['processor']}."
        ),
        "",
        "**Simulation**, not measurement:",
        "",
        "| people | instances | regions | requests/s | p50, ms | p95, ms | failed | after a region is lost |",
        "|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for case in simulation["crowds"]:
        after = case.get("after_a_region_is_lost")
        lost = f"{after['p50_ms']:g} ms, {after['p95_ms']:g} ms, {after['failed']:.2%}" if after else ""
        lines.append(
            f"| {case['users']:,} | {case['instances']} | {case['regions']} | {case['requests_per_second']:,} "
            f"| {case['p50_ms']:g} | {case['p95_ms']:g} | {case['failed']:.2%} | {lost} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
