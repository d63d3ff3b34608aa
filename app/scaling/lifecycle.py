"""The life of a process in named phases: STARTING, READY, DRAINING, STOPPED.

Readiness follows from the phase and from whether anything can be served at all; liveness never asks a dependency.
A phase is only ever left forwards.
"""

from enum import IntEnum
from pathlib import Path

from app.core.telemetry import logger

log = logger(__name__)


class Phase(IntEnum):
    """Where in its life a process is."""

    STARTING = 0
    READY = 1
    DRAINING = 2
    STOPPED = 3


class Lifecycle:
    """The phase of this process.

    Args:
        ready_file: created when the process becomes ready and removed when it stops being so, for whoever starts a
            process that has no port to ask.
    """

    def __init__(self, ready_file: Path | None = None) -> None:
        self.phase = Phase.STARTING
        self._ready_file = ready_file
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)

    @property
    def ready(self) -> bool:
        """Whether the process takes new work."""
        return self.phase is Phase.READY

    def enter(self, phase: Phase) -> None:
        """Go forwards to `phase`; going back is a mistake of the caller.

        Raises:
            ValueError: if `phase` lies behind.
        """
        if phase < self.phase:
            raise ValueError(f"a process does not go from {self.phase.name} back to {phase.name}")
        self.phase = phase
        log.info("lifecycle", phase=phase.name)
        if self._ready_file is None:
            return
        if phase is Phase.READY:
            self._ready_file.touch()
        else:
            self._ready_file.unlink(missing_ok=True)
