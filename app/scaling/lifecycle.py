"""The life of a process in named phases: STARTING, READY, DRAINING, STOPPED.

A process becomes ready once its needs are met, which it waits for with backoff and says so. Readiness follows from the
phase and from whether anything can be served at all; liveness never asks a dependency. A phase is only left forwards.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from enum import IntEnum
from pathlib import Path

from app.core.errors import Unavailable
from app.core.telemetry import logger

log = logger(__name__)

# Seconds between two tries at a need: soon at first, as servers that start together are a moment apart; then seldom
# enough that hundreds of instances do not keep a server down that comes up.
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 2.0

Need = Callable[[], Awaitable[None]]


class Phase(IntEnum):
    """Where in its life a process is."""

    STARTING = 0
    READY = 1
    DRAINING = 2
    STOPPED = 3


class Lifecycle:
    """The phase of this process.

    Attributes:
        draining: set once the process is told to go; whatever would last longer than a request ends then.
        waiting_for: while it starts, what keeps it from being ready, in words for a person; else empty.

    Args:
        ready_file: created when the process becomes ready and removed when it stops being so, for whoever starts a
            process that has no port to ask.
    """

    def __init__(self, ready_file: Path | None = None) -> None:
        self.phase = Phase.STARTING
        self.draining = asyncio.Event()
        self.waiting_for = ""
        self._ready_file = ready_file
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)

    @property
    def ready(self) -> bool:
        """Whether the process takes new work."""
        return self.phase is Phase.READY

    async def start(self, needs: Mapping[str, Need]) -> None:
        """Meet each need in its order, again and again until it is met, then become READY.

        Args:
            needs: by name; one that is not met raises `Unavailable`, whose detail says what is missing.
        """
        for name, meet in needs.items():
            pause = _FIRST_PAUSE
            while True:
                try:
                    await meet()
                    break
                except Unavailable as error:
                    self.waiting_for = error.detail
                    log.warning("start waits", need=name, code=error.code, detail=error.detail)
                await asyncio.sleep(random.uniform(pause / 2, pause))
                pause = min(pause * 2, _LONGEST_PAUSE)
        self.waiting_for = ""
        if self.phase is Phase.STARTING:  # it may have been told to go meanwhile
            self.enter(Phase.READY)

    def enter(self, phase: Phase) -> None:
        """Go forwards to `phase`; going back is a mistake of the caller.

        Raises:
            ValueError: if `phase` lies behind.
        """
        if phase < self.phase:
            raise ValueError(f"a process does not go from {self.phase.name} back to {phase.name}")
        if phase is self.phase:
            return
        self.phase = phase
        log.info("lifecycle", phase=phase.name)
        if phase >= Phase.DRAINING:
            self.draining.set()
        if self._ready_file is None:
            return
        if phase is Phase.READY:
            self._ready_file.touch()
        else:
            self._ready_file.unlink(missing_ok=True)
