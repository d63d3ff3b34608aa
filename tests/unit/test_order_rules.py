"""The table of an order's saga, walked: every path ends, and at each end stock and money add up."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from app.domain.orders.rules import FINAL, STATUS, TRANSITIONS, Happening, Reason, Step

# What each happening does to the world outside the order: pieces set aside and money held, one order's worth each.
SET_ASIDE = {Happening.STOCK_RESERVED: 1, Happening.STOCK_RELEASED: -1}
HELD = {Happening.PAYMENT_AUTHORISED: 1}
# What gives everything back, whatever that is.
CLEARS = {Happening.UNDONE}


@dataclass(frozen=True)
class World:
    """Where one order is, and what it holds."""

    step: Step = Step.PLACED
    set_aside: int = 0
    held: int = 0
    reason: Reason | None = None
    path: tuple[Happening, ...] = ()


def walk(world: World) -> Iterator[World]:
    """Follow every path of the table to its end."""
    ways = [happening for step, happening in TRANSITIONS if step is world.step]
    if world.step in FINAL:
        yield world
    for happening in ways:
        assert happening not in world.path, "an order must not go in a circle"
        transition = TRANSITIONS[world.step, happening]
        yield from walk(
            replace(
                world,
                step=transition.to,
                set_aside=0 if happening in CLEARS else world.set_aside + SET_ASIDE.get(happening, 0),
                held=0 if happening in CLEARS else world.held + HELD.get(happening, 0),
                reason=transition.reason or world.reason,
                path=(*world.path, happening),
            )
        )


def test_only_final_steps_have_no_way_on_and_every_step_can_be_reached() -> None:
    with_way = {step for step, _ in TRANSITIONS}
    assert set(Step) - with_way == FINAL - {Step.CONFIRMED}
    assert {transition.to for transition in TRANSITIONS.values()} | {Step.PLACED} == set(Step)
    assert {happening for _, happening in TRANSITIONS} == set(Happening)
    assert set(STATUS) == set(Step)


@pytest.mark.sabotage(
    path="app/domain/orders/rules.py",
    take_out='_DECLINED = Transition(Step.DECLINED, "order.declined", Reason.PAYMENT_DECLINED)',
    put='_DECLINED = Transition(Step.REJECTED, "order.rejected", Reason.PAYMENT_DECLINED)',
)
def test_every_path_ends_with_stock_and_money_that_add_up() -> None:
    ends = list(walk(World()))
    # Not paid for want of stock, paid or declined with or without a wait, and each point at which it can be cancelled.
    assert len(ends) == 1 + 4 + 5
    for end in ends:
        assert end.step in FINAL
        sold = end.step is Step.CONFIRMED
        assert (end.set_aside, end.held) == ((1, 1) if sold else (0, 0)), end.path


def test_a_rejected_order_says_why_and_a_confirmed_one_has_nothing_to_say() -> None:
    for end in walk(World()):
        assert (end.reason is not None) == (end.step is Step.REJECTED)
        if Happening.OUT_OF_STOCK in end.path:
            assert end.reason is Reason.OUT_OF_STOCK


def test_every_step_tells_of_itself() -> None:
    # Somebody has to act on it, or a customer follows it.
    assert all(transition.event for transition in TRANSITIONS.values())


def test_a_customer_sees_an_end_only_when_it_is_one() -> None:
    assert {STATUS[step] for step in FINAL}.isdisjoint(STATUS[step] for step in set(Step) - FINAL)
