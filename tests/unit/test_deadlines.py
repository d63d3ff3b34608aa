"""Deadlines: each block ends at its moment, none before, and who is cancelled by somebody else is told just that."""

import asyncio

import pytest

from app.scaling.deadlines import Deadlines


def _in(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


@pytest.mark.sabotage("app/scaling/deadlines.py", "            self._task.cancel()\n", "            pass\n")
@pytest.mark.sabotage(
    "app/scaling/deadlines.py",
    "                self._watch = loop.call_at(block.moment, self._look)\n                return",
    "                return",
)
async def test_each_block_ends_at_its_moment_and_none_before() -> None:
    deadlines, ended = Deadlines(), list[tuple[int, bool]]()

    async def wait(number: int, moment: float) -> None:
        with pytest.raises(TimeoutError), deadlines.until(moment):
            await asyncio.Event().wait()
        ended.append((number, _in(0) >= moment))

    async with asyncio.timeout(10):
        await asyncio.gather(*(wait(number, _in(0.01 * number)) for number in range(1, 6)))
    assert ended == [(number, True) for number in range(1, 6)]


async def test_what_ends_in_time_is_left_alone_and_the_next_one_is_looked_after() -> None:
    deadlines = Deadlines()
    with deadlines.until(_in(0.01)):
        pass
    async with asyncio.timeout(10):
        await asyncio.sleep(0.02)  # past the moment of the one before, whose timer finds nobody
        with pytest.raises(TimeoutError), deadlines.until(_in(0.01)):
            await asyncio.Event().wait()
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


@pytest.mark.sabotage("app/scaling/deadlines.py", "if block.moment < self._latest:", "if False:")
async def test_one_that_ends_before_others_that_began_sooner_ends_at_its_own_moment() -> None:
    deadlines = Deadlines()
    async with asyncio.timeout(10):
        with deadlines.until(_in(3600)), pytest.raises(TimeoutError), deadlines.until(_in(0.01)):
            await asyncio.Event().wait()


@pytest.mark.sabotage(
    "app/scaling/deadlines.py", "        self.moment = moment\n        self.watch", "        self.watch"
)
async def test_one_that_is_given_more_time_ends_then_and_not_before() -> None:
    deadlines, later = Deadlines(), _in(0.05)

    async def wait() -> None:
        with deadlines.until(_in(0.01)) as block:
            block.postpone(later)
            await asyncio.Event().wait()

    async with asyncio.timeout(10):
        with pytest.raises(TimeoutError):
            await wait()
    assert _in(0) >= later


@pytest.mark.sabotage("app/scaling/deadlines.py", "self.expired and self._task.uncancel() <= self._cancelling and", "")
async def test_who_is_cancelled_by_somebody_else_is_told_that_and_not_that_it_took_too_long() -> None:
    deadlines, inside = Deadlines(), asyncio.Event()

    async def wait() -> None:
        with deadlines.until(_in(3600)):
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
