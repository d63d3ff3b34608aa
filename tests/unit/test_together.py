"""One question for all who ask at once: no answer is older than its asking, and a failure is told to one only."""

import asyncio

import pytest

from app.scaling.dialect.together import Together


class Source:
    """Answers its n-th question with n, when it is let."""

    def __init__(self) -> None:
        self.questions = 0
        self.let = asyncio.Semaphore(0)

    async def __call__(self) -> int:
        self.questions += 1
        number = self.questions
        await self.let.acquire()
        return number


async def _settle() -> None:
    """Let every task come as far as it can."""
    for _ in range(8):
        await asyncio.sleep(0)


@pytest.mark.sabotage(
    "app/scaling/dialect/together.py",
    "                await asyncio.shield(self._under_way)\n",
    "                return await asyncio.shield(self._under_way)\n",
)
@pytest.mark.sabotage("app/scaling/dialect/together.py", "                self._next = mine\n", "")
async def test_all_who_come_while_a_question_is_under_way_share_the_next_one_and_none_takes_that_one() -> None:
    together, source = Together(), Source()
    first = asyncio.create_task(together.ask(source))
    await _settle()
    later = [asyncio.create_task(together.ask(source)) for _ in range(10)]
    await _settle()
    assert source.questions == 1
    source.let.release()
    await _settle()
    assert first.result() == 1
    assert not any(task.done() for task in later)
    source.let.release()
    await _settle()
    assert [task.result() for task in later] == [2] * 10
    source.let.release()
    assert await together.ask(source) == 3


@pytest.mark.sabotage(
    "app/scaling/dialect/together.py",
    "            if answer is not None:\n                return",
    "            if True:\n                return",
)
@pytest.mark.parametrize("leaving", ["while it waits", "while it asks"])
async def test_if_whoever_asks_for_all_goes_away_one_of_the_others_asks(leaving: str) -> None:
    together, source = Together(), Source()
    first = asyncio.create_task(together.ask(source))
    await _settle()
    asker, *others = [asyncio.create_task(together.ask(source)) for _ in range(4)]
    await _settle()
    if leaving == "while it asks":
        source.let.release()
        await _settle()
        assert source.questions == 2
    before = source.questions
    asker.cancel()
    await _settle()
    for _ in range(3):
        source.let.release()
        await _settle()
    assert asker.cancelled()
    assert first.result() == 1
    assert all(task.result() > before for task in others)


async def test_what_befalls_a_question_is_told_to_who_put_it_and_to_nobody_else() -> None:
    together, source = Together(), Source()
    failing = asyncio.Event()

    async def fail() -> int:
        await failing.wait()
        raise ConnectionError("cut")

    first = asyncio.create_task(together.ask(fail))
    await _settle()
    second = asyncio.create_task(together.ask(source))
    await _settle()
    failing.set()
    await _settle()
    with pytest.raises(ConnectionError, match="cut"):
        await first
    source.let.release()
    assert await second == 1
