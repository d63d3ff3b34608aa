"""The load: connections that each send the next request as soon as an answer is whole, as raw bytes.

A client of its own because a general one costs more of its core than the server of its: the generator must never be
what is measured. It fails at the first answer that is not a success.
"""

import asyncio
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import cast
from urllib.parse import urlsplit

import uvloop


@dataclass(frozen=True, slots=True)
class Measured:
    """Requests in all and in a second, and latencies in milliseconds."""

    requests: int
    rate: float
    p50: float
    p99: float


class Wrong(Exception):
    """An answer that is no success: nothing was measured."""


class Connection(asyncio.Protocol):
    """One connection that asks again and again, once `begin` is called.

    Args:
        requests: what it sends.
        latencies: where it notes how long each took.
        done: told when it has ended.
        pause: seconds from one request to the next, or until the answer is there if that takes longer.
    """

    def __init__(
        self, requests: Iterator[bytes], latencies: list[float], done: asyncio.Future[None], pause: float = 0.0
    ) -> None:
        self._requests = requests
        self._pause = pause
        self._until = 0.0
        self._latencies = latencies
        self.done = done
        self._buffer = b""
        self._sent = 0.0
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way out; `begin` sends the first request."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own, no subclass of it

    def begin(self, until: float) -> None:
        """Send the first request, and go on until that moment."""
        self._until = until
        self._ask()

    def data_received(self, data: bytes) -> None:
        """Count an answer that is whole, and ask again."""
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        if head[:10] != b"HTTP/1.1 2":
            self._end(Wrong(self._buffer[:2000].decode("latin-1")))
            return
        start = head.lower().index(b"content-length:") + len(b"content-length:")
        if len(body) < int(head[start:].split(b"\r\n", 1)[0]):
            return
        now = perf_counter()
        self._latencies.append(now - self._sent)
        self._buffer = b""
        if now < self._until:
            wait = self._sent + self._pause - now
            if wait > 0:
                asyncio.get_running_loop().call_later(wait, self._ask)
            else:
                self._ask()
        else:
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """A connection that the server cuts is an error, ours is none."""
        self._end(exc or Wrong("the server closed the connection"))

    def _ask(self) -> None:
        self._sent = perf_counter()
        self._transport.write(next(self._requests))

    def _end(self, error: Exception | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)
        self._transport.close()


def _given(connection: Connection) -> Connection:
    return connection


async def measure(
    urls: Sequence[str], token: str, connections: int, seconds: float, *, rate: float = 0.0, paths: Sequence[str] = ()
) -> Measured:
    """Load `urls`, each with its share of the connections, and return what they served in some seconds.

    Args:
        urls: one, or several that share the load.
        token: who asks.
        connections: in all.
        seconds: for which.
        rate: requests in a second at most, spread evenly over the connections; 0 for as many as are answered.
        paths: are asked for in turn, instead of the path of the first URL.

    Raises:
        Wrong: at the first answer that is no success.
    """
    first = urlsplit(urls[0])
    head = f"HTTP/1.1\r\nHost: {first.netloc}\r\nAuthorization: Bearer {token}\r\n\r\n"
    requests = cycle([f"GET {path} {head}".encode() for path in paths or (first.path,)])
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    pause = connections / rate if rate else 0.0
    made = [Connection(requests, latencies, loop.create_future(), pause) for _ in range(connections)]
    for connection, url in zip(made, cycle(urls), strict=False):
        parts = urlsplit(url)
        await loop.create_connection(partial(_given, connection), parts.hostname or "", parts.port or 80)
    started = perf_counter()
    for number, connection in enumerate(made):
        # Not all at once: paced connections would stay in step.
        loop.call_later(pause * number / connections, connection.begin, started + seconds)
    await asyncio.gather(*(connection.done for connection in made))
    percentiles = statistics.quantiles(latencies, n=100)
    rate = len(latencies) / (perf_counter() - started)
    return Measured(len(latencies), rate, percentiles[49] * 1000, percentiles[98] * 1000)


if __name__ == "__main__":
    addresses, bearer, number, duration, most, *files = sys.argv[1:]
    lines = [line for file in files for line in Path(file).read_text(encoding="utf-8").splitlines()]
    measured = uvloop.run(
        measure(addresses.split(","), bearer, int(number), float(duration), rate=float(most), paths=lines)
    )
    sys.stdout.write(json.dumps(asdict(measured)))
