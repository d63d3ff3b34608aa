"""Retries are a share of the calls: a node that is down is not kept down by its own callers."""

import pytest

from app.scaling.outbound import Outbound, RetryBudget


class Down(Exception):
    """The node is ill."""


@pytest.mark.sabotage(
    path="app/scaling/outbound.py",
    take_out="if number == self._tries or not self._budget.spend():",
    put="if number == self._tries:",
)
async def test_a_node_that_keeps_failing_gets_few_retries() -> None:
    outbound = Outbound("test", timeout=1, concurrency=1, waiting=0, failures=(Down,), tries=3)
    outbound.breaker._states.fail_max = 10_000
    sent = 0

    async def fail() -> None:
        nonlocal sent
        sent += 1
        raise Down

    calls = 100
    for _ in range(calls):
        with pytest.raises(Down):
            await outbound.call(fail)
    assert sent <= calls * (1 + RetryBudget.share) + RetryBudget.most + 1
    assert sent > calls


def test_a_budget_is_earned_back_and_never_more_than_its_bound() -> None:
    budget = RetryBudget()
    for _ in range(1000):
        budget.earn()
    taken = 0
    while budget.spend():
        taken += 1
    assert taken == RetryBudget.most
    for _ in range(round(1 / RetryBudget.share) + 1):
        budget.earn()
    assert budget.spend()
    assert not budget.spend()
