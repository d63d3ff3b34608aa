"""What an instance still does at three times its capacity: behind NGINX, asked directly, and without its gate.

    python -m loadtests.bench.overload [--rounds 5] [--seconds 10]

Capacity is what 32 connections get that ask again as soon as they are answered. Then requests come at three times that
rate, whatever becomes of those before: an answer counts if it is there within a second, as its client would wait no
longer. Nothing is tried again. How late the requests themselves came is told, as a load that falls behind asks for
less. Then come three times as many clients as an instance takes and lets wait, who all ask again as soon as they are
answered or refused, as impatient ones do. The three take turns of a quarter of a second: a machine whose speed changes
within seconds does it to all.

The load never sleeps, and gives way to whatever else wants its core. To wake a process that sleeps on another core took
an instance ten microseconds for each answer, a fifth of what a refusal costs, which no client on another machine costs
it. It writes `results/overload.json` and `results/overload.svg`.
"""

import argparse
import asyncio
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

import httpx
import uvloop
from rich.console import Console

from deploy.local import nginx
from deploy.local.cluster import Cluster
from deploy.local.ports import free_port
from deploy.local.servers import Binaries, unprivileged_account
from loadtests.bench.__main__ import LOAD, PASSWORD, RESULTS, Side, answers, machine, pin, serve, spent
from loadtests.bench.picture import draw_ratios
from loadtests.bench.servers import servers

# A read that asks Redis and a replica: nothing of it is at hand, as for most routes.
PATH = "/api/v1/profiles/me"
TIMES = 3
WANTED = 0.8
PATIENCE = 1.0  # seconds
# Enough to keep an instance busy, fewer than its gate lets in.
FEW = 32
# Three times as many as it takes (48) and lets wait (96).
IMPATIENT = 432
# The lowest priority that there is.
LAST = 19


class Turn(NamedTuple):
    """How a side is asked in one way, before it is asked in another.

    Attributes:
        settle: seconds of a flood that do not count, until it is as it goes on.
        seconds: that count, of a flood as of the peak.
        clients: whose requests come at three times the capacity.
    """

    settle: float
    seconds: float
    clients: int


# A gate is past a crowd after 40 ms. Without one a queue grows for as long as a client waits, and looks like service;
# and it grows to as many clients as there are.
GATED, OPEN = Turn(0.1, 0.25, 1500), Turn(PATIENCE, 2.0, 5000)
_SHED = re.compile(r'^requests_shed_total\{reason="(\w+)"\} (\S+)$', re.MULTILINE)
console = Console()


@dataclass
class Flood:
    """What came of requests that were sent in one turn: how many answered in time, and how long refusals took.

    Attributes:
        sent: that were due.
        unsent: of these, for which no client was left.
        good: answered well, and in time.
        statuses: how often each came.
        refusals: seconds that each took.
        late: seconds that the oldest of what was due had been due, at each look.
        cpu: seconds that the instance spent on it.
    """

    sent: int = 0
    unsent: int = 0
    good: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    refusals: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    cpu: float = 0.0

    def note(self, status: int, took: float) -> None:
        """Count an answer."""
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status == 200 and took <= PATIENCE:  # noqa: PLR2004 - HTTP
            self.good += 1
        elif status == 503:  # noqa: PLR2004 - HTTP
            self.refusals.append(took)


class Crowd:
    """Clients of one side, each with a connection that stays open."""

    def __init__(self, side: Side, token: str) -> None:
        parts = urlsplit(side.urls[0])
        self._side = side
        self._address = parts.hostname or "", parts.port or 80
        self._request = f"GET {PATH} HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
        self._clients: list[Client] = []
        self.idle: deque[Client] = deque()
        self.flood = Flood()

    async def connect(self, clients: int) -> None:
        """Open so many connections."""
        loop = asyncio.get_running_loop()
        for _ in range(clients):
            _, client = await loop.create_connection(partial(Client, self), *self._address)
            self._clients.append(client)

    def close(self) -> None:
        """Hang up."""
        for client in self._clients:
            client.close()

    async def ask(self, turn: Turn, rate: float | None = None) -> Flood:
        """Return what came of asking, once it had settled.

        Args:
            turn: for how long.
            rate: requests a second; without it each client asks as soon as it is answered.
        """
        await self._ask(turn.settle, rate)
        done = await self._ask(turn.seconds, rate)
        self.flood = Flood()
        ends = perf_counter() + PATIENCE
        while True:
            if len(self.idle) == len(self._clients) or perf_counter() > ends:
                return done
            await asyncio.sleep(0)

    async def _ask(self, seconds: float, rate: float | None) -> Flood:
        """Send what is due, and count what is answered meanwhile; what finds no idle client is answered by nobody."""
        done = self.flood = Flood()
        begun, started = spent(self._side), perf_counter()
        while (passed := perf_counter() - started) < seconds:
            due = len(self.idle) if rate is None else int(passed * rate) - done.sent
            done.sent += due
            done.unsent += max(0, due - len(self.idle))
            if rate is not None and due:
                done.late.append(due / rate)
            for _ in range(min(due, len(self.idle))):
                self.idle.popleft().ask(self._request)
            await asyncio.sleep(0)
        done.cpu = spent(self._side) - begun
        return done


class Client(asyncio.Protocol):
    """A connection that sends the request it is given and is idle again once the answer is whole."""

    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd
        self._buffer = b""
        self._sent = 0.0
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Be idle."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own, no subclass of it
        self._crowd.idle.append(self)

    def ask(self, request: bytes) -> None:
        """Send a request."""
        self._sent = perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Count an answer that is whole."""
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        start = head.lower().index(b"content-length:") + len(b"content-length:")
        if len(body) < int(head[start:].split(b"\r\n", 1)[0]):
            return
        self._buffer = b""
        self._crowd.flood.note(int(head[9:12]), perf_counter() - self._sent)
        self._crowd.idle.append(self)

    def close(self) -> None:
        """Hang up."""
        self._transport.abort()


@dataclass
class Round:
    """One side, asked in turns for what it can do, for three times as much, and by the impatient.

    Attributes:
        seconds: that each took, in all.
        peaks: what came of the first, turn by turn.
        floods: and of the second.
        impatient: and of the third.
    """

    seconds: float
    peaks: list[Flood] = field(default_factory=list)
    floods: list[Flood] = field(default_factory=list)
    impatient: list[Flood] = field(default_factory=list)

    @property
    def kept(self) -> float:
        """How much of the peak was answered in time, of three times as much."""
        return sum(flood.good for flood in self.floods) / sum(peak.good for peak in self.peaks)

    @property
    def kept_of_the_impatient(self) -> float:
        """How much of the peak was answered in time when the impatient asked."""
        return sum(flood.good for flood in self.impatient) / sum(peak.good for peak in self.peaks)

    def busy(self, asked: list[Flood]) -> float:
        """Return which part of the time the instance worked while it was asked so."""
        return sum(flood.cpu for flood in asked) / self.seconds

    @property
    def refusals(self) -> list[float]:
        """Seconds that each refusal took."""
        return [took for flood in self.floods for took in flood.refusals]

    @property
    def answer_cpu(self) -> float:
        """Seconds of CPU that an answer costs the instance at its peak."""
        return sum(peak.cpu for peak in self.peaks) / sum(peak.good for peak in self.peaks)

    @property
    def refusal_cpu(self) -> float:
        """Seconds of CPU that a refusal costs: what is not spent on answers, at their price at the peak."""
        answered = sum(flood.statuses.get(200, 0) for flood in self.floods)
        return (sum(flood.cpu for flood in self.floods) - answered * self.answer_cpu) / max(1, len(self.refusals))


async def play(side: Side, token: str, seconds: float, turn: Turn) -> Round:
    """Ask a side for so long in each way, in turns."""
    turns = math.ceil(seconds / turn.seconds)
    played = Round(turns * turn.seconds)
    few, many, impatient = (Crowd(side, token) for _ in range(3))
    await few.connect(FEW)
    await many.connect(turn.clients)
    await impatient.connect(IMPATIENT)
    for _ in range(turns):
        played.peaks.append(await few.ask(turn._replace(settle=0.0)))
        played.floods.append(await many.ask(turn, TIMES * played.peaks[-1].good / turn.seconds))
        played.impatient.append(await impatient.ask(turn))
    for crowd in (few, many, impatient):
        crowd.close()
    return played


def main() -> None:
    """Start the servers, measure, print, write, stop the servers."""
    parser = argparse.ArgumentParser(description="Goodput past capacity.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="of its peak, and of a flood, in each round and side"
    )
    chosen = parser.parse_args()
    if (os.cpu_count() or 1) <= LOAD:
        sys.exit("The bench needs two cores: one for the instance, one for the servers and the load.")
    with ExitStack() as running:
        cluster, folder = running.enter_context(servers(replicas=1))
        for name in ("primary", "replica-1", "redis"):
            pin(cluster.process(name).pid or 0, LOAD)
        pin(0, LOAD)  # and with it whatever it starts; the instances go to a core of their own
        command = [sys.executable, "-m", "app.cli", "api", "--host", "127.0.0.1", "--port"]
        start = partial(serve, running, folder, command=command)
        own = cluster.environment | {"LOG_LEVEL": "warning"}
        direct = start("direct", "this service, asked directly", environment=own)
        edge = running.enter_context(behind_nginx(cluster, direct))
        open_ = start(
            "no gate",
            "this service, which takes whatever comes, asked directly",
            environment=own | {"REQUESTS_AT_ONCE": "10000", "REQUESTS_WAITING": "100000"},
        )
        os.setpriority(os.PRIO_PROCESS, 0, LAST)
        result = compare((edge, direct, open_), chosen.rounds, chosen.seconds)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "overload.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    title = f"At {TIMES} times what one instance can do, one core: answers within a second, against its peak"
    (RESULTS / "overload.svg").write_text(draw_ratios(title, cast("Any", result["ratios"])), encoding="utf-8")
    console.print_json(data=result)


@contextmanager
def behind_nginx(cluster: Cluster, side: Side) -> Iterator[Side]:
    """Put NGINX in front of a side, as the cluster would; its CPU does not count as the side's."""
    port, account = free_port(), unprivileged_account()
    upstream = [urlsplit(url).port or 80 for url in side.urls]
    configuration = nginx.prepare(cluster.layout, port, upstream, account)
    binary = Binaries.find(cluster.layout, account, os.environ).nginx
    arguments = [str(binary), "-p", str(cluster.layout.nginx), "-e", "stderr", "-c", configuration.name]
    with (cluster.layout.logs / "nginx.log").open("wb") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log)  # noqa: S603  # our own configuration
        try:
            url = f"http://127.0.0.1:{port}"
            asyncio.run(answers(url))
            yield replace(side, name="behind NGINX", what="this service, behind NGINX", urls=(url,))
        finally:
            process.terminate()
            process.wait(30)


def compare(sides: tuple[Side, ...], rounds: int, seconds: float) -> dict[str, object]:
    """Ask all sides in turn, and return for each what it did of its peak, and how fast it refused.

    Args:
        sides: the last one has no gate.
        rounds: that count; one before them compiles and connects.
        seconds: of its peak, and of a flood, in each round and side.
    """
    with httpx.Client(base_url=sides[0].urls[0]) as client:
        signed_in = client.post("/api/v1/sessions", json={"email": "ada@example.com", "password": PASSWORD})
        token = signed_in.raise_for_status().json()["token"]
    played: dict[str, list[Round]] = {side.name: [] for side in sides}
    for number in range(rounds + 1):
        for side in sides:
            one = uvloop.run(play(side, token, seconds if number else 1.0, OPEN if side is sides[-1] else GATED))
            if number:
                played[side.name].append(one)
                told = f"{one.kept:.2f} of the peak kept, {one.kept_of_the_impatient:.2f} when the impatient ask"
                console.print(f"round {number}, {side.name}: {told}")
    gated = {side.name: played[side.name] for side in sides[:-1]}
    kept = {
        "rate": {name: [one.kept for one in of] for name, of in played.items()},
        "impatient": {name: [one.kept_of_the_impatient for one in of] for name, of in played.items()},
    }
    floods = [flood for of in gated.values() for one in of for flood in one.floods]
    return {
        "ratios": {
            f"{what}, {name}": {"measured": round(statistics.median(kept[how][name]), 2), "at least": WANTED}
            for how, what in (("rate", "goodput / peak"), ("impatient", "of impatient clients"))
            for name in gated
        },
        "sides": {side.name: side.what for side in sides},
        "goodput_of_peak": {
            how: {name: [round(each, 2) for each in of] for name, of in each_side.items()}
            for how, each_side in kept.items()
        },
        "peak_requests_per_second": {
            name: [round(sum(peak.good for peak in one.peaks) / one.seconds) for one in of]
            for name, of in played.items()
        },
        # Of the gated instance.
        "cpu_us": {
            name: {
                "answer": round(statistics.median(one.answer_cpu for one in of) * 1e6),
                "refusal": round(statistics.median(one.refusal_cpu for one in of) * 1e6),
            }
            for name, of in gated.items()
        },
        # Of the instance's core. Where it is not all, NGINX, the databases and the load wait for one another's.
        "busy": {
            name: {
                "peak": round(statistics.median(one.busy(one.peaks) for one in of), 2),
                "three times": round(statistics.median(one.busy(one.floods) for one in of), 2),
                "impatient": round(statistics.median(one.busy(one.impatient) for one in of), 2),
            }
            for name, of in gated.items()
        },
        "refusal_p99_ms": {name: _late([took for one in of for took in one.refusals]) for name, of in gated.items()},
        "refused_by": _refused_by(sides[-2].urls[0]),
        "load": {
            "late_p99_ms": _late([late for flood in floods for late in flood.late]),
            "unsent": sum(flood.unsent for flood in floods),
        },
        "machine": machine(),
    }


def _refused_by(url: str) -> dict[str, int]:
    """Return how many requests the gated instance has refused in all: before they were begun, by the door, or later."""
    found = _SHED.findall(httpx.get(f"{url}/metrics").raise_for_status().text)
    return {reason: int(float(number)) for reason, number in found}


def _late(seconds: list[float]) -> float:
    """Return the 99th percentile, in milliseconds."""
    return round(statistics.quantiles(seconds, n=100)[98] * 1000, 1)


if __name__ == "__main__":
    main()
