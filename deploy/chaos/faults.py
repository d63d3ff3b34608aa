"""What can go wrong, as one table: a target and a kind of trouble, how it is done, and what clients may see of it.

The table is `CELLS`; `broken` makes one of them true inside a block. Nothing here mends anything: when the block ends
the trouble is over, and what was broken has to find its way back by itself.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import psutil

from deploy.chaos.doors import Weather
from deploy.chaos.stage import BUCKET, INSTANCES, REPLICAS, Stage

# A process that is killed comes back after a second; as long as the trouble lasts it is killed again at this rate.
KILL_EVERY = 0.1
# Of every 200 ms a slow process runs 20: a machine that is ten times too busy.
SLOW_RUNS, SLOW_STANDS = 0.02, 0.18


class Target(StrEnum):
    """What breaks."""

    REPLICA = "a replica"
    REPLICAS = "all replicas"
    PRIMARY = "the primary"
    REDIS = "Redis"
    RELAY = "the relay"
    WORKER = "the worker"
    PAYMENTS = "the payment provider"
    SMTP = "the mail server"
    STORAGE = "the storage"
    INSTANCE = "an instance"


class Kind(StrEnum):
    """How it breaks."""

    KILLED = "killed"
    STOPPED = "stopped"  # SIGSTOP: it is there and does nothing
    SLOW = "slow"
    CUT = "cut"  # connections are reset in the middle
    SILENT = "silent"  # connections stay, and nothing passes any more


PROCESSES: dict[Target, tuple[str, ...]] = {
    Target.REPLICA: REPLICAS[:1],
    Target.REPLICAS: REPLICAS,
    Target.PRIMARY: ("primary",),
    Target.REDIS: ("redis",),
    Target.RELAY: ("relay-1",),
    Target.WORKER: ("worker-1",),
    Target.PAYMENTS: ("payments",),
    Target.SMTP: ("smtp",),
    Target.STORAGE: (BUCKET,),
    Target.INSTANCE: INSTANCES[:1],
}
# Nobody connects to these, so nothing can be done to their connections; slow means that they get little processor time.
UNCONNECTED = {Target.RELAY, Target.WORKER}
WEATHER = {Kind.SLOW: Weather.LATE, Kind.CUT: Weather.CUTS, Kind.SILENT: Weather.SILENT}

_OUTAGE = frozenset({503, 504})
# What the balancer says itself when an instance breaks off in the middle of what it may not repeat, and "no answer".
_BALANCER = frozenset({0, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Fault:
    """One cell of the table."""

    target: Target
    kind: Kind

    def __str__(self) -> str:
        return f"{self.target} {self.kind}"

    @property
    def name(self) -> str:
        """A name of one word, for tests and files."""
        return f"{self.target.name.lower()}-{self.kind.name.lower()}"

    @property
    def reads_may(self) -> frozenset[int]:
        """The statuses other than success that a read may get while it lasts; 0 is no answer at all."""
        match self.target, self.kind:
            case Target.INSTANCE, Kind.STOPPED | Kind.SILENT:
                # Whoever was sent to it waits until the balancer gives up, 15 s; most are sent to the other one.
                return _BALANCER
            case Target.INSTANCE, Kind.CUT:
                # The balancer asks another instance, unless it has begun to pass the answer on: that one breaks off.
                return frozenset({0})
            case (Target.PRIMARY | Target.REPLICAS, _):
                # With the replicas gone the primary answers, behind a cap, and a session's own writes only the primary
                # or a replica that has them.
                return _OUTAGE
            case _:
                return frozenset()

    @property
    def writes_may(self) -> frozenset[int]:
        """The statuses other than success that a write may get while it lasts."""
        match self.target:
            case Target.PRIMARY:
                return _OUTAGE
            case Target.INSTANCE:
                return _BALANCER
            case _:
                return frozenset()

    @property
    def mails_may_repeat(self) -> bool:
        """Whether a mail may go out twice: whoever sent it, or noted it, was cut off between the two.

        SMTP has no way to ask whether a message arrived; it carries the same Message-ID, by which a copy is known.
        """
        return self.target in {Target.PRIMARY, Target.WORKER, Target.SMTP, Target.REDIS}

    @property
    def weakens_sessions(self) -> bool:
        """Whether a session may meanwhile see somebody else's write and then miss it: what is written is kept in Redis.

        Its own writes it sees all the same, by their Consistency-Token.
        """
        return self.target is Target.REDIS


CELLS = tuple(
    Fault(target, kind)
    for target in Target
    for kind in Kind
    if not (target in UNCONNECTED and kind in {Kind.CUT, Kind.SILENT})
)


@asynccontextmanager
async def broken(stage: Stage, fault: Fault) -> AsyncIterator[None]:
    """Make a cell of the table true inside the block."""
    names = PROCESSES[fault.target]
    if fault.kind is Kind.KILLED and fault.target is not Target.STORAGE:
        async with _beside(_kill(stage, names)):
            yield
    elif fault.kind is Kind.STOPPED:
        with _stopped(stage, names):
            yield
    elif fault.kind is Kind.SLOW and fault.target in UNCONNECTED:
        async with _beside(_slow_down(stage, names)):
            yield
    else:
        # The bucket's server keeps its objects in memory: killed, it would have lost them, which no bucket does.
        weather = WEATHER.get(fault.kind, Weather.SHUT)
        for name in names:
            await stage.doors[name].turn(weather)
        try:
            yield
        finally:
            for name in names:
                await stage.doors[name].turn(Weather.CLEAR)


async def _kill(stage: Stage, names: tuple[str, ...]) -> None:
    while True:
        for name in names:
            pid = stage.pid(name)
            if pid is not None:
                with suppress(ProcessLookupError):  # it has died already, and nobody has noted it yet
                    os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(KILL_EVERY)


async def _slow_down(stage: Stage, names: tuple[str, ...]) -> None:
    while True:
        with _stopped(stage, names):
            await asyncio.sleep(SLOW_STANDS)
        await asyncio.sleep(SLOW_RUNS)


@contextmanager
def _stopped(stage: Stage, names: tuple[str, ...]) -> Iterator[None]:
    """Let processes and all their children stand still inside the block."""
    stood: list[psutil.Process] = []
    try:
        for name in names:
            pid = stage.pid(name)
            if pid is None:
                continue
            with suppress(psutil.NoSuchProcess):
                parent = psutil.Process(pid)
                # The parent first, so that it starts no child that would be missed.
                _stop(parent, stood)
                for child in parent.children(recursive=True):
                    _stop(child, stood)
        yield
    finally:
        for process in reversed(stood):
            with suppress(psutil.NoSuchProcess):
                process.resume()


def _stop(process: psutil.Process, stood: list[psutil.Process]) -> None:
    with suppress(psutil.NoSuchProcess):
        process.suspend()
        stood.append(process)


@asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Let something go on inside the block; what it raises is raised."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
