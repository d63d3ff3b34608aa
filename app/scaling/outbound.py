"""Calls to what we do not own: each dependency node behind its own breaker, bulkhead, deadline and retries.

pybreaker keeps the states and thresholds and is fed outcomes only: it never wraps a coroutine (a decorated coroutine
never trips it), a caller that goes away counts neither as success nor as failure, and while it is half open exactly
one probe passes.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import pybreaker

from app.core import context, tracing
from app.core.errors import TimedOut, Unavailable
from app.core.telemetry import BREAKER_OPEN, OUTBOUND_CALLS, OUTBOUND_RETRIES, logger

log = logger(__name__)

T = TypeVar("T")


class Refused(Unavailable):
    """The breaker is open or the bulkhead is full: the dependency was not called at all."""

    default_code = "dependency_unavailable"


class Breaker:
    """Opens after `failures` in a row, lets one probe through after `reset_after` seconds, closes when it succeeds.

    Args:
        name: the dependency node, for errors, logs and metrics.
        failures: failed calls in a row that open it.
        reset_after: seconds for which it stays open.
    """

    def __init__(self, name: str, *, failures: int = 5, reset_after: float = 5.0) -> None:
        self.name = name
        self._reset_after = reset_after
        # pybreaker's own timeout is never consulted: `admit` decides when to probe.
        self._states = pybreaker.CircuitBreaker(
            fail_max=failures, reset_timeout=reset_after, name=name, throw_new_error_on_trip=False
        )
        self._probe_at = 0.0
        self._probing = False
        BREAKER_OPEN.labels(name).set(0)

    @property
    def state(self) -> str:
        """`closed`, `open` or `half-open`."""
        return str(self._states.current_state)

    @asynccontextmanager
    async def guard(self, *failures: type[BaseException]) -> AsyncIterator[None]:
        """Let one call through and learn from its outcome.

        Args:
            failures: the exceptions that say that the dependency is ill. Any other exception is an answer.

        Raises:
            Refused: at once, while the breaker is open or another call is probing.
        """
        probe = self._admit()
        try:
            yield
        except failures as error:
            self._failed(error, probe=probe)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            if probe:
                self._probing = False  # the caller went away: nothing was learnt, the next call may probe
            raise
        except BaseException:
            self._succeeded(probe=probe)
            raise
        else:
            self._succeeded(probe=probe)

    def _admit(self) -> bool:
        """Return whether the call is the probe of a breaker that is not closed."""
        if self.state == pybreaker.STATE_CLOSED:
            return False
        if self._probing or asyncio.get_running_loop().time() < self._probe_at:
            raise Refused(f"{self.name} is not available right now; try again.")
        self._probing = True
        self._states.half_open()
        return True

    def _succeeded(self, *, probe: bool) -> None:
        if self._outdated(probe=probe):
            return
        self._states.call(lambda: None)
        if probe:
            self._probing = False
            self._tell(opened=False)

    def _failed(self, error: BaseException, *, probe: bool) -> None:
        if self._outdated(probe=probe):
            return

        def fail() -> None:
            raise error

        try:
            self._states.call(fail)
        except type(error):
            pass
        self._probing = False
        if self.state == pybreaker.STATE_OPEN:
            self._probe_at = asyncio.get_running_loop().time() + self._reset_after
            self._tell(opened=True)

    def _outdated(self, *, probe: bool) -> bool:
        """Return whether the call was under way when the breaker opened: from then on only the probe speaks for it."""
        return not probe and self.state != pybreaker.STATE_CLOSED

    def _tell(self, *, opened: bool) -> None:
        BREAKER_OPEN.labels(self.name).set(opened)
        log.warning("breaker opens" if opened else "breaker closes", dependency=self.name)


class RetryBudget:
    """How many retries a node is sent: a few at any time, and in the long run a share of the calls.

    Retries of everybody at once are what keeps a struggling node down; past the budget the first failure is the last.
    """

    # Ten at once: a restart of the node, with a few calls under way, is bridged without anybody noticing.
    most = 10.0
    # A node that fails always is sent a fifth more calls than without retries, not three times as many.
    share = 0.2

    def __init__(self) -> None:
        self._left = self.most

    def earn(self) -> None:
        """Count a call."""
        self._left = min(self.most, self._left + self.share)

    def spend(self) -> bool:
        """Take one retry; False if none is left."""
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Outbound:
    """One dependency node: at most `concurrency` calls at a time, `waiting` more in line, each within `timeout`.

    Args:
        name: the node, for errors, logs and metrics.
        timeout: seconds for one try, cut to what the work at hand has left.
        concurrency: the bulkhead: calls under way at once.
        waiting: calls that may wait for a place; past that: `Refused`.
        failures: exceptions that say that the node is ill; they are retried.
        tries: tries in all, with full jitter between them, as long as the retry budget lasts.
    """

    def __init__(
        self,
        name: str,
        *,
        timeout: float,
        concurrency: int,
        waiting: int,
        failures: tuple[type[BaseException], ...],
        tries: int = 1,
    ) -> None:
        self.name = name
        self.breaker = Breaker(name)
        self._timeout = timeout
        self._places = asyncio.Semaphore(concurrency)
        self._limit = concurrency + waiting
        self._present = 0
        self._failures: tuple[type[BaseException], ...] = (*failures, TimeoutError)
        self._tries = tries
        self._budget = RetryBudget()

    async def call(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Run `attempt`, which must be safe to repeat, and return its answer.

        Raises:
            Refused: the breaker is open or the bulkhead full; `attempt` did not run.
            One of `failures`, or TimeoutError: the last try failed.
        """
        if self._present >= self._limit:
            OUTBOUND_CALLS.labels(self.name, "full").inc()
            raise Refused(f"{self.name} has too many calls waiting; try again.")
        self._present += 1
        self._budget.earn()
        try:
            async with self._places:
                for number in range(1, self._tries + 1):
                    try:
                        return await self._try(attempt)
                    except self._failures:
                        if number == self._tries or not self._budget.spend():
                            raise
                    OUTBOUND_RETRIES.labels(self.name).inc()
                    # 50 ms doubling: the second try comes soon enough to hide a lost packet, the fourth lets a
                    # restarting node come back.
                    await asyncio.sleep(random.uniform(0, 0.05 * 2**number))
        finally:
            self._present -= 1
        raise AssertionError("unreachable: the last try returns or raises")

    async def _try(self, attempt: Callable[[], Awaitable[T]]) -> T:
        outcome = "refused"
        seconds = min(self._timeout, context.current().remaining(self._timeout))
        if seconds <= 0:  # nobody waits any more; a call that is not made says nothing about the node
            raise TimedOut("There is no time left for this call.")
        try:
            async with self.breaker.guard(*self._failures):
                outcome = "error"
                async with asyncio.timeout(seconds):
                    with tracing.step(self.name, tracing.Kind.CLIENT):
                        answer = await attempt()
                outcome = "ok"
                return answer
        finally:
            OUTBOUND_CALLS.labels(self.name, outcome).inc()
