"""Turns: a bounded number of places, in the order of arrival, and nobody waits for longer than the others."""

import asyncio

import pytest

from app.scaling.turns import Turns

PATIENT, IMPATIENT = 3600.0, 0.01  # seconds: never here, and as soon as it can be


async def _settle() -> None:
    """Let every task come as far as it can."""
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.sabotage(
    "app/scaling/turns.py",
    "                turn.set_result(None)\n                return\n",
    "                turn.set_result(None)\n",
)
async def test_places_are_taken_in_the_order_of_arrival_and_never_more_than_there_are() -> None:
    turns, came = Turns(2, PATIENT), list[int]()

    async def take(number: int) -> None:
        await turns.take()
        came.append(number)

    tasks = [asyncio.create_task(take(number)) for number in range(5)]
    await _settle()
    assert came == [0, 1]
    for expected in ([0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]):
        turns.give()
        await _settle()
        assert came == expected
    await asyncio.gather(*tasks)


@pytest.mark.sabotage(
    "app/scaling/turns.py",
    "            if not turn.done():\n                turn.set_exc",
    "            if False:\n                turn.set_exc",
)
async def test_who_waits_too_long_is_told_and_takes_no_place() -> None:
    turns = Turns(1, IMPATIENT)
    await turns.take()
    for _ in range(2):  # the second one finds no timer
        with pytest.raises(TimeoutError, match="no place became free"):
            async with asyncio.timeout(10):
                await turns.take()
    turns.give()
    await turns.take()


@pytest.mark.sabotage(
    "app/scaling/turns.py", "                self.give()  # cancelled", "                pass  # cancelled"
)
async def test_a_place_goes_to_the_next_if_its_taker_goes_away_at_that_moment() -> None:
    turns = Turns(1, PATIENT)
    await turns.take()
    leaving, staying = asyncio.create_task(turns.take()), asyncio.create_task(turns.take())
    await _settle()
    turns.give()  # to the first, which does not know it yet
    leaving.cancel()
    await _settle()
    assert leaving.cancelled()
    assert staying.done()


async def test_who_went_away_before_their_turn_is_passed_over() -> None:
    turns = Turns(1, PATIENT)
    await turns.take()
    leaving, staying = asyncio.create_task(turns.take()), asyncio.create_task(turns.take())
    await _settle()
    leaving.cancel()
    await _settle()
    turns.give()
    await _settle()
    assert staying.done()
    turns.give()
    async with asyncio.timeout(10):
        await turns.take()
