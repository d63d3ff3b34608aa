"""Traces: which steps a request took, in which process and for how long; one trace from the edge to the provider.

The span at hand stands in one context variable, set where work begins: a request, a message of the outbox, a task. What
is not sampled has no span at hand, and then each room that could record a step asks that variable once and makes
nothing; where no collector is named not even the exporter is imported. Spans hold names, numbers and kinds of errors,
but no address, path, statement or message of an error.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from app.core.settings import Settings

if TYPE_CHECKING:  # exporter and SDK take a tenth of a second to import, for nothing where nobody collects
    from opentelemetry.trace import Span as Recorded

    from app.core.otlp import Recorder

# W3C Trace Context, version 00: 55 characters and nothing else, so what is passed on is no longer than that.
_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})", re.ASCII)
_SAMPLED = 1

Value = str | int | float | bool


class Kind(IntEnum):
    """What a span is to its caller, in OpenTelemetry's numbers."""

    INTERNAL = 0
    SERVER = 1
    CLIENT = 2
    PRODUCER = 3
    CONSUMER = 4


class Parent(NamedTuple):
    """A span of another process, by its ids, and whether it is recorded there."""

    trace_id: int
    span_id: int
    sampled: bool


class Span:
    """A step that is being recorded. Rooms get one from `start`, `resumed`, `step` or `leaf`, or None."""

    __slots__ = ("_recorded", "_recorder", "ended")

    def __init__(self, recorder: "Recorder", recorded: "Recorded") -> None:
        self._recorder = recorder
        self._recorded = recorded
        self.ended = False

    @property
    def trace_id(self) -> str:
        """The id of the trace: 32 hex digits."""
        return f"{self._recorded.get_span_context().trace_id:032x}"

    @property
    def traceparent(self) -> str:
        """What another process continues the trace with, below this span."""
        return f"00-{self.trace_id}-{self._recorded.get_span_context().span_id:016x}-01"

    def child(self, name: str, kind: Kind, attributes: Mapping[str, Value] | None = None) -> "Span":
        """Begin a step of this one."""
        return self._recorder.start(name, kind, self._recorded, attributes)

    def rename(self, name: str) -> None:
        """Call it otherwise, once it is known what it was."""
        self._recorded.update_name(name)

    def tell(self, attributes: Mapping[str, Value]) -> None:
        """Add what is known of it."""
        self._recorded.set_attributes(attributes)

    def fail(self, kind: str) -> None:
        """Mark it as failed, by the kind of its error."""
        self._recorded.set_attribute("error.type", kind)
        self._recorded.set_status(self._recorder.failed)

    def end(self) -> None:
        """End it; a second end changes nothing."""
        if not self.ended:
            self.ended = True
            self._recorded.end()

    def leave(self, kind: type[BaseException] | None, *_: object) -> None:
        """End it with a block: the `__exit__` that an ExitStack takes."""
        if kind is not None:
            self.fail(kind.__name__)
        self.end()

    def end_with(self, answer: Any) -> None:
        """End it with a future: the call of `add_done_callback`."""
        if answer.cancelled():
            self.fail("cancelled")
        elif answer.exception() is not None:
            self.fail(type(answer.exception()).__name__)
        self.end()


_at_hand: ContextVar[Span | None] = ContextVar("span", default=None)
# Of the process, while `exporting` is open.
_recorders: list["Recorder"] = []


@contextmanager
def exporting(settings: Settings, role: str) -> Iterator[None]:
    """Record and export the traces of this process inside the block, if a collector is named; flush at its end.

    Open it after a fork, and close it last: the end waits for the exporter, up to `otlp.FLUSH_SECONDS`.

    Args:
        settings: where the collector is.
        role: of the process, for the name of the service: `scaleout-api`.
    """
    if settings.traces.endpoint is None:
        yield
        return
    from app.core.otlp import Recorder  # noqa: PLC0415 - see the import of types above

    recorder = Recorder(settings, role)
    _recorders.append(recorder)
    try:
        yield
    finally:
        _recorders.remove(recorder)
        recorder.stop()


def parent_of(traceparent: str | None) -> Parent | None:
    """Read a `traceparent`; None for what is not one, which is as if there were none."""
    found = _TRACEPARENT.fullmatch(traceparent) if traceparent else None
    if found is None:
        return None
    trace_id, span_id, flags = (int(part, 16) for part in found.groups())
    return Parent(trace_id, span_id, bool(flags & _SAMPLED)) if trace_id and span_id else None


def current() -> Span | None:
    """Return the span at hand. Background work that outlives it finds none: its steps belong to no request."""
    span = _at_hand.get()
    return None if span is None or span.ended else span


def start(name: str, kind: Kind, parent: Parent | None, attributes: Mapping[str, Value] | None = None) -> Span | None:
    """Begin a span in a trace of its own or below one of another process; None where nothing is exported."""
    return _recorders[-1].start(name, kind, parent, attributes) if _recorders else None


def resume(traceparent: str | None, name: str, kind: Kind, **told: Value) -> Span | None:
    """Begin a span below one that another process has recorded; None if it has not, or nothing is exported here.

    Args:
        traceparent: of that span.
        name: of the new one.
        kind: what it is to that one.
        told: what is known of it, under names of ours (`scaleout.…`).
    """
    parent = parent_of(traceparent)
    if parent is None or not parent.sampled:
        return None
    return start(name, kind, parent, {f"scaleout.{word}": value for word, value in told.items()})


@contextmanager
def within(span: Span | None) -> Iterator[Span | None]:
    """Make a span the one at hand inside the block, and end it with the block."""
    if span is None:
        yield None
        return
    token = _at_hand.set(span)
    with ExitStack() as stack:
        stack.push(span.leave)
        stack.callback(_at_hand.reset, token)
        yield span


def step(name: str, kind: Kind) -> AbstractContextManager[Span | None]:
    """Return `within` of a step of the span at hand: what happens inside the block happens below it."""
    span = current()
    return within(None if span is None else span.child(name, kind))


def leaf(name: str, what: str | None = None) -> Span | None:
    """Begin a call to a server, without steps of its own here; None without a span at hand. Whoever asks ends it."""
    span = _at_hand.get()
    if span is None or span.ended:
        return None
    return span.child(name, Kind.CLIENT, {"scaleout.what": what} if what else None)


def headers() -> dict[str, str]:
    """Return the headers that let the server which is called next go on with the trace; none without one."""
    span = current()
    return {} if span is None else {"traceparent": span.traceparent}
