"""What it costs to pass through layers of pure ASGI that do nothing: what merging them into one could save.

python -m loadtests.bench.layers
"""

import asyncio
import statistics
import sys
from time import process_time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

CALLS = 200_000
ROUNDS = 5


class Layer:
    """A layer that passes everything on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await self._app(scope, receive, send)


async def application(_scope: Scope, _receive: Receive, _send: Send) -> None:
    """Do nothing."""


async def _receive() -> Message:
    return {}


async def _send(_message: Message) -> None:
    return


async def cost(layers: int) -> float:
    """Return the CPU of one request through so many layers, in microseconds: the median of some rounds."""
    app: ASGIApp = application
    for _ in range(layers):
        app = Layer(app)
    found = []
    for _ in range(ROUNDS):
        began = process_time()
        for _ in range(CALLS):
            await app({"type": "http"}, _receive, _send)
        found.append((process_time() - began) / CALLS * 1e6)
    return statistics.median(found)


if __name__ == "__main__":
    for number in (1, 5):
        sys.stdout.write(f"{number} layers: {asyncio.run(cost(number)):.2f} us\n")
