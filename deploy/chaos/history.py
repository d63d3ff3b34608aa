"""What clients saw, and whether it can have happened in a service that keeps its promises; pure, for any service.

A history is a list of calls, each with its beginning and end and what came of it. A call without an answer may have
had its effect or not; everything that was answered must fit together:

    one value a version   who reads a version of a profile reads what was written as that version, and nothing else
    no lost update        a write that was acknowledged follows the version it named, and is never gone later
    read your writes      a session sees what it has written, from the moment the write was answered
    monotonic reads       a session never sees an older version than it has seen
    one order a key       every reply to a key names the same order; in the end each key has its order once
    no way back           an order never loses a step of its history, and one that has ended stays as it is
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

FINAL = frozenset({"confirmed", "rejected", "cancelled"})
NO_ANSWER = 0


@dataclass(frozen=True, slots=True)
class Call:
    """One request of one client; moments are seconds of one clock.

    Attributes:
        what: `read`, `write` (of a profile), `order`, `look` (at an order) or `browse`.
        session: who asked; the calls of a session follow each other.
        subject: the profile, the idempotency key or the order; empty for what only browses.
        status: of the answer; `NO_ANSWER` without one.
        based: the version that a write names.
        version: of the profile, or how many steps the order's history has, as answered.
        value: what was written or read; the order's id for `order`, its status for `look`.
        bound: whether it named the Consistency-Token of the session's last write.
    """

    what: str
    session: str
    subject: str
    begun: float
    ended: float
    status: int
    based: int = 0
    version: int = 0
    value: str = ""
    bound: bool = False

    @property
    def ok(self) -> bool:
        """Whether it was answered with success."""
        return 200 <= self.status < 300  # noqa: PLR2004 - HTTP

    @property
    def is_write(self) -> bool:
        """Whether it changes something."""
        return self.what in {"write", "order"}


@dataclass(frozen=True, slots=True)
class Span:
    """A time in which nothing keeps what a session has seen: only a Consistency-Token binds what it reads then."""

    begun: float
    ended: float

    def touches(self, call: Call) -> bool:
        """Say whether any of the call lies inside."""
        return call.begun <= self.ended and self.begun <= call.ended


@dataclass(frozen=True, slots=True)
class End:
    """What is there when everything has come to rest.

    Attributes:
        profiles: profile -> its version and value.
        orders: customer's session -> the orders that the service lists for it, with their status.
    """

    profiles: Mapping[str, tuple[int, str]]
    orders: Mapping[str, Sequence[tuple[str, str]]]


def violations(calls: Iterable[Call], end: End, weak: Sequence[Span] = ()) -> list[str]:
    """Return in words what cannot have happened if every promise was kept; nothing if all were."""
    told = sorted(calls, key=lambda call: call.begun)
    return list(chain(_versions(told, end), _sessions(told, weak), _keys(told, end), _ways(told, end, weak)))


def _versions(calls: Sequence[Call], end: End) -> Iterable[str]:
    values: dict[tuple[str, int], str] = {}
    acknowledged: dict[str, int] = defaultdict(int)
    for call in calls:
        if call.what not in {"read", "write"} or not call.ok:
            continue
        found = values.setdefault((call.subject, call.version), call.value)
        if found != call.value:
            yield f"{call.session} got {call.value!r} as version {call.version} of {call.subject}, which was {found!r}"
        if call.what == "write":
            if call.version != call.based + 1:
                yield f"{call.session} changed version {call.based} of {call.subject} and got version {call.version}"
            acknowledged[call.subject] = max(acknowledged[call.subject], call.version)
    for subject, version in acknowledged.items():
        last, value = end.profiles[subject]
        if last < version:
            yield f"version {version} of {subject} was acknowledged, and in the end it has version {last}"
        elif values.get((subject, last), value) != value:
            yield f"in the end version {last} of {subject} is {value!r}; it was {values[subject, last]!r}"


def _sessions(calls: Sequence[Call], weak: Sequence[Span]) -> Iterable[str]:
    wrote: dict[tuple[str, str], int] = defaultdict(int)
    saw: dict[tuple[str, str], int] = defaultdict(int)
    for call in calls:
        if call.what not in {"read", "write"} or not call.ok:
            continue
        who, kept = (call.session, call.subject), not any(span.touches(call) for span in weak)
        if call.version < wrote[who] and (call.bound or kept):
            yield f"{call.session} wrote version {wrote[who]} of {call.subject} and then got version {call.version}"
        elif call.version < saw[who] and kept:
            yield f"{call.session} saw version {saw[who]} of {call.subject} and then version {call.version}"
        if call.what == "write":
            wrote[who] = call.version
        # What was seen in a weak time binds nobody later: then, too, nothing says which replica had it.
        if kept:
            saw[who] = max(saw[who], call.version)


def _keys(calls: Sequence[Call], end: End) -> Iterable[str]:
    orders: dict[str, dict[str, str]] = defaultdict(dict)
    for call in calls:
        if call.what != "order" or not call.ok:
            continue
        found = orders[call.session].setdefault(call.subject, call.value)
        if found != call.value:
            yield f"the key {call.subject} was answered with order {found} and with order {call.value}"
    unanswered = {call.subject for call in calls if call.what == "order"}.difference(*orders.values())
    if unanswered:
        yield f"{len(unanswered)} keys never got an answer, such as {min(unanswered)}"
    for session, listed in end.orders.items():
        made = Counter(orders[session].values())
        there = Counter(order for order, _ in listed)
        yield from (f"two keys were answered with order {order}" for order, times in made.items() if times > 1)
        yield from (f"order {order} was acknowledged and is lost" for order in made.keys() - there.keys())
        yield from (f"order {order} was placed by no key that was answered" for order in there.keys() - made.keys())
        yield from (f"order {order} is listed {times} times" for order, times in there.items() if times > 1)


def _ways(calls: Sequence[Call], end: End, weak: Sequence[Span]) -> Iterable[str]:
    steps: dict[tuple[str, str], tuple[int, str]] = {}
    for call in calls:
        if call.what != "look" or not call.ok or any(span.touches(call) for span in weak):
            continue
        before, status = steps.get((call.session, call.subject), (0, ""))
        if call.version < before or (status in FINAL and call.value != status):
            yield f"order {call.subject} went from {status} back to {call.value}"
        steps[call.session, call.subject] = (call.version, call.value)
    for order, status in chain(*end.orders.values()):
        if status not in FINAL:
            yield f"order {order} is {status} in the end"
