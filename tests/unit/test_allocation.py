"""Stock rules: all lines or nothing, never more than is free, from the nearest warehouse that has all of it."""

from collections import Counter
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.catalog.rules import OnHand, OutOfStock, Reserved, Wanted, allocate, distance

PRODUCTS = [UUID(int=number) for number in range(1, 4)]
HAMBURG, LYON, WARSAW = (53.55, 9.99), (45.76, 4.84), (52.23, 21.01)
PARIS = (48.86, 2.35)
degrees = st.tuples(st.floats(-90, 90), st.floats(-180, 180))
warehouses = st.dictionaries(st.integers(1, 4).map(lambda number: UUID(int=100 + number)), degrees, max_size=4)
lines = st.lists(st.builds(Wanted, st.sampled_from(PRODUCTS), st.integers(1, 20)), min_size=1, max_size=6)


@st.composite
def shelves(draw: st.DrawFn) -> list[OnHand]:
    return [
        OnHand(product, warehouse, draw(st.integers(0, 15)), *place)
        for warehouse, place in draw(warehouses).items()
        for product in PRODUCTS
    ]


def on(place: tuple[float, float], free: int, number: int, product: UUID = PRODUCTS[0]) -> OnHand:
    return OnHand(product, UUID(int=number), free, *place)


@pytest.mark.sabotage(
    path="app/domain/catalog/rules.py",
    take_out="            taken = min(left, shelf.free)",
    put="            taken = left",
)
@given(lines, shelves(), st.none() | degrees)
def test_all_lines_are_served_from_what_is_free_or_none_is(
    wanted: list[Wanted], stock: list[OnHand], place: tuple[float, float] | None
) -> None:
    outcome = allocate(wanted, stock, place)
    needs, free = Counter[UUID](), Counter[UUID]()
    for line in wanted:
        needs[line.product_id] += line.quantity
    for shelf in stock:
        free[shelf.product_id] += shelf.free
    short = {product for product, quantity in needs.items() if free[product] < quantity}
    if short:
        assert isinstance(outcome, OutOfStock)
        assert set(outcome.product_ids) == short
        return
    assert isinstance(outcome, Reserved)
    taken = {(a.product_id, a.warehouse_id): a.quantity for a in outcome.allocations}
    assert len(taken) == len(outcome.allocations)
    for shelf in stock:
        assert 0 <= taken.get((shelf.product_id, shelf.warehouse_id), 0) <= shelf.free
    assert all(quantity > 0 for quantity in taken.values())
    served = Counter[UUID]()
    for (product, _), quantity in taken.items():
        served[product] += quantity
    assert served == needs


@given(st.integers(1, 20), shelves(), degrees)
def test_a_product_ships_from_the_nearest_warehouse_that_has_all_of_it(
    quantity: int, stock: list[OnHand], place: tuple[float, float]
) -> None:
    outcome = allocate([Wanted(PRODUCTS[0], quantity)], stock, place)
    whole = [shelf for shelf in stock if shelf.product_id == PRODUCTS[0] and shelf.free >= quantity]
    if whole:
        assert isinstance(outcome, Reserved)
        (allocation,) = outcome.allocations
        chosen = next(shelf for shelf in whole if shelf.warehouse_id == allocation.warehouse_id)
        nearest = min(distance(*place, shelf.lat, shelf.lon) for shelf in whole)
        assert distance(*place, chosen.lat, chosen.lon) == nearest


@pytest.mark.sabotage(
    path="app/domain/catalog/rules.py",
    take_out="distance(*place, shelf.lat, shelf.lon) if place else -shelf.free",
    put="-shelf.free",
)
def test_paris_is_served_from_lyon_unless_lyon_has_too_little() -> None:
    stock = [on(HAMBURG, 50, 1), on(LYON, 5, 2), on(WARSAW, 90, 3)]
    for quantity, expected in ((5, 2), (6, 1), (60, 3)):
        outcome = allocate([Wanted(PRODUCTS[0], quantity)], stock, PARIS)
        assert isinstance(outcome, Reserved)
        assert [allocation.warehouse_id for allocation in outcome.allocations] == [UUID(int=expected)]


def test_without_a_place_the_fullest_warehouse_ships() -> None:
    stock = [on(HAMBURG, 5, 1), on(LYON, 7, 2)]
    outcome = allocate([Wanted(PRODUCTS[0], 3)], stock, None)
    assert isinstance(outcome, Reserved)
    (allocation,) = outcome.allocations
    assert allocation.warehouse_id == UUID(int=2)


def test_what_no_warehouse_has_whole_ships_from_as_few_as_possible() -> None:
    stock = [on(HAMBURG, 3, 1), on(LYON, 4, 2), on(WARSAW, 6, 3)]
    outcome = allocate([Wanted(PRODUCTS[0], 10)], stock, PARIS)
    assert isinstance(outcome, Reserved)
    assert {(a.warehouse_id.int, a.quantity) for a in outcome.allocations} == {(3, 6), (2, 4)}


@given(degrees, degrees)
def test_distance_is_symmetric_and_at_most_half_around_the_earth(
    one: tuple[float, float], other: tuple[float, float]
) -> None:
    there, back = distance(*one, *other), distance(*other, *one)
    assert there == pytest.approx(back, abs=1e-6)
    assert 0 <= there <= 20_016
    assert distance(*one, *one) == 0


def test_hamburg_and_lyon_are_about_945_km_apart() -> None:
    assert distance(*HAMBURG, *LYON) == pytest.approx(945, abs=10)
