"""Before a request becomes work: past the instance's capacity it is refused here, with bytes that are ready.

The gate refuses too, but by then a request has a task, a context, headers and a line in the log, which is more than
half of what serving it costs: three times as many requests as an instance can serve leave no time to serve any. Here
it has been parsed and nothing else. Who is refused is the gate's decision, here as there.
"""

import asyncio

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

# Stands where each answer has its request's own id.
_ID = "0" * 32
# Seconds from the first refusal to the line that tells of it and of all that followed: one each would cost more than
# the refusals do.
TELL_EVERY = 1.0


class Door:
    """Refuses what the gate would refuse, before anything is begun for it.

    Args:
        app: the application that requests are for.
        gate: decides.
        settings: of the service.
    """

    def __init__(self, app: ASGIApp, gate: Gate, settings: ServiceSettings) -> None:
        self._app = app
        self._gate = gate
        self._trusted = settings.trusted_proxies
        with context.working(context.Work(request_id=_ID)):
            answer = problems.answer(overloaded())
        self._before, self._after = bytes(answer.body).split(_ID.encode())
        fixed = [*fixed_headers(settings), CONTENT_POLICY, VARY, (b"cache-control", b"no-store")]
        own = [pair for pair in answer.raw_headers if pair[0] != b"content-length"]
        self._headers = b"".join(b"%b: %b\r\n" % pair for pair in [*own, *fixed])
        self._refused = 0

    def refuses(self, scope: Scope) -> bool:
        """Decide on a request that has been parsed and not begun."""
        if self._gate.announce():
            return False
        scope["app"] = self._app
        if passes_by(scope) or HotPath.has_at_hand(scope):
            self._gate.withdraw()
            return False
        caller = known_caller(scope) or limit_subject(client_address(scope, Headers(scope=scope), self._trusted))
        if not self._gate.foresees_refusal(caller):
            return False
        self._count(scope)
        return True

    def refusal(self, scope: Scope, more: bytes = b"") -> bytes:
        """Return the whole answer to a request that is refused.

        Args:
            scope: of the request.
            more: lines of headers that the server adds.
        """
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
        request_id = context.request_id_from(None if given is None else given.decode("latin-1")).encode()
        length = len(self._before) + len(request_id) + len(self._after)
        head = b"HTTP/1.1 503 Service Unavailable\r\n%b%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n" % (
            self._headers,
            more,
            request_id,
            length,
        )
        return head if scope["method"] == "HEAD" else head + self._before + request_id + self._after

    def _count(self, scope: Scope) -> None:
        REQUESTS_SHED.labels("door").inc()
        metrics.record(scope, metrics.method_of(scope), 503, (), 0.0)
        if not self._refused:
            asyncio.get_running_loop().call_later(TELL_EVERY, self._tell)
        self._refused += 1

    def _tell(self) -> None:
        log.warning("requests refused: more arrive than this instance can serve", refused=self._refused)
        self._refused = 0
