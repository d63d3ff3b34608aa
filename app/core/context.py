"""What is known about the work at hand: request id, deadline, caller, and what answered it.

One mutable `Work` stands in one context variable, set at the edge of a request or a task. Deeper rooms read it and
note on it what they did, without it being passed through every call; nothing decides by it what a caller may do.
"""

import asyncio
import random
import re
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import perf_counter, time
from uuid import UUID

from app.core import tracing

SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{8,64}")

# A position that no log ever reaches: only a primary shows all there is.
NEWEST = 2**62


@dataclass(slots=True)
class Span:
    """Time spent in one layer, for `Server-Timing`: who answered and for how many milliseconds in all."""

    description: str
    milliseconds: float = 0.0


@dataclass(slots=True)
class Work:
    """One request or one task.

    Attributes:
        request_id: follows the work through every process that it reaches.
        deadline: moment on the loop's clock after which nobody waits for the answer; None without one.
        profile_id: the signed-in caller, once known.
        positions: shard number -> position in its log that this work's reads must have reached; raised by each commit.
        wrote: shards on which this work has committed.
        unsettled: shards on which somebody writes for the caller right now, so that only their primaries can answer.
        changing: whether somebody changes the caller's profile right now, so that a cache may show it as it was before.
        bound: whether the caller has named a position by a Consistency-Token. Nothing says how new cached values are:
            the database answers.
        spans: layer (`cache`, `db`) -> who answered.
    """

    request_id: str
    deadline: float | None = None
    profile_id: UUID | None = None
    positions: dict[int, int] = field(default_factory=dict)
    wrote: set[int] = field(default_factory=set)
    unsettled: set[int] = field(default_factory=set)
    changing: bool = False
    bound: bool = False
    spans: dict[str, Span] = field(default_factory=dict)

    def remaining(self, default: float) -> float:
        """Return the seconds left until the deadline, at least 0, or `default` without one."""
        if self.deadline is None:
            return default
        return max(0.0, self.deadline - asyncio.get_running_loop().time())

    def position(self, shard: int) -> int:
        """Return up to where reads of this work on `shard` must see the log, 0 for anywhere."""
        position = self.positions.get(shard, 0)
        return 0 if _has_run_out(position) else position

    def reached(self, shard: int, position: int) -> None:
        """Note that reads of this work on `shard` must see the log up to `position`."""
        if position > self.position(shard) and not _has_run_out(position):
            self.positions[shard] = position

    def timed(self, layer: str, description: str) -> "Timed":
        """Add the time inside the block to `layer`; the last description stands. A trace gets a step of its own."""
        span = self.spans.get(layer)
        if span is None:
            span = self.spans[layer] = Span(description)
        else:
            span.description = description
        return Timed(span, tracing.leaf(layer))


# A class and no generator, as `working` below: such blocks stand in every request several times, and cost half.
class Timed:
    """A block whose time is added to a span: what `Work.timed` returns."""

    __slots__ = ("_leaf", "_span", "_start")

    def __init__(self, span: Span, leaf: tracing.Span | None) -> None:
        self._span = span
        self._leaf = leaf
        self._start = 0.0

    def __enter__(self) -> Span:
        self._start = perf_counter()
        return self._span

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._span.milliseconds += (perf_counter() - self._start) * 1000
        if self._leaf is not None:
            self._leaf.tell({"scaleout.answered_by": self._span.description})
            self._leaf.leave(kind)


_current: ContextVar[Work | None] = ContextVar("work", default=None)


def current() -> Work:
    """Return the work at hand; outside of any (a background task, a test) a fresh one that nobody else sees."""
    return _current.get() or Work(request_id="-")


class working:  # noqa: N801 - it is called like the function that `contextmanager` would make of it
    """Make `work` the work at hand inside the block."""

    __slots__ = ("_token", "_work")

    def __init__(self, work: Work) -> None:
        self._work = work

    def __enter__(self) -> Work:
        self._token = _current.set(self._work)
        return self._work

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)


def unknown_position(seconds: float) -> int:
    """Return what stands for the position of a commit that could not be learnt: the newest there is, for `seconds`.

    The moment at which it runs out is part of it, so that it does not bind for ever whoever passes it on.
    """
    return NEWEST + int((time() + seconds) * 1000)


def _has_run_out(position: int) -> bool:
    return position >= NEWEST and position - NEWEST <= time() * 1000


def new_request_id() -> str:
    """Return a fresh request id: 32 hex digits."""
    # Nothing opens with it, so nobody needs to be kept from guessing it; the system's own randomness is a system call.
    return f"{random.getrandbits(128):032x}"


def request_id_from(incoming: str | None) -> str:
    """Keep a sane id that came in, else make one; an insane one could forge log lines or headers."""
    return incoming if incoming and SANE_REQUEST_ID.fullmatch(incoming) else new_request_id()
