"""One open connection to one Redis server: questions in, answers in the same order out, or pushes to a listener.

The calls of one turn of the event loop leave in one write, answers are matched by their order, and a caller that goes
away leaves nothing behind. Whatever goes wrong is `RedisDown`, at once where it can be known at once.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import hiredis

from app.core.addresses import Deployment, RedisAddress
from app.scaling.redis_link import RedisDown, RedisFull

# Answers that nobody has read yet; past that Redis is not keeping up, and waiting in line would only add to it.
MOST_WAITING = 4096

# An event loop that is busy reads answers late, which says nothing about Redis: whatever has come by then is read
# before a timer of this length ends.
LOOK_AGAIN = 0.005  # seconds

# To delete it changes nothing, and is refused by a server that takes no writes.
NEVER_THERE = "never there"

# Replies of a cluster that say that a key is elsewhere, or will be in a moment: the connection is well.
_ELSEWHERE = ("MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN")


class Line(asyncio.Protocol):
    """A connection; `open_line` makes them.

    Args:
        timeout: seconds for an answer; one that takes longer breaks the connection off.
        disturbed: is called when the connection is lost, and when the server says that a key is elsewhere.
    """

    def __init__(self, timeout: float, disturbed: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout = timeout
        self._disturbed = disturbed
        self._reader = hiredis.Reader()
        self._pending: deque[tuple[float, asyncio.Future[Any]]] = deque()
        self._outgoing: list[bytes] = []
        self._watch: asyncio.TimerHandle | None = None
        self._suspect: asyncio.Future[Any] | None = None
        self._heard: Callable[[Any], None] | None = None
        self._transport: asyncio.Transport
        self.lost: asyncio.Future[None] = self._loop.create_future()
        # Which run of the server this is: another one after each restart, and another one on each server.
        self.run = ""

    def ask(self, command: tuple[str | int | bytes, ...]) -> asyncio.Future[Any]:
        """Send one command, with all others of this turn of the loop, and return the future of its answer.

        Raises:
            RedisDown: at once, if the connection is lost or does not keep up; else from the future.
        """
        if self.lost.done() or len(self._pending) >= MOST_WAITING:
            raise RedisDown("no connection that keeps up")
        answer: asyncio.Future[Any] = self._loop.create_future()
        now = self._loop.time()
        self._pending.append((now, answer))
        self._send(command)
        if self._watch is None:
            self._watch = self._loop.call_at(now + self._timeout, self._look)
        return answer

    def listen(self, heard: Callable[[Any], None], *channels: str) -> None:
        """Subscribe, and have everything that comes from now on handed to `heard`: nothing can be asked any more."""
        self._heard = heard
        self._send(("SUBSCRIBE", *channels))

    def ping(self, text: str) -> None:
        """Send a PING on a connection that listens; its answer is heard like all others, and in order with them."""
        if not self.lost.done():
            self._send(("PING", text))

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
            if self._heard is not None:
                self._heard(answer)
                continue
            _, waiting = self._pending.popleft()
            if isinstance(answer, Exception):
                self._refused(waiting, str(answer))
            elif not waiting.done():  # else its caller went away
                waiting.set_result(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell everybody who waits."""
        if self._watch is not None:
            self._watch.cancel()
        for _, waiting in self._pending:
            _fail(waiting, type(exc).__name__ if exc else "closed")
        self._pending.clear()
        if not self.lost.done():
            self.lost.set_result(None)
            self._disturbed()

    def _refused(self, waiting: asyncio.Future[Any], said: str) -> None:
        code = said.partition(" ")[0]
        full = "OOM" in said
        _fail(waiting, code, RedisFull if full else RedisDown)
        if code in _ELSEWHERE:
            self._disturbed()
        elif not full:  # a server that is full still answers what only reads
            # A restart may have lost the script, a replica refuses writes: in each case a new connection is needed.
            self.cut()

    def _send(self, command: tuple[str | int | bytes, ...]) -> None:
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(hiredis.pack_command(cast("Any", command)))  # typed as a tuple of one

    def _flush(self) -> None:
        if not self.lost.done():
            self._transport.write(b"".join(self._outgoing))
        self._outgoing.clear()

    def _look(self) -> None:
        # One timer for all calls: the oldest is the first that can be late.
        self._watch = None
        if not self._pending:
            return
        asked_at, oldest = self._pending[0]
        late_at = asked_at + self._timeout
        if late_at > self._loop.time():
            self._watch = self._loop.call_at(late_at, self._look)
        elif oldest is not self._suspect:
            self._suspect = oldest
            self._watch = self._loop.call_later(LOOK_AGAIN, self._look)
        else:
            self.cut()


def _fail(waiting: asyncio.Future[Any], reason: str, kind: type[RedisDown] = RedisDown) -> None:
    if not waiting.done():
        waiting.set_exception(kind(reason))
        waiting.exception()  # seen: a call whose caller has stopped caring is no bug to report


async def open_line(
    address: RedisAddress, host: tuple[str, int], seconds: float, disturbed: Callable[[], None], *, writes: bool = True
) -> Line:
    """Connect to a server of `address`, sign in and choose the database.

    Args:
        address: of the deployment.
        host: which of its servers.
        seconds: for all of it, and for each answer later.
        disturbed: as for `Line`.
        writes: whether it must take writes. One that takes none, as it is a replica, or its disk is full, or its
            replicas are gone, would go on showing what a write should have replaced.

    Raises:
        RedisDown: if it is not there, takes no writes, or does not answer within `seconds`.
    """
    secure = ssl.create_default_context() if address.tls else None
    line: Line | None = None
    try:
        async with asyncio.timeout(seconds):
            _, line = await asyncio.get_running_loop().create_connection(
                lambda: Line(seconds, disturbed), *host, ssl=secure
            )
            asked = []
            if address.password is not None:
                asked.append(line.ask(("AUTH", address.username or "default", address.password)))
            if address.database:
                asked.append(line.ask(("SELECT", address.database)))
            if writes and address.deployment is not Deployment.CLUSTER:  # whose nodes refuse the names of other nodes
                asked.append(line.ask(("DEL", NEVER_THERE)))
            *_, about, role = await asyncio.gather(*asked, line.ask(("INFO", "server")), line.ask(("ROLE",)))
    except (OSError, TimeoutError, RedisDown) as error:
        if line is not None:
            line.cut()
        raise RedisDown(type(error).__name__) from error
    if writes and role[0] != b"master":
        line.cut()
        raise RedisDown("not the master any more")
    line.run = about.partition(b"run_id:")[2][:12].decode()
    return line
