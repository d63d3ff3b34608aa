"""Runs the sides in turn, five rounds, each on a core of its own away from the load, and writes what came out.

    python -m loadtests.bench [--rounds 5] [--seconds 2] [--late-seconds 10]

Figures of a machine say little; the ratios of sides that were measured in turns on the same machine do. They and the
machine go to `results/bench.json` and `results/bench.svg`.
"""

import argparse
import asyncio
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import httpx
import psutil
from redis import Redis
from rich.console import Console

from deploy.local.cluster import Cluster
from loadtests.bench import KEY
from loadtests.bench.picture import draw
from loadtests.bench.servers import servers

HERE = Path(__file__).parent
RESULTS = HERE / "results"
# One core serves, another one asks; Redis runs beside the load, as it would run on another machine.
SERVER, LOAD = 0, 1
# Those whose late answers are looked at, with 1,000 connections.
LATE = ("a", "b", "c", "l1", "l2")
CONNECTIONS = 32
# Requests a second for each instance of a paced side: eight of them then use about half of their core.
PACE = 500
PASSWORD = "correct horse battery"  # noqa: S105  # of the seeded customers, printed by `make run`
console = Console()


@dataclass(frozen=True)
class Side:
    """One side: its name, what it is, the addresses of its instances, and their processes.

    Attributes:
        paced: whether each instance gets `CONNECTIONS` connections and `PACE` requests a second, however many there
            are; else all of them share `CONNECTIONS` connections that ask as fast as they are answered.
    """

    name: str
    what: str
    urls: tuple[str, ...]
    processes: tuple[psutil.Process, ...]
    paced: bool = False


def main() -> None:
    """Start everything, measure, print, write, stop everything."""
    parser = argparse.ArgumentParser(description="The hot path against its limit.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a run with few connections")
    # With 1,000 connections a request waits for up to half a second: many times that, or the run's end is measured.
    parser.add_argument("--late-seconds", type=float, default=10.0, help="of a run with 1,000 connections")
    chosen = parser.parse_args()
    if (os.cpu_count() or 1) <= LOAD:
        sys.exit("The bench needs two cores: one for the server, one for the load.")
    with ExitStack() as running:
        cluster, folder = running.enter_context(servers(replicas=1))
        sides, path, token = prepare(cluster, folder, running)
        result = measure(sides, path, token, chosen.rounds, (chosen.seconds, chosen.late_seconds))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "bench.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "bench.svg").write_text(draw(result), encoding="utf-8")
    console.print_json(data=result["ratios"])


def prepare(cluster: Cluster, folder: Path, running: ExitStack) -> tuple[list[Side], str, str]:
    """Start the sides and return them, with the path and the token that are asked with."""
    # Small pools: with all sides there are nineteen instances, and none of them asks the database.
    environment = cluster.environment | {"LOG_LEVEL": "info", "DATABASE_POOL_SIZE": "1"}
    # Nobody else refuses anybody for being busy either.
    environment |= {"REQUESTS_AT_ONCE": "2000", "REQUESTS_WAITING": "2000"}
    pin(cluster.process("redis").pid or 0, LOAD)
    start = partial(serve, running, folder)
    ours = [sys.executable, "-m", "app.cli", "api", "--host", "127.0.0.1", "--port"]
    bare = [sys.executable, "-m", "uvicorn", "--no-access-log", "--loop", "uvloop", "--http", "httptools", "--port"]
    plain = "FastAPI, one Redis GET, response_model"
    commands = [
        ("a", "bare ASGI, one Redis GET", [*bare[:-1], "loadtests.bench.bare:app", "--port"], {}),
        ("b", plain, [*bare[:-1], "loadtests.bench.plain:app", "--port"], {}),
        ("l2", "this service, from Redis", ours, {"CACHE_LOCAL_ENTRIES": "0"}),
        ("l1", "this service, at hand", ours, {}),
        (
            "routes",
            "l1 with 500 more routes",
            [*bare[:-1], "--factory", "loadtests.bench.crowded:create_app", "--port"],
            {},
        ),
    ]
    express = _install_express(folder)
    if express is not None:
        commands.insert(2, ("c", "Express, two Redis GETs", ["node", str(express / "server.js")], {}))
    sides = [start(name, what, command=line, environment=environment | more) for name, what, line, more in commands]
    for side, (*_, more) in zip(tuple(sides), commands, strict=True):
        if side.name in {"l1", "l2"}:
            sides += _eight(start, side, ours, environment | more)
    with httpx.Client(base_url=sides[-1].urls[0]) as client:
        credentials = {"email": "ada@example.com", "password": PASSWORD}
        signed_in = client.post("/api/v1/sessions", json=credentials).raise_for_status().json()
        path = f"/api/v1/profiles/{signed_in['profile_id']}"
        headers = {"Authorization": f"Bearer {signed_in['token']}"}
        body = client.get(path, headers=headers).raise_for_status().content
    with Redis.from_url(environment["REDIS_URL"]) as redis:
        redis.set(KEY, body)
        redis.set("bench:session", b'{"tier":"enterprise"}')
    return sides, path, signed_in["token"]


def measure(sides: list[Side], path: str, token: str, rounds: int, seconds: tuple[float, float]) -> dict[str, object]:
    """Ask all sides in turn, and return medians, ratios and the machine.

    Args:
        sides: all of them.
        path: what is asked for.
        token: who asks.
        rounds: how often each is asked.
        seconds: of a run with few connections, and of one with 1,000.
    """
    rates: dict[str, list[float]] = {side.name: [] for side in sides}
    late: dict[str, list[float]] = {side.name: [] for side in sides}
    spent: dict[str, list[float]] = {side.name: [] for side in sides}
    for side in sides:
        ask(side, path, token, CONNECTIONS, 1.0)  # what is compiled and connected at first use
    for number in range(rounds):
        for side in sides:
            asked = ask(side, path, token, CONNECTIONS, seconds[0])
            rates[side.name].append(asked["rate"])
            spent[side.name].append(asked["cpu"])
        for side in sides:
            if side.name in LATE:
                late[side.name].append(ask(side, path, token, 1000, seconds[1])["p99"])
        console.print(f"round {number + 1}", {name: round(of[-1]) for name, of in rates.items()})
    rate = {name: statistics.median(of) for name, of in rates.items()}
    p99 = {name: statistics.median(of) for name, of in late.items() if of}
    # The ratio of each round, then their median: what the machine did meanwhile was done to both.
    per_round = {
        f"{one} / {other}": round(statistics.median(x / y for x, y in zip(rates[one], rates[other], strict=True)), 2)
        for one, other in (("l2", "a"), ("l1", "a"), ("l1", "b"), ("l1", "c"))
        if other in rates
    }
    per_round["p99 l1 / p99 a, 1000 connections"] = round(
        statistics.median(x / y for x, y in zip(late["l1"], late["a"], strict=True)), 2
    )
    # Of CPU, because eight instances share one core here.
    per_round |= {
        f"CPU a request, {one} / {other}": round(
            statistics.median(x / y for x, y in zip(spent[one], spent[other], strict=True)), 2
        )
        for one, other in (
            ("a", "l2"),
            ("a", "l1"),
            ("l1 x 8 paced", "l1 paced"),
            ("l2 x 8 paced", "l2 paced"),
            ("l1 x 8", "l1"),
            ("l2 x 8", "l2"),
            ("routes", "l1"),
        )
    }
    return {
        "sides": {side.name: side.what for side in sides},
        "requests_per_second": {name: round(value) for name, value in rate.items()},
        "cpu_us_per_request": {name: round(statistics.median(of), 1) for name, of in spent.items()},
        "p99_ms_1000_connections": {name: round(value, 1) for name, value in p99.items()},
        "rounds": {name: [round(value) for value in of] for name, of in rates.items()},
        "ratios": per_round,
        "machine": machine(),
    }


def machine() -> dict[str, object]:
    """Return what has been measured on, when, and how busy it was."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "load_average_after": os.getloadavg()[0],
    }


def pin(process: int, core: int) -> None:
    """Keep a process on one core."""
    os.sched_setaffinity(process, {core})


def serve(
    running: ExitStack, folder: Path, name: str, what: str, *, command: list[str], environment: dict[str, str]
) -> Side:
    """Start a side on a core of its own until `running` ends, and return it once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = running.enter_context(_process(folder, name, command, port, environment))
    url = f"http://127.0.0.1:{port}"
    asyncio.run(answers(url))
    return Side(name, what, (url,), (process,))


def _eight(
    start: Callable[..., Side], one: Side, command: list[str], environment: dict[str, str]
) -> tuple[Side, Side, Side]:
    """Return eight instances that share the load of one, and one and eight with the same load for each."""
    more = [start(f"{one.name}-{number}", one.what, command=command, environment=environment) for number in range(7)]
    everyone = (one, *more)
    eight = Side(
        f"{one.name} x 8",
        f"{one.what}, eight instances",
        tuple(url for each in everyone for url in each.urls),
        tuple(process for each in everyone for process in each.processes),
    )
    one_paced, eight_paced = (
        replace(side, name=f"{side.name} paced", what=f"{side.what}, {PACE} requests a second each", paced=True)
        for side in (one, eight)
    )
    return eight, one_paced, eight_paced


@contextmanager
def _process(
    folder: Path, name: str, command: list[str], port: int, environment: dict[str, str]
) -> Iterator[psutil.Process]:
    arguments = command if command[0] == "node" else [*command, str(port)]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603  # our own programs
            arguments, env=environment | {"PORT": str(port)}, stdout=log, stderr=log
        )
        pin(process.pid, SERVER)
        try:
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(30)


async def answers(url: str) -> None:
    """Return once something answers at an address, whatever it says."""
    # With a score of others on the same core, starting takes its time.
    async with asyncio.timeout(180), httpx.AsyncClient(base_url=url) as client:
        while True:
            try:
                await client.get("/")
            except httpx.TransportError:
                await asyncio.sleep(0.1)
            else:
                return


def ask(side: Side, path: str, token: str, connections: int, seconds: float, *paths: Path) -> dict[str, float]:
    """Load a side for some seconds, with `path` or with each path of a file, and return what `load` has measured."""
    urls = ",".join(url + path for url in side.urls)
    instances = len(side.urls) if side.paced else 1
    command = [sys.executable, "-m", "loadtests.bench.load", urls, token, str(connections * instances), str(seconds)]
    command.append(str(PACE * instances if side.paced else 0))
    command += map(str, paths)
    before = spent(side)
    done = subprocess.run(  # noqa: S603  # our own program
        command,
        check=True,
        stdout=subprocess.PIPE,
        preexec_fn=partial(pin, 0, LOAD),
    )
    answer: dict[str, float] = json.loads(done.stdout)
    # What else the machine does makes a second shorter for everybody, but not the work of a request longer.
    return answer | {"cpu": (spent(side) - before) / answer["requests"] * 1e6}


def spent(side: Side) -> float:
    """Return the seconds of CPU that the processes of a side have used so far."""
    times = [process.cpu_times() for process in side.processes]
    return float(sum(each.user + each.system for each in times))


def _install_express(folder: Path) -> Path | None:
    if shutil.which("npm") is None:
        console.print("Side c is left out: it needs node and npm.")
        return None
    made = folder / "express"
    shutil.copytree(HERE / "express", made, ignore=shutil.ignore_patterns("node_modules"))
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund"]
    done = subprocess.run(command, cwd=made, check=False)  # noqa: S603  # fixed arguments
    return made if done.returncode == 0 else None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
