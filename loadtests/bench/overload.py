"""What an instance still does when three times as much is asked of it as it can do: with its gate, and without.

    python -m loadtests.bench.overload [--rounds 5] [--seconds 6]

Capacity is what 32 connections get that ask again as soon as they are answered. Then requests come at a fixed rate,
whatever becomes of those before: an answer counts if it is there within a second, as its client would wait no longer.
Nothing is tried again. How late the requests themselves came is told, as a load that falls behind asks for less.
It writes `results/overload.json` and `results/overload.svg`.
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import sys
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, cast
from urllib.parse import urlsplit

import httpx
import uvloop
from rich.console import Console

from loadtests.bench.__main__ import LOAD, PASSWORD, RESULTS, Side, machine, pin, serve, spent
from loadtests.bench.picture import draw_ratios
from loadtests.bench.servers import servers

# A read that asks Redis and a replica: nothing of it is at hand, as for most routes.
PATH = "/api/v1/profiles/me"
TIMES = 3
PATIENCE = 1.0  # seconds
# Enough to keep an instance busy, fewer than its gate lets in.
FEW = 32
# As many clients as can wait at once; without a gate each of them soon does, as with a crowd before a shop.
MANY = 1500
TICK = 0.002  # seconds between two looks at how many requests are due
_SHED = re.compile(r'^requests_shed_total\{reason="(\w+)"\} (\S+)$', re.MULTILINE)
console = Console()


@dataclass
class Flood:
    """What came of requests that were sent at a fixed rate: how many answered in time, and how long refusals took.

    Attributes:
        sent: that were due.
        unsent: of these, for which no client was left.
        good: answered well, and in time.
        statuses: how often each came.
        refusals: seconds that each took.
        late: seconds that the oldest of what was due had been due, at each look.
        cpu: seconds that the instance spent on it, its connections being made and closed not included.
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


class Client(asyncio.Protocol):
    """A connection that sends the request it is given and is idle again once the answer is whole."""

    def __init__(self, idle: "deque[Client]", flood: Flood) -> None:
        self._idle = idle
        self._flood = flood
        self._buffer = b""
        self._sent = 0.0
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Be idle."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own, no subclass of it
        self._idle.append(self)

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
        self._flood.note(int(head[9:12]), perf_counter() - self._sent)
        self._idle.append(self)

    def close(self) -> None:
        """Hang up."""
        self._transport.abort()


async def flood(side: Side, token: str, clients: int, seconds: float, rate: float | None = None) -> Flood:
    """Ask a side for so long, `rate` times a second, or else each client as soon as it is answered.

    A request for which no client is left is one that nobody answers.
    """
    parts, done, idle = urlsplit(side.urls[0]), Flood(), deque[Client]()
    loop = asyncio.get_running_loop()
    made = [
        await loop.create_connection(partial(Client, idle, done), parts.hostname or "", parts.port or 80)
        for _ in range(clients)
    ]
    request = f"GET {PATH} HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
    begun, started = spent(side), perf_counter()
    while (passed := perf_counter() - started) < seconds:
        due = len(idle) if rate is None else int(passed * rate) - done.sent
        done.sent += due
        done.unsent += max(0, due - len(idle))
        if rate is not None and due:
            done.late.append(due / rate)
        for _ in range(min(due, len(idle))):
            idle.popleft().ask(request)
        await asyncio.sleep(TICK)
    await asyncio.sleep(PATIENCE)
    done.cpu = spent(side) - begun
    for _, client in made:
        client.close()
    return done


def main() -> None:
    """Start the servers, measure, print, write, stop the servers."""
    parser = argparse.ArgumentParser(description="Goodput past capacity.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0)
    chosen = parser.parse_args()
    if (os.cpu_count() or 1) <= LOAD:
        sys.exit("The bench needs two cores: one for the instance, one for the servers and the load.")
    with ExitStack() as running:
        cluster, folder = running.enter_context(servers(replicas=1))
        for name in ("primary", "replica-1", "redis"):
            pin(cluster.process(name).pid or 0, LOAD)
        command = [sys.executable, "-m", "app.cli", "api", "--host", "127.0.0.1", "--port"]
        start = partial(serve, running, folder, command=command)
        own = cluster.environment | {"LOG_LEVEL": "warning"}
        gated = start("gate", "this service", environment=own)
        open_ = start(
            "no gate",
            "this service, which takes whatever comes",
            environment=own | {"REQUESTS_AT_ONCE": "10000", "REQUESTS_WAITING": "100000"},
        )
        pin(0, LOAD)
        result = compare((gated, open_), chosen.rounds, chosen.seconds)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "overload.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    title = f"At {TIMES} times what one instance can do, one core: answers within a second, against its peak"
    (RESULTS / "overload.svg").write_text(draw_ratios(title, cast("Any", result["ratios"])), encoding="utf-8")
    console.print_json(data=result)


def compare(sides: tuple[Side, Side], rounds: int, seconds: float) -> dict[str, object]:
    """Ask both sides in turn, and return for each what it did of its peak, and how fast it refused."""
    with httpx.Client(base_url=sides[0].urls[0]) as client:
        signed_in = client.post("/api/v1/sessions", json={"email": "ada@example.com", "password": PASSWORD})
        token = signed_in.raise_for_status().json()["token"]
    kept: dict[str, list[float]] = {side.name: [] for side in sides}
    peaks: dict[str, list[float]] = {side.name: [] for side in sides}
    costs: dict[str, list[float]] = {"answer": [], "refusal": [], "connection": []}
    refusals: list[float] = []
    late: list[float] = []
    unsent = 0
    for number in range(rounds + 1):
        for side in sides:
            few = uvloop.run(flood(side, token, FEW, seconds))
            peak, begun = few.good / seconds, spent(side)
            flooded = uvloop.run(flood(side, token, MANY, seconds, TIMES * peak))
            ended = spent(side)
            if not number:  # the first round compiles and connects
                continue
            peaks[side.name].append(peak)
            kept[side.name].append(flooded.good / seconds / peak)
            console.print(f"{side.name}: peak {peak:.0f}/s, {kept[side.name][-1]:.2f} of it kept, {flooded.statuses}")
            late += flooded.late
            if side is sides[0]:
                refusals += flooded.refusals
                unsent += flooded.unsent
                costs["answer"].append(few.cpu / few.good)
                left = flooded.cpu - flooded.statuses.get(200, 0) * costs["answer"][-1]
                costs["refusal"].append(left / max(1, len(flooded.refusals)))
                costs["connection"].append((ended - begun - flooded.cpu) / MANY)
    ratios = {
        "goodput / peak, with the gate": {"measured": round(statistics.median(kept["gate"]), 2), "at least": 0.8},
    }
    return {
        "ratios": ratios,
        "refused_by": _refused_by(sides[0].urls[0]),
        "goodput_of_peak": {name: [round(each, 2) for each in of] for name, of in kept.items()},
        "peak_requests_per_second": {name: [round(each) for each in of] for name, of in peaks.items()},
        # Of the gated instance's CPU; what is not spent on answers, at their price at the peak, is spent on refusals.
        "cpu_us": {what: round(statistics.median(of) * 1e6) for what, of in costs.items()},
        "refusal_p99_ms": _late(refusals),
        "load": {"late_p99_ms": _late(late), "unsent": unsent},
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
