"""The map of shards as this process knows it, kept fresh enough that no read and no write goes astray.

Once a second it is read anew, off every request's path. A map may be used if it was true at most `LEASE` before the
use began; for a range that is being moved, only if it was asked for after the use began. Whoever moves a range tells
of it, waits until every lease has run out, and only then touches a row: so nobody is surprised, and only requests for
the range that is moving pay a round trip. With one shard there is nothing to know and nothing to ask.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from time import monotonic

from app.core.errors import Unavailable
from app.core.ids import LOGICAL_SHARDS
from app.core.telemetry import logger
from app.scaling.sharding import Range, ShardMap

log = logger(__name__)

POLL = 1.0  # seconds between two looks; each is one small statement on the catalog's primary
LEASE = 3.0  # seconds: two looks may fail before a request has to look for itself
# While the catalog does not answer, requests go by the last map and one in so many seconds tries it.
SILENCE = 1.0
# A write waits this long for the end of a hold, which takes well under a second; a mover that died holds nobody longer.
LONGEST_HOLD = 2.0
HOLD_POLL = 0.02  # seconds between two looks of a write that waits; all of a process share one look

ALONE = ShardMap.of_settings([(0, LOGICAL_SHARDS - 1)])


class LiveMap:
    """The map of one process.

    Args:
        shards: how many databases the settings name.
        load: asks the catalog's primary for the newest map; raises `Unavailable` if it does not answer.
        load_older: asks any node of the catalog, for a start while the primary is down.
    """

    def __init__(
        self, shards: int, load: Callable[[], Awaitable[ShardMap]], load_older: Callable[[], Awaitable[ShardMap]]
    ) -> None:
        self._alone = shards == 1
        self._load = load
        self._load_older = load_older
        self._known: ShardMap | None = ALONE if self._alone else None
        self._true_at = float("-inf")
        self._silent_until = float("-inf")
        self._asking = asyncio.Lock()
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Look once, then once a second."""
        if not self._alone:
            with suppress(Unavailable):
                await self._ask(monotonic())
            self._watcher = asyncio.create_task(self._watch(), name="watch the map of shards")

    async def stop(self) -> None:
        """End the looking."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)

    @property
    def latest(self) -> ShardMap:
        """The map as last seen, without asking; for people, and where being late does no harm.

        Raises:
            Unavailable: if none was ever seen.
        """
        if self._known is None:
            raise Unavailable("Where the data is cannot be asked now; try again.", code="database_down")
        return self._known

    async def now(self, logical: int | None = None) -> ShardMap:
        """Return a map that is true for a logical shard, or for all of them, at some moment after the call.

        While the catalog does not answer it is the last one: nothing can be switched then either.

        Raises:
            Unavailable: if none was ever seen.
        """
        if not self._alone:
            began = monotonic()
            lease = 0.0 if self._known is None or self._known.may_change(logical) else LEASE
            if began - self._true_at > lease:
                await self._ask(began)
        return self.latest

    async def for_writing(self, logical: int) -> ShardMap:
        """Return the same for a write, once writes for the logical shard are not held back."""
        if self._alone:
            return self.latest
        found = await self.now(logical)
        give_up = monotonic() + LONGEST_HOLD
        while found.holds_back(logical) and monotonic() < give_up:
            await asyncio.sleep(HOLD_POLL)
            found = await self.now(logical)
        return found

    def doubt(self) -> None:
        """Ask again before the next use: a database has refused a write that the map sent there."""
        self._true_at = float("-inf")

    async def _ask(self, began: float) -> None:
        """See to it that the map is from after `began`; callers at once share one look."""
        async with self._asking:
            if self._true_at >= began or monotonic() < self._silent_until:
                return
            asked = monotonic()
            try:
                self._take(await self._load())
                self._true_at = asked
            except Unavailable:
                self._silent_until = monotonic() + SILENCE
                if self._known is None:
                    self._take(await self._load_older())

    def _take(self, found: ShardMap) -> None:
        if self._known is None or found.epoch > self._known.epoch:
            if self._known is not None:
                log.info("the map of shards has changed", epoch=found.epoch)
            self._known = found

    async def _watch(self) -> None:
        while True:
            # Jittered, so that many processes do not ask in step.
            await asyncio.sleep(POLL * random.uniform(0.8, 1.2))
            try:
                await self._ask(monotonic())
            except Unavailable as error:
                log.warning("the map of shards is not known", reason=str(error))


def ranges_in_words(ranges: tuple[Range, ...]) -> str:
    """Return ranges as people write them: `0-511, 768-1023`."""
    return ", ".join(f"{place.first}-{place.last}" for place in ranges) or "none"
