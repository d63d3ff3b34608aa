"""Breaker, bulkhead, deadline and retries of calls to what we do not own."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core import context
from app.scaling.outbound import Breaker, Outbound, Refused


class Down(Exception):
    """The dependency is ill."""


class Declined(Exception):
    """The dependency is well and says no."""


async def fail() -> None:
    raise Down


async def decline() -> None:
    raise Declined


async def succeed() -> str:
    return "done"


class Gate:
    """An attempt that stays under way until it is let go."""

    def __init__(self) -> None:
        self.entered = 0
        self.opened = asyncio.Event()

    async def __call__(self) -> str:
        self.entered += 1
        await self.opened.wait()
        return "done"

    async def has(self, number: int) -> None:
        while self.entered < number:  # noqa: ASYNC110  # a condition, looked at between other tasks' steps
            await asyncio.sleep(0)


async def guarded(breaker: Breaker, attempt: Callable[[], Awaitable[object]]) -> object:
    async with breaker.guard(Down):
        return await attempt()


async def opened(breaker: Breaker) -> None:
    """Let calls fail until the breaker is open."""
    while breaker.state != "open":
        with pytest.raises(Down):
            await guarded(breaker, fail)


@pytest.fixture
async def calls() -> AsyncIterator[asyncio.TaskGroup]:
    """Calls in the background that are gone after the test."""
    async with asyncio.TaskGroup() as group:
        yield group


def outbound(**changes: Any) -> Outbound:
    settings: dict[str, Any] = {"timeout": 5.0, "concurrency": 2, "waiting": 2, "failures": (Down,)}
    return Outbound("test", **settings | changes)


@pytest.mark.sabotage(
    path="app/scaling/outbound.py", take_out="            self._states.call(fail)\n", put="            fail()\n"
)
async def test_a_breaker_opens_after_so_many_failures_in_a_row_and_then_calls_nothing() -> None:
    breaker = Breaker("test", failures=3)
    for _ in range(2):
        with pytest.raises(Down):
            await guarded(breaker, fail)
    await guarded(breaker, succeed)
    for _ in range(3):
        assert breaker.state == "closed"
        with pytest.raises(Down):
            await guarded(breaker, fail)
    called: list[int] = []

    async def call() -> None:
        called.append(1)

    with pytest.raises(Refused):
        await guarded(breaker, call)
    assert (breaker.state, called) == ("open", [])


@pytest.mark.sabotage(
    path="app/scaling/outbound.py",
    take_out="        if self._probing or asyncio.get_running_loop()",
    put="        if asyncio.get_running_loop()",
)
async def test_exactly_one_of_many_callers_probes_a_half_open_breaker(calls: asyncio.TaskGroup) -> None:
    breaker, gate = Breaker("test", failures=1, reset_after=0), Gate()
    await opened(breaker)
    probe = calls.create_task(guarded(breaker, gate))
    await gate.has(1)
    answers = await asyncio.gather(*(guarded(breaker, gate) for _ in range(50)), return_exceptions=True)
    assert all(isinstance(answer, Refused) for answer in answers)
    assert (gate.entered, breaker.state) == (1, "half-open")
    gate.opened.set()
    assert await probe == "done"
    assert breaker.state == "closed"


async def test_a_failed_probe_opens_the_breaker_for_another_period() -> None:
    breaker = Breaker("test", failures=3, reset_after=0)
    await opened(breaker)
    breaker._reset_after = 3600
    with pytest.raises(Down):
        await guarded(breaker, fail)
    with pytest.raises(Refused):
        await guarded(breaker, succeed)
    assert breaker.state == "open"


@pytest.mark.sabotage(
    path="app/scaling/outbound.py",
    take_out="        except (asyncio.CancelledError, GeneratorExit):",
    put="        except GeneratorExit:",
)
async def test_a_caller_that_goes_away_counts_neither_as_failure_nor_as_success() -> None:
    breaker, gate = Breaker("test", failures=2, reset_after=0), Gate()

    async def go_away(number: int) -> None:
        call = asyncio.create_task(guarded(breaker, gate))
        await gate.has(number)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    for number in (1, 2, 3):
        await go_away(number)
    assert breaker.state == "closed"
    with pytest.raises(Down):
        await guarded(breaker, fail)
    await go_away(4)
    with pytest.raises(Down):
        await guarded(breaker, fail)
    assert breaker.state == "open"
    await go_away(5)
    assert breaker.state == "half-open"
    assert await guarded(breaker, succeed) == "done"
    assert breaker.state == "closed"


@pytest.mark.sabotage(
    path="app/scaling/outbound.py",
    take_out="return not probe and self.state != pybreaker.STATE_CLOSED",
    put="return self.state == pybreaker.STATE_OPEN",
)
async def test_only_the_probe_speaks_for_a_breaker_that_is_not_closed(calls: asyncio.TaskGroup) -> None:
    breaker, late, gate = Breaker("test", failures=1, reset_after=0), Gate(), Gate()
    before = calls.create_task(guarded(breaker, late))
    await late.has(1)
    await opened(breaker)
    probe = calls.create_task(guarded(breaker, gate))
    await gate.has(1)
    late.opened.set()
    assert await before == "done"
    assert breaker.state == "half-open"
    with pytest.raises(Refused):
        await guarded(breaker, succeed)
    gate.opened.set()
    await probe
    assert breaker.state == "closed"


async def test_a_call_that_went_away_late_does_not_let_a_second_probe_through(calls: asyncio.TaskGroup) -> None:
    breaker, late, gate = Breaker("test", failures=1, reset_after=0), Gate(), Gate()
    before = asyncio.create_task(guarded(breaker, late))
    await late.has(1)
    await opened(breaker)
    calls.create_task(guarded(breaker, gate))
    await gate.has(1)
    before.cancel()
    await asyncio.wait({before})
    with pytest.raises(Refused):
        await guarded(breaker, succeed)
    gate.opened.set()


@pytest.mark.sabotage(
    path="app/scaling/outbound.py",
    take_out="        except BaseException:\n            self._succeeded(",
    put="        except BaseException as error:\n            self._failed(error, ",
)
async def test_an_answer_that_we_do_not_like_does_not_trip_the_breaker() -> None:
    breaker = Breaker("test", failures=2)
    for _ in range(5):
        with pytest.raises(Declined):
            await guarded(breaker, decline)
    assert breaker.state == "closed"


@settings(max_examples=60)
@given(st.lists(st.sampled_from([succeed, fail, decline]), max_size=30), st.integers(1, 4))
def test_a_breaker_is_open_exactly_when_the_last_calls_all_failed(
    attempts: list[Callable[[], Awaitable[object]]], failures: int
) -> None:
    async def play() -> None:
        breaker, in_a_row = Breaker("test", failures=failures, reset_after=3600), 0
        for attempt in attempts:
            if in_a_row >= failures:
                with pytest.raises(Refused):
                    await guarded(breaker, attempt)
                continue
            await asyncio.gather(guarded(breaker, attempt), return_exceptions=True)
            in_a_row = in_a_row + 1 if attempt is fail else 0
            assert breaker.state == ("open" if in_a_row >= failures else "closed")

    asyncio.run(play())


@pytest.mark.sabotage(
    path="app/scaling/outbound.py", take_out="if self._present >= self._limit:", put="if self._present < 0:"
)
async def test_the_bulkhead_refuses_past_its_places_and_its_queue(calls: asyncio.TaskGroup) -> None:
    dependency, gate = outbound(concurrency=2, waiting=3), Gate()
    accepted = [calls.create_task(dependency.call(gate)) for _ in range(5)]
    await gate.has(2)
    with pytest.raises(Refused):
        await dependency.call(gate)
    assert gate.entered == 2
    gate.opened.set()
    assert await asyncio.gather(*accepted) == ["done"] * 5
    assert await dependency.call(succeed) == "done"


async def test_callers_that_go_away_leave_their_places_in_the_bulkhead() -> None:
    dependency, gate = outbound(concurrency=1, waiting=1), Gate()
    present = [asyncio.create_task(dependency.call(gate)) for _ in range(2)]
    await gate.has(1)
    for call in present:
        call.cancel()
    await asyncio.wait(present)
    assert await dependency.call(succeed) == "done"


async def test_a_failure_is_tried_again_and_an_answer_is_not() -> None:
    tries: list[int] = []

    async def second_time_lucky() -> str:
        tries.append(1)
        if len(tries) < 2:
            raise Down
        return "done"

    async def declines() -> str:
        tries.append(1)
        raise Declined

    assert await outbound(tries=3).call(second_time_lucky) == "done"
    assert len(tries) == 2
    tries.clear()
    with pytest.raises(Declined):
        await outbound(tries=3).call(declines)
    assert len(tries) == 1


async def test_a_failure_is_tried_so_many_times_and_no_more() -> None:
    tries: list[int] = []

    async def counted() -> None:
        tries.append(1)
        raise Down

    with pytest.raises(Down):
        await outbound(tries=3).call(counted)
    assert len(tries) == 3


@pytest.mark.sabotage(
    path="app/scaling/outbound.py",
    take_out="min(self._timeout, context.current().remaining(self._timeout))",
    put="self._timeout",
)
async def test_a_call_ends_with_the_deadline_of_its_work() -> None:
    deadline = asyncio.get_running_loop().time() + 0.02
    work = context.Work("test-1234", deadline=deadline)
    with context.working(work), pytest.raises(TimeoutError):
        async with asyncio.timeout(3):
            await outbound(timeout=3600.0).call(Gate())
    assert work.remaining(1) == 0.0
    assert asyncio.get_running_loop().time() < deadline + 2.5  # not ended by the test's own patience


@pytest.mark.sabotage(
    path="app/scaling/outbound.py",
    take_out="min(self._timeout, context.current().remaining(self._timeout))",
    put="context.current().remaining(self._timeout)",
)
async def test_a_distant_deadline_does_not_lengthen_a_calls_own_timeout() -> None:
    deadline = asyncio.get_running_loop().time() + 3600
    work = context.Work("test-1234", deadline=deadline)
    with context.working(work), pytest.raises(TimeoutError):
        async with asyncio.timeout(3):
            await outbound(timeout=0.02).call(Gate())
    assert deadline - asyncio.get_running_loop().time() > 3597.5  # not ended by the test's own patience
