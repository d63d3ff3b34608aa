"""Before a request becomes work: past the instance's capacity it is refused here, with bytes that are ready.

The gate refuses too, but by then a request has a task, a context, headers and a line in the log, which is more than
half of what serving it costs: three times as many requests as an instance can serve leave no time to serve any. Here
it has been parsed and nothing else. Who is refused is the gate's decision, here as there.

A refusal is made at once and sent a moment later. Most clients ask again as soon as they are answered, whatever
`Retry-After` says: two hundred of them, refused within a millisecond, keep an instance busy with nothing but refusals.
And a balancer that counts what is in flight would take the instance that refuses for the one that has least to do.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable
from time import monotonic

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Scope

from app.api import metrics, problems
from app.api.exchange import client_address, limit_subject
from app.api.hotpath import HotPath
from app.api.security import CONTENT_POLICY, VARY, fixed_headers
from app.api.turnstile import known_caller, passes_by
from app.core import context
from app.core.settings import ServiceSettings
from app.core.telemetry import REQUESTS_SHED, logger
from app.scaling.gate import Gate, overloaded

log = logger(__name__)

CLOSE = (b"connection", b"close")
# Stands where each answer has its request's own id.
_ID = "0" * 32
# Seconds for which a refusal is held, of the 50 ms in which a client is told; and between two looks at those that are:
# what is sent at once is sent for less.
HELD = 0.02
GRAIN = 0.004
# Seconds from the first refusal to the line that tells of it and of all that followed: one each would cost more than
# the refusals do.
TELL_EVERY = 1.0


class Door:
    """Refuses what the gate would refuse, before anything is begun for it.

    Args:
        app: the application that requests are for.
        gate: decides.
        settings: of the service.

    Attributes:
        has_room: counts a request whose head is here, and returns whether there is a place for it; else ask `refuses`.
    """

    def __init__(self, app: ASGIApp, gate: Gate, settings: ServiceSettings) -> None:
        self._app = app
        self._gate = gate
        self.has_room = gate.announce
        self._proxies = settings.trusted_proxies
        with context.working(context.Work(request_id=_ID)):
            answer = problems.answer(overloaded())
        self._before, self._after = bytes(answer.body).split(_ID.encode())
        fixed = [*fixed_headers(settings), CONTENT_POLICY, VARY, (b"cache-control", b"no-store")]
        own = [pair for pair in answer.raw_headers if pair[0] != b"content-length"]
        self._head = b"HTTP/1.1 503 Service Unavailable\r\n" + _lines([*own, *fixed])
        self._added: list[tuple[bytes, bytes]] = []
        self._lines = b""
        self._refused: Counter[str] = Counter()
        # What sends each refusal, and when it was made, in this order.
        self._held: deque[tuple[float, Callable[[], None]]] = deque()

    def refuses(self, scope: Scope) -> bool:
        """Decide on a request that was just counted.

        Args:
            scope: of it, as far as it is known: method, path, query_string, headers and client.
        """
        scope["app"] = self._app
        if passes_by(scope) or HotPath.has_at_hand(scope):
            self._gate.withdraw()
            return False
        caller = known_caller(scope) or limit_subject(client_address(scope, Headers(scope=scope), self._proxies))
        if not self._gate.foresees_refusal(caller):
            return False
        if not self._refused:
            asyncio.get_running_loop().call_later(TELL_EVERY, self._tell)
        self._refused[metrics.method_of(scope)] += 1
        return True

    def refusal(self, scope: Scope, added: list[tuple[bytes, bytes]], *, keep: bool) -> bytes:
        """Return the whole answer to a request that is refused.

        Args:
            scope: of the request.
            added: headers that the server adds to every answer; they are written anew when it is another list.
            keep: whether the connection stays.
        """
        if added is not self._added:
            self._added, self._lines = added, _lines(added)
        request_id = context.request_id_from(_given_id(scope["headers"])).encode()
        closing = b"" if keep or CLOSE in added else _lines([CLOSE])
        length = len(self._before) + len(request_id) + len(self._after)
        body = (b"", b"", b"") if scope["method"] == "HEAD" else (self._before, request_id, self._after)
        return b"%b%b%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n%b%b%b" % (
            self._head,
            self._lines,
            closing,
            request_id,
            length,
            *body,
        )

    def hold(self, send: Callable[[], None]) -> None:
        """Have a refusal sent in a moment.

        Args:
            send: sends it, unless that has been done or nobody waits for it any more.
        """
        if not self._held:
            asyncio.get_running_loop().call_later(HELD, self._send)
        self._held.append((monotonic(), send))

    def _send(self) -> None:
        """Send what has been held for long enough, and come back for the rest."""
        made_until = monotonic() - HELD
        try:
            while self._held and self._held[0][0] <= made_until:
                self._held.popleft()[1]()
        finally:  # whatever became of one, the others are still waited for
            if self._held:
                asyncio.get_running_loop().call_later(GRAIN, self._send)

    def _tell(self) -> None:
        """Tell of all that were refused since the first one that nobody was told of."""
        for method, refused in self._refused.items():
            metrics.count_refused(method, refused)
            REQUESTS_SHED.labels("door").inc(refused)
        log.warning("requests refused: more arrive than this instance can serve", refused=self._refused.total())
        self._refused.clear()


def _given_id(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    for name, value in headers:
        if name == b"x-request-id":
            return value.decode("latin-1")
    return None


def _lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"".join(b"%b: %b\r\n" % pair for pair in headers)
