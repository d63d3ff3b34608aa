"""What nearly every request asks Redis, over few multiplexed connections: one a server, however many callers.

redis-py takes a connection from a pool, runs it through several layers and gives it back: more than all else that a
cached read costs. Here a call goes to the server that holds its key: the one there is, the master that the sentinels
name, or a node of a cluster. While that one is not connected a call is refused at once; connecting happens beside.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha1
from typing import Any

from redis.crc import key_slot

from app.core import tracing
from app.core.addresses import Deployment, RedisAddress
from app.core.telemetry import REDIS_FAILURES, logger
from app.scaling.line import NEVER_THERE, Line, open_line
from app.scaling.redis_link import RedisDown

log = logger(__name__)

# While Redis is down a few attempts a second cost nothing, and it is back in use within that time.
RECONNECT_SECONDS = 0.25
# A server that takes no writes any more (a replica by now, a full disk) still answers reads, with what a write on
# another instance should have replaced. It is found out within this time, sooner than what a process keeps is too old.
LOOK_EVERY = 0.5  # seconds
_SLOTS = 16384


class Pipe:
    """The connections of one process to one Redis; `start` keeps them open until `stop`.

    Args:
        address: where Redis is.
        timeout: seconds for one call.
    """

    def __init__(self, address: RedisAddress, timeout: float) -> None:
        self._address = address
        self._timeout = timeout
        self._scripts: dict[str, str] = {}
        self._lines: dict[tuple[str, int], Line] = {}
        self._only: Line | None = None  # where all keys are on one server
        self._slots: list[tuple[str, int] | None] = []  # where they are not
        self._disturbed = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Connect; if Redis is not there now, go on trying in the background."""
        if not await self._connect():
            self._disturbed.set()
        self._keeping = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """Close the connections."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait({self._keeping})
        for line in self._lines.values():
            line.cut()

    @property
    def one_server(self) -> bool:
        """Whether all keys are on one server, so that one script may name any of them."""
        return self._address.deployment is not Deployment.CLUSTER

    def script(self, text: str) -> str:
        """Have the script at hand on every server, and return the digest by which `run` names it."""
        digest = sha1(text.encode(), usedforsecurity=False).hexdigest()  # Redis names scripts so
        if digest not in self._scripts:
            self._scripts[digest] = text
            for line in self._lines.values():
                with suppress(RedisDown):  # the next connection loads it
                    line.ask(("SCRIPT", "LOAD", text))
        return digest

    def run(self, digest: str, keys: Sequence[str], arguments: Sequence[str | int | bytes]) -> "asyncio.Future[Any]":
        """Run a script in one round trip and return the future of its answer; all keys share a slot.

        Raises:
            RedisDown: at once without a connection; from the future if it breaks, or no answer comes in time.
        """
        return _traced("script", self._line_of(keys[0]).ask(("EVALSHA", digest, len(keys), *keys, *arguments)))

    def ask(self, key: str, *command: str | int | bytes) -> "asyncio.Future[Any]":
        """Send a command to the server that holds `key` and return the future of its answer.

        Raises:
            RedisDown: as from `run`.
        """
        return _traced(str(command[0]), self._line_of(key).ask(command))

    def run_of(self, key: str) -> str:
        """Return which run of its server holds `key`: another one after a restart or a failover.

        Raises:
            RedisDown: if it is not known.
        """
        return self._line_of(key).run

    async def open(self, key: str) -> Line:
        """Return a connection of the caller's own to the server that holds `key`.

        Raises:
            RedisDown: if there is none.
        """
        line = self._line_of(key)
        host = next((host for host, known in self._lines.items() if known is line), None)
        if host is None:
            raise RedisDown("not connected")
        return await open_line(self._address, host, self._timeout, _nothing)

    def _line_of(self, key: str) -> Line:
        if self._only is not None:
            return self._only
        host = self._slots[key_slot(key.encode())] if self._slots else None
        if host is None or host not in self._lines:
            raise RedisDown("not connected")
        return self._lines[host]

    async def _keep(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY):
                    await self._disturbed.wait()
            if not self._disturbed.is_set():
                await self._look()
                continue
            self._disturbed.clear()
            if not await self._connect():
                await asyncio.sleep(RECONNECT_SECONDS)
                self._disturbed.set()

    async def _look(self) -> None:
        """Have a server refuse that takes no writes, which ends the connection to it; nodes of a cluster replace it."""
        if self._only is not None:
            with suppress(RedisDown):
                await self._only.ask(("DEL", NEVER_THERE))

    async def _connect(self) -> bool:
        """Find out where the keys are and open what is missing; return whether every key has its server."""
        try:
            slots = await self._locate()
        except RedisDown:
            return False
        hosts = {host for host in slots if host is not None}
        for host in [known for known, line in self._lines.items() if line.lost.done() or known not in hosts]:
            line = self._lines.pop(host)
            if line.lost.done():
                REDIS_FAILURES.labels("pipe").inc()
                log.warning("connection to redis lost")
            else:  # what is asked there is answered first
                asyncio.get_running_loop().call_later(self._timeout, line.cut)
        opened = await asyncio.gather(*(self._open(host) for host in hosts - self._lines.keys()))
        self._slots = slots if not self.one_server else []
        self._only = next(iter(self._lines.values()), None) if self.one_server else None
        return all(opened) and None not in slots

    async def _open(self, host: tuple[str, int]) -> bool:
        try:
            line = await open_line(self._address, host, self._timeout, self._disturbed.set)
            for text in self._scripts.values():
                await line.ask(("SCRIPT", "LOAD", text))
        except RedisDown:
            return False
        self._lines[host] = line
        return True

    async def _locate(self) -> list[tuple[str, int] | None]:
        """Return the server of each slot; of one for all where there is only one.

        Raises:
            RedisDown: if nobody says.
        """
        if self._address.deployment is Deployment.SERVER:
            return [self._address.hosts[0]]
        if self._address.deployment is Deployment.SENTINEL:
            plain = RedisAddress(Deployment.SERVER, self._address.hosts)
            host, port = await self._first(plain, "SENTINEL", "get-master-addr-by-name", self._address.service)
            return [(host.decode(), int(port))]
        slots: list[tuple[str, int] | None] = [None] * _SLOTS
        for first, last, (host, port, *_), *_ in await self._first(self._address, "CLUSTER", "SLOTS"):
            slots[first : last + 1] = [(host.decode(), port)] * (last + 1 - first)
        return slots

    async def _first(self, address: RedisAddress, *command: str) -> Any:
        """Return the first answer that any of the hosts gives, those first that are known to live."""
        for host in dict.fromkeys((*self._lines, *address.hosts) if not self.one_server else address.hosts):
            try:
                line = await open_line(address, host, self._timeout, _nothing, writes=False)
                try:
                    if answer := await line.ask(command):
                        return answer
                finally:
                    line.cut()
            except RedisDown:
                continue
        raise RedisDown("nobody says where the keys are")


def _nothing() -> None:
    return


def _traced(command: str, answer: "asyncio.Future[Any]") -> "asyncio.Future[Any]":
    """Have the trace at hand, if there is one, show how long the answer takes."""
    leaf = tracing.leaf("redis", command)
    if leaf is not None:
        answer.add_done_callback(leaf.end_with)
    return answer
