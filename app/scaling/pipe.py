"""One multiplexed connection to Redis for the one script that nearly every request runs.

redis-py takes a connection from a pool, runs it through several layers and gives it back: more than all else that a
cached read costs. Here the calls of one turn of the loop leave in one write, answers are matched by their order, and a
caller that goes away leaves nothing behind. While there is no connection a call is refused at once.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha1
from typing import Any, cast

import hiredis
from redis.asyncio.connection import SSLConnection, parse_url

from app.core.settings import RedisSettings
from app.core.telemetry import REDIS_FAILURES, logger
from app.scaling.redis_link import RedisDown

log = logger(__name__)

# While Redis is down one attempt a second costs nothing, and it is back in use within that second.
RECONNECT_SECONDS = 1.0
# Answers that nobody has read yet; past that Redis is not keeping up, and waiting in line would only add to it.
MOST_WAITING = 4096


class Pipe:
    """The connection of one process; `start` keeps it open until `stop`.

    Args:
        settings: where Redis is and how long a call may take.
        script: the Lua that `run` runs.
    """

    def __init__(self, settings: RedisSettings, script: str) -> None:
        self._timeout = settings.timeout
        self._address = parse_url(settings.address)
        self._script = script
        self._digest = sha1(script.encode(), usedforsecurity=False).hexdigest()  # Redis names scripts so
        self._line: _Line | None = None
        self._keeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Connect; if Redis is not there now, go on trying in the background."""
        with suppress(RedisDown):
            await self._connect()
        self._keeping = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """Close the connection."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait({self._keeping})
        if self._line is not None:
            self._line.cut()

    def run(self, keys: Sequence[str], arguments: Sequence[str | int | bytes]) -> "asyncio.Future[Any]":
        """Run the script in one round trip and return the future of its answer.

        Raises:
            RedisDown: at once without a connection; from the future if it breaks, or no answer comes in time.
        """
        if self._line is None:
            raise RedisDown("not connected")
        return self._line.ask(("EVALSHA", self._digest, len(keys), *keys, *arguments))

    async def _keep(self) -> None:
        while True:
            if self._line is not None:
                await self._line.lost
                self._line = None
                REDIS_FAILURES.labels("pipe").inc()
                log.warning("connection to redis lost")
            with suppress(RedisDown):
                await self._connect()
                continue
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _connect(self) -> None:
        address = self._address
        secure = ssl.create_default_context() if address.get("connection_class") is SSLConnection else None
        try:
            async with asyncio.timeout(self._timeout):
                _, line = await asyncio.get_running_loop().create_connection(
                    lambda: _Line(self._timeout), address["host"], address.get("port", 6379), ssl=secure
                )
                if "password" in address:
                    await line.ask(("AUTH", address.get("username") or "default", address["password"]))
                await line.ask(("SELECT", address.get("db", 0)))
                await line.ask(("SCRIPT", "LOAD", self._script))
        except (OSError, TimeoutError, hiredis.HiredisError) as error:
            raise RedisDown(type(error).__name__) from error
        self._line = line


class _Line(asyncio.Protocol):
    """One open connection: questions in, answers in the same order out."""

    def __init__(self, timeout: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout = timeout
        self._reader = hiredis.Reader()
        self._pending: deque[tuple[float, asyncio.Future[Any]]] = deque()
        self._outgoing: list[bytes] = []
        self._watch: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport
        self.lost: asyncio.Future[None] = self._loop.create_future()

    def ask(self, command: tuple[str | int | bytes, ...]) -> asyncio.Future[Any]:
        """Send one command, with all others of this turn of the loop, and return the future of its answer."""
        if self.lost.done() or len(self._pending) >= MOST_WAITING:
            raise RedisDown("no connection that keeps up")
        answer: asyncio.Future[Any] = self._loop.create_future()
        now = self._loop.time()
        self._pending.append((now, answer))
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(hiredis.pack_command(cast("Any", command)))  # typed as a tuple of one
        if self._watch is None:
            self._watch = self._loop.call_at(now + self._timeout, self._look)
        return answer

    def cut(self) -> None:
        """Break the connection off; whoever waits on it is told."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way out."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own is no subclass of it

    def data_received(self, data: bytes) -> None:
        """Hand out the answers that are whole."""
        self._reader.feed(data)
        while (answer := self._reader.gets()) is not False:
            _, waiting = self._pending.popleft()
            if waiting.done():  # its caller went away
                continue
            if isinstance(answer, Exception):
                # A restart may have lost the script, a replica refuses writes: in each case a new connection is needed.
                waiting.set_exception(RedisDown(str(answer).partition(" ")[0]))
                self.cut()
            else:
                waiting.set_result(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell everybody who waits."""
        if self._watch is not None:
            self._watch.cancel()
        for _, waiting in self._pending:
            if not waiting.done():
                waiting.set_exception(RedisDown(type(exc).__name__ if exc else "closed"))
        self._pending.clear()
        if not self.lost.done():
            self.lost.set_result(None)

    def _flush(self) -> None:
        if not self.lost.done():
            self._transport.write(b"".join(self._outgoing))
        self._outgoing.clear()

    def _look(self) -> None:
        # One timer for all calls: the oldest is the first that can be late.
        self._watch = None
        if not self._pending:
            return
        late_at = self._pending[0][0] + self._timeout
        if late_at <= self._loop.time():
            self.cut()
        else:
            self._watch = self._loop.call_at(late_at, self._look)
