"""The whole cluster as its processes told of it last, with what has just happened to orders and profiles.

One instance gathers it twice a second while somebody watches, in one round trip however many watch, and not at all
otherwise. While Redis is away there is only what this process knows by itself, and the census says so.
"""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from time import time
from typing import Any, NamedTuple

from app.core import wire
from app.scaling.events import STREAM
from app.scaling.pipe import Pipe
from app.scaling.pulse import BEAT_SECONDS, FORGOTTEN_AFTER, GONE_AFTER, PULSES
from app.scaling.redis_link import RedisDown

# Minutes would be a report; this is about what happens now, and long enough for an order to come to its end.
WINDOW_SECONDS = 300
# Of the window, at most so many events are counted: 60 a second. A busier shop sees a shorter window, and its length.
MOST_EVENTS = 18_000
# Told with every census, so that a watcher who missed some, or comes from another instance, misses no event.
NEWEST_EVENTS = 30
# A read; what is more comes with the next one.
MOST_AT_ONCE = 1000

# Those that are long silent are removed. {milliseconds now, {"milliseconds pulse", …}}
_GATHER = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local found, kept = redis.call('HGETALL', KEYS[1]), {}
for i = 1, #found, 2 do
  if now - tonumber(string.match(found[i + 1], '^%d+')) > tonumber(ARGV[1]) * 1000 then
    redis.call('HDEL', KEYS[1], found[i])
  else
    kept[#kept + 1] = found[i + 1]
  end
end
return {now, kept}
"""


class Happened(NamedTuple):
    """One event of the stream, without whose it is: `subject` is the end of the id, enough to tell two apart."""

    id: str
    at: int
    event: str
    subject: str


class Census:
    """The census of the cluster, for those who watch it through this instance.

    Args:
        pipe: to the Redis that keeps pulses and events.
        own: what this process tells of itself, for when Redis does not answer.
    """

    def __init__(self, pipe: Pipe, own: Callable[[], dict[str, Any]]) -> None:
        self._pipe = pipe
        self._own = own
        self._gather = pipe.script(_GATHER)
        self._watchers = 0
        self._working: asyncio.Task[None] | None = None
        self._taken = asyncio.Event()
        self._latest = b""
        self._happened: deque[Happened] = deque(maxlen=MOST_EVENTS)
        self._counts: Counter[str] = Counter()

    @property
    def watched(self) -> bool:
        """Whether anything is asked of Redis at the moment."""
        return self._working is not None and not self._working.done()

    async def stop(self) -> None:
        """End the gathering."""
        if self._working is not None:
            self._working.cancel()
            await asyncio.wait({self._working})

    async def follow(self) -> AsyncGenerator[bytes]:
        """Yield each census as JSON from now on; who is slow misses some and gets the newest."""
        self._watchers += 1
        try:
            if self._working is None or self._working.done():
                self._working = asyncio.create_task(self._work(), name="census")
            while True:
                await self._taken.wait()
                yield self._latest
        finally:
            self._watchers -= 1

    async def _work(self) -> None:
        """Take a census again and again while somebody watches."""
        self._happened.clear()
        self._counts.clear()
        clock = asyncio.get_running_loop().time
        answered = -GONE_AFTER
        while self._watchers:
            try:
                self._tell(await self.take())
                answered = clock()
            except RedisDown:
                # One lost call says nothing yet: Redis has as long as everybody else.
                if clock() - answered > GONE_AFTER:
                    self._tell(self.alone())
            await asyncio.sleep(BEAT_SECONDS)

    async def take(self) -> dict[str, Any]:
        """Return the census: processes, Redis itself, the newest events, and how many of each kind there were.

        Raises:
            RedisDown: if Redis does not say; `alone` is what is known then.
        """
        asked = (
            self._pipe.run(self._gather, [PULSES], [FORGOTTEN_AFTER]),
            self._pipe.ask(PULSES, "INFO"),
            self._pipe.ask(STREAM, *self._what_is_new()),
        )
        (now, pulses), about, entries = await asyncio.gather(*asked)
        self._note(entries, now)
        processes = []
        for pulse in pulses:
            stamp, _, told = pulse.partition(b" ")
            age = (now - int(stamp)) / 1000
            with suppress(ValueError):  # of a release that tells in another way
                processes.append({**wire.decode(told), "at": int(stamp), "age": age, "gone": age > GONE_AFTER})
        return self._census(sorted(processes, key=_order), {"now": now, **_of_redis(about)})

    def alone(self) -> dict[str, Any]:
        """Return what this process knows by itself; that there is no `redis` says that others are not seen."""
        return self._census([{**self._own(), "at": int(time() * 1000), "age": 0.0, "gone": False}], None)

    def _tell(self, census: dict[str, Any]) -> None:
        self._latest = wire.encode(census)
        # Wakes those who wait now; who comes later waits for the next one.
        self._taken.set()
        self._taken = asyncio.Event()

    def _census(self, processes: list[dict[str, Any]], redis: dict[str, Any] | None) -> dict[str, Any]:
        newest = [event._asdict() for event in list(self._happened)[-NEWEST_EVENTS:]]
        return {
            "processes": processes,
            "redis": redis,
            "events": newest,
            "counts": +self._counts,
            "window": self._window() if len(self._happened) == MOST_EVENTS else WINDOW_SECONDS,
        }

    def _window(self) -> float:
        return (self._happened[-1].at - self._happened[0].at) / 1000

    def _what_is_new(self) -> tuple[str | int, ...]:
        if self._happened:
            return ("XRANGE", STREAM, f"({self._happened[-1].id}", "+", "COUNT", MOST_AT_ONCE)
        return ("XREVRANGE", STREAM, "+", "-", "COUNT", MOST_AT_ONCE)

    def _note(self, entries: list[Any], now: int) -> None:
        """Take in what is new, in its order, and let go of what is older than the window."""
        for entry, fields in sorted(entries, key=lambda found: _position(found[0])):
            named = dict(zip(fields[::2], fields[1::2], strict=True))
            if len(self._happened) == MOST_EVENTS:
                self._counts[self._happened.popleft().event] -= 1
            # Of an id the last part is random, where the first is the time: it tells two of one moment apart.
            event = Happened(
                entry.decode(), _position(entry)[0], named[b"event"].decode(), named[b"subject_id"].decode()[-6:]
            )
            self._happened.append(event)
            self._counts[event.event] += 1
        # The newest stays, as the place from which to read on.
        while len(self._happened) > 1 and self._happened[0].at < now - WINDOW_SECONDS * 1000:
            self._counts[self._happened.popleft().event] -= 1


def _position(entry: bytes) -> tuple[int, int]:
    milliseconds, _, number = entry.partition(b"-")
    return int(milliseconds), int(number)


def _order(process: dict[str, Any]) -> tuple[Any, ...]:
    return process["role"], process["name"], process["pid"]


def _of_redis(about: bytes) -> dict[str, int]:
    """Return what Redis says of itself: calls a second, bytes, connections."""
    known = dict(line.split(b":", 1) for line in about.splitlines() if b":" in line)
    wanted = {"calls": b"instantaneous_ops_per_sec", "bytes": b"used_memory", "connections": b"connected_clients"}
    return {name: int(known[field]) for name, field in wanted.items() if field in known}
