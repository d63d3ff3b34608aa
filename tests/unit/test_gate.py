"""The gate: so many at a time, a short wait, a quick refusal, and turns among callers."""

import asyncio
from collections import Counter, deque
from time import monotonic

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.errors import Unavailable
from app.scaling.gate import Gate


class Work:
    """Requests that hold their place until told to end."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.inside: list[str] = []
        self.refused: Counter[str] = Counter()
        self._end: deque[asyncio.Event] = deque()
        self.tasks: list[asyncio.Task[None]] = []

    async def send(self, caller: str) -> asyncio.Task[None]:
        """Send one request and let it come as far as it can."""
        task = asyncio.create_task(self._request(caller))
        self.tasks.append(task)
        await settle()
        return task

    async def finish_one(self) -> None:
        """End the request that came in first."""
        self._end.popleft().set()
        await settle()

    async def end(self) -> None:
        """End all that is inside, and all that comes in by that."""
        while self._end:
            await self.finish_one()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _request(self, caller: str) -> None:
        try:
            async with self.gate.pass_through(caller):
                self.inside.append(caller)
                over = asyncio.Event()
                self._end.append(over)
                await over.wait()
        except Unavailable as error:
            self.refused[f"{caller} {error.code}"] += 1


async def settle() -> None:
    """Give every task that can go on its turns."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_no_more_than_its_places_are_inside_and_the_rest_follow_in_order() -> None:
    work = Work(Gate(places=2, queue=4, patience=60))
    for caller in "abcd":
        await work.send(caller)
    assert work.inside == ["a", "b"]
    await work.finish_one()
    assert work.inside == ["a", "b", "c"]
    await work.end()
    assert work.inside == ["a", "b", "c", "d"]
    assert not work.refused


async def test_who_waits_too_long_is_refused_and_its_place_in_the_queue_is_free_again() -> None:
    work = Work(Gate(places=1, queue=1))
    await work.send("inside")
    for _ in range(3):
        await (await work.send("late"))
    assert work.refused == {"late overloaded": 3}
    await work.send("next")
    await work.end()
    assert work.inside == ["inside", "next"]


@pytest.mark.sabotage("app/scaling/gate.py", "caller = next(iter(self._lines))", "caller = list(self._lines)[-1]")
async def test_the_flood_of_one_caller_keeps_nobody_else_waiting() -> None:
    work = Work(Gate(places=1, queue=8, patience=60))
    for _ in range(9):
        await work.send("flood")
    await work.send("other")
    await work.send("third")
    assert work.refused == {"flood overloaded": 2}, "the queue was full of the flood, whose last requests made room"
    for _ in range(4):
        await work.finish_one()
    assert work.inside == ["flood", "flood", "other", "third", "flood"]
    await work.end()


async def test_a_full_queue_refuses_the_caller_who_fills_it_at_once() -> None:
    work = Work(Gate(places=1, queue=2, patience=60))
    for _ in range(5):
        await work.send("flood")
    assert work.refused == {"flood overloaded": 2}
    await work.end()
    assert work.inside == ["flood"] * 3


async def test_a_request_that_is_called_off_leaves_its_place_to_the_next() -> None:
    work = Work(Gate(places=1, queue=4, patience=60))
    first = await work.send("first")
    waiting = await work.send("gone")
    await work.send("next")
    waiting.cancel()
    first.cancel()
    await settle()
    assert work.inside == ["first", "next"]
    work._end.popleft()
    await work.end()


class Clock:
    """The time that the gate sees, which goes on only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = monotonic()
        monkeypatch.setattr("app.scaling.gate.monotonic", lambda: self.now)


@pytest.mark.sabotage("app/scaling/gate.py", "self._coming - 1 - self._free", "0 - self._free")
async def test_a_crowd_that_arrives_at_once_is_counted_before_anybody_of_it_is_served() -> None:
    gate = Gate(places=2, queue=3, patience=60)
    assert [gate.announce() or not gate.foresees_refusal("crowd") for _ in range(7)] == [True] * 5 + [False] * 2
    await settle()
    assert gate.announce(), "nobody of it has come in the end"


async def test_what_needs_no_place_takes_none_from_those_who_arrive_with_it() -> None:
    gate = Gate(places=1, queue=0)
    for _ in range(3):
        assert gate.announce()
        gate.withdraw()
    assert gate.announce()
    assert not gate.announce()


@pytest.mark.sabotage("app/scaling/gate.py", "self._turns.append(now)", "pass")
async def test_refusal_is_foreseen_for_whom_the_turns_come_too_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, work = Clock(monkeypatch), Work(Gate(places=1, queue=10, patience=60))
    for _ in range(4):
        await work.send("flood")

    async def foreseen() -> bool:
        refused = not work.gate.announce() and work.gate.foresees_refusal("flood")
        await settle()
        return refused

    assert not await foreseen(), "a burst may wait, as nothing is known of how fast the turns come"
    clock.now += 31
    assert await foreseen(), "three are to come first, and not one turn came in half of the patience"
    for _ in range(2):
        await work.finish_one()
    assert not await foreseen(), "one is to come first, and two came in half of the patience"
    clock.now += 31
    assert await foreseen()
    await work.finish_one()
    assert not await foreseen(), "it would be the next"
    await work.end()


@pytest.mark.sabotage(
    "app/scaling/gate.py",
    "self._turns[0] if len(self._turns) == self._turns.maxlen else self._full_since",
    "self._turns[-1] if self._turns else self._full_since",
)
async def test_turns_that_come_in_bursts_do_not_make_the_queue_look_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, work = Clock(monkeypatch), Work(Gate(places=1, queue=10, patience=60))
    for _ in range(9):
        await work.send("flood")
    clock.now += 40
    for _ in range(5):
        await work.finish_one()
    await work.send("flood")
    assert not work.gate.announce()
    assert work.gate.foresees_refusal("flood"), "four are to come first, and five came at once, but in 40 s"
    await work.end()


@pytest.mark.sabotage("app/scaling/gate.py", "if not self._free and self._is_calm(now):", "if not self._free:")
async def test_a_place_that_is_free_for_a_moment_does_not_make_the_queue_look_quick(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, work = Clock(monkeypatch), Work(Gate(places=1, queue=10, patience=60))

    async def begun() -> int:
        number = sum(work.gate.announce() or not work.gate.foresees_refusal("flood") for _ in range(20))
        await settle()
        return number

    assert await begun() == 11, "nothing is known of how fast places come back: as many as there is room for"
    for _ in range(3):
        await work.send("flood")
        clock.now += 10
        await work.finish_one()
    assert await begun() == 5, "a place came back every 10 s: who would wait for longer than 30 s is not begun"
    await work.send("flood")
    assert await begun() == 4, "the place was free for no time: what was known holds"
    await work.finish_one()
    clock.now += 61
    assert await begun() == 11, "that crowd is over"
    await work.send("flood")
    assert await begun() == 10
    await work.end()


@pytest.mark.sabotage("app/scaling/gate.py", "line >= self._queue // lines", "True")
async def test_the_refusals_of_a_flood_are_not_those_of_others() -> None:
    work = Work(Gate(places=1, queue=6, patience=60))
    for _ in range(7):
        await work.send("flood")
    work.gate.announce()
    assert work.gate.foresees_refusal("flood")
    assert not work.gate.foresees_refusal("other")
    await work.send("other")
    assert work.refused == {"flood overloaded": 1}, "the last of the flood has made room"
    await work.end()


@settings(max_examples=60)
@given(steps=st.lists(st.sampled_from(["a", "b", "c", "finish", "cancel"]), max_size=40))
def test_places_are_neither_lost_nor_made(steps: list[str]) -> None:
    async def play() -> None:
        gate = Gate(places=2, queue=3, patience=60)
        work = Work(gate)
        for step in steps:
            if step == "finish":
                if work._end:
                    await work.finish_one()
            elif step == "cancel":
                if work.tasks:
                    work.tasks[len(work.tasks) // 2].cancel()
                    await settle()
            else:
                await work.send(step)
        await work.end()
        assert (gate._free, gate._waiting, gate._lines) == (2, 0, {})

    asyncio.run(play())
