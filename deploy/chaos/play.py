"""One fault on a stage with clients: broken for a while, then watched until everything is as before, then judged.

What is judged is the same for every fault: what clients were answered while it lasted, that they are served again and
all work is done without anybody's help, and that what they saw and what is left agrees with every promise.
"""

import asyncio
import random
import statistics
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

from deploy.chaos.audit import Audit, Holdings
from deploy.chaos.faults import CELLS, Fault, broken
from deploy.chaos.history import Call, Span, violations
from deploy.chaos.load import Load
from deploy.chaos.stage import Stage

T = TypeVar("T")

# Seconds for which nothing may fail before clients count as served again: several requests of every session.
CALM = 1.0
LOOK_EVERY = 0.1
# Seconds in which a service that finds its way back has done so; one that does not never will. The slowest way is a
# worker's, which asks a broker that is away every 2, 4, 6 … s, and then a task's that waits up to 30 s to be tried.
PATIENCE = 120.0
# Of a storm: how long each fault lasts, and how long after it the next one comes. Some end before anybody has noticed,
# some come while the way back from the one before has just begun.
LASTS = (0.3, 4.0)
APART = (0.2, 3.0)
# Seconds in which every process has found its Redis again, and has told it what it missed.
REDIS_BACK = 5.0
# What only says that somebody else was faster: another session changed the profile; the same order is being placed.
ANSWERED = frozenset({409, 412})


@dataclass(slots=True)
class Seen:
    """What clients saw of one kind of calls: how many, statuses that were no success, and milliseconds."""

    calls: int
    troubles: dict[int, int]
    median: float
    slowest: float

    @classmethod
    def of(cls, calls: list[Call]) -> "Seen":
        """Sum up calls."""
        took = [(call.ended - call.begun) * 1000 for call in calls]
        troubles = Counter(call.status for call in calls if failed(call))
        return cls(len(calls), dict(troubles), statistics.median(took or [0]), max(took, default=0))


@dataclass(slots=True)
class Played:
    """What came of one fault; moments and durations are seconds.

    Attributes:
        begun: when it began, `mended` when it was over.
        served: after its end, until nothing failed any more.
        settled: after its end, until every order was at its end, with its invoice and its mail.
        problems: in words; none if every promise was kept.
    """

    fault: Fault
    begun: float
    mended: float
    reads: Seen
    writes: Seen
    served: float = 0.0
    settled: float = 0.0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Occurred:
    """One fault of a storm; moments are seconds."""

    fault: Fault
    begun: float
    mended: float


@dataclass(slots=True)
class Storm:
    """What came of many faults, one after the other without a rest; moments and durations are seconds."""

    faults: list[Occurred]
    begun: float
    ended: float
    settled: float
    problems: list[str]


def failed(call: Call) -> bool:
    """Say whether a client would call that a failure."""
    return not call.ok and call.status not in ANSWERED


class Play:
    """Plays faults on a stage, one after the other; see `opened`.

    Attributes:
        load: the clients.
        weak: times in which sessions were bound by nothing but their tokens.
        phase: what is going on, in words for people.
    """

    def __init__(self, stage: Stage, load: Load) -> None:
        self.load = load
        self.weak: list[Span] = []
        self.phase = "clients begin"
        self._stage = stage
        self._audit = Audit(stage, load)
        self._before: Holdings
        self._told: set[str] = set()

    async def begin(self) -> None:
        """Let the clients ask for a moment, and note what the processes hold after it."""
        self.load.go_on()
        await asyncio.sleep(CALM)
        await self._rest()

        async def held() -> bool:
            holdings = await self._audit.holdings()
            if holdings is None:
                return False
            self._before = holdings
            return True

        await _until(held, "a process is down")
        self.load.go_on()

    async def fault(self, fault: Fault, seconds: float) -> Played:
        """Break something for so long, watch the way back, and judge."""
        begun, self.phase = monotonic(), "it lasts"
        async with broken(self._stage, fault):
            await asyncio.sleep(seconds)
        mended, problems = monotonic(), list[str]()
        self.phase = "over; clients are served again?"
        served = await self._come_back(self._served(mended), problems) or 0.0
        if fault.weakens_sessions:
            self.weak.append(Span(begun, mended + served + REDIS_BACK))
        meanwhile = [call for call in self.load.calls if call.ended > begun and call.begun < mended + served]
        played = Played(
            fault,
            begun,
            mended,
            reads=Seen.of([call for call in meanwhile if not call.is_write]),
            writes=Seen.of([call for call in meanwhile if call.is_write]),
            served=served,
            problems=problems,
        )
        for seen, may, what in ((played.reads, fault.reads_may, "reads"), (played.writes, fault.writes_may, "writes")):
            played.problems += [
                f"{times} {what} got {status}" for status, times in seen.troubles.items() if status not in may
            ]
        self.phase = "clients rest; is all work done?"
        await self._come_back(self._rest(), problems)
        played.settled = monotonic() - mended
        self.phase = "comparing what clients saw with what is left"
        played.problems += await self._judged(mails_may_repeat=fault.mails_may_repeat)
        self.load.go_on()
        return played

    async def storm(self, chance: random.Random, seconds: float) -> Storm:
        """Let faults come and go for so long, at times and of kinds that `chance` decides, and judge in the end."""
        begun = monotonic()
        occurred = []
        while (now := monotonic()) < begun + seconds:
            fault = chance.choice(CELLS)
            async with broken(self._stage, fault):
                await asyncio.sleep(chance.uniform(*LASTS))
            occurred.append(Occurred(fault, now, monotonic()))
            await asyncio.sleep(chance.uniform(*APART))
        ended = monotonic()
        problems = list[str]()
        await self._come_back(self._served(ended), problems)
        self.weak += [Span(each.begun, each.mended + REDIS_BACK) for each in occurred if each.fault.weakens_sessions]
        meanwhile = [call for call in self.load.calls if call.ended > begun]
        may = frozenset[int]().union(*(each.fault.writes_may | each.fault.reads_may for each in occurred))
        troubles = Counter(call.status for call in meanwhile if failed(call))
        problems += [f"{times} requests got {status}" for status, times in troubles.items() if status not in may]
        await self._come_back(self._rest(), problems)
        settled = monotonic() - ended
        problems += await self._judged(mails_may_repeat=any(each.fault.mails_may_repeat for each in occurred))
        self.load.go_on()
        return Storm(occurred, begun, ended, settled, problems)

    async def _come_back(self, waiting: Coroutine[Any, Any, T], problems: list[str]) -> T | None:
        """Wait for something that has to come by itself; if it does not, that is a problem."""
        try:
            return await waiting
        except TimeoutError as error:
            problems.append(str(error))
            return None

    async def _served(self, mended: float) -> float:
        """Wait until every kind of call has succeeded and nothing has failed for a moment; return when that began."""

        def last_failure() -> float:
            return max((call.ended for call in self.load.calls if failed(call) and call.ended > mended), default=mended)

        async def calm() -> bool:
            since = last_failure()
            fine = {call.what for call in self.load.calls if call.ok and call.begun > since}
            return monotonic() - since > CALM and fine >= {"read", "write", "order", "look", "browse"}

        await _until(calm, "clients are not served again")
        return last_failure() - mended

    async def _rest(self) -> None:
        """Let the clients rest, and wait until everything that follows from what they did is done."""
        try:
            async with asyncio.timeout(PATIENCE):
                await self.load.rest()
        except TimeoutError as error:
            raise TimeoutError(f"After {PATIENCE:.0f} s a client still waits for its answer.") from error

        # However long there is progress: how fast a backlog drains is up to the machine.
        fewest, since = await self._audit.open_messages(), monotonic()
        while fewest:
            await asyncio.sleep(LOOK_EVERY)
            now = await self._audit.open_messages()
            if now < fewest:
                fewest, since = now, monotonic()
            elif monotonic() - since > PATIENCE:
                raise TimeoutError(f"For {PATIENCE:.0f} s nothing more was done, and {now} messages are not.")

    async def _judged(self, *, mails_may_repeat: bool) -> list[str]:
        found = await self._audit.problems(mails_may_repeat=mails_may_repeat)
        found += violations(self.load.calls, await self.load.end(), self.weak)

        leaks = ["a process is down"]

        async def nothing_leaks() -> bool:
            held = await self._audit.holdings()
            leaks[:] = held.more_than(self._before) if held else ["a process is down"]
            return not leaks

        try:
            await _until(nothing_leaks, "something leaks")
        except TimeoutError:
            found += leaks
        new = [problem for problem in found if problem not in self._told]
        self._told.update(new)
        return new


@asynccontextmanager
async def opened(stage: Stage, load: Load) -> AsyncIterator[Play]:
    """Let clients ask on a stage inside the block."""
    async with load.running():
        play = Play(stage, load)
        await play.begin()
        yield play


async def _until(so: Callable[[], Awaitable[bool]], otherwise: str) -> None:
    """Wait until it is so.

    Raises:
        TimeoutError: saying `otherwise`.
    """
    try:
        async with asyncio.timeout(PATIENCE):
            while True:
                if await so():
                    return
                await asyncio.sleep(LOOK_EVERY)
    except TimeoutError as error:
        raise TimeoutError(f"After {PATIENCE:.0f} s {otherwise}.") from error
