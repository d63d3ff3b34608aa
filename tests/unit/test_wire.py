"""JSON as sent: UTC with a Z, the drivers' own UUID classes, and no surprise strings. Plus the work at hand."""

import asyncio
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from asyncpg.pgproto.pgproto import UUID as DriverId  # noqa: N811  # a class, whatever its name
from hypothesis import given
from hypothesis import strategies as st

from app.core import context, wire

LONGEST_REQUEST_ID = "A.b_c-" + "9" * 58


@pytest.mark.sabotage(path="app/core/wire.py", take_out="orjson.OPT_UTC_Z | (", put="0 | (")
def test_times_are_utc_with_a_z() -> None:
    assert wire.encode(datetime(2026, 11, 21, 12, 30, tzinfo=UTC)) == b'"2026-11-21T12:30:00Z"'


@pytest.mark.sabotage(path="app/core/wire.py", take_out="isinstance(value, UUID)", put="value is UUID")
def test_the_drivers_own_uuid_is_an_id_like_any_other() -> None:
    identifier = uuid4()
    assert wire.encode([identifier]) == wire.encode([DriverId(str(identifier))]) == f'["{identifier}"]'.encode()


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", Decimal("1.5"), timedelta(1), 2**70, {UUID(int=1): {1}}])
def test_what_json_cannot_say_raises(value: Any) -> None:
    with pytest.raises(TypeError):
        wire.encode({"value": value})


@given(st.dictionaries(st.text(max_size=5), st.integers(-(2**53), 2**53), max_size=8))
def test_equal_values_are_equal_bytes_when_sorted(value: dict[str, int]) -> None:
    turned = dict(reversed(value.items()))
    assert wire.encode(value, sort=True) == wire.encode(turned, sort=True)
    assert wire.decode(wire.encode(value)) == value


@pytest.mark.parametrize("incoming", ["12345678", "a" * 64, "req-1234.5_6", LONGEST_REQUEST_ID])
def test_a_sane_request_id_is_kept(incoming: str) -> None:
    assert context.request_id_from(incoming) == incoming


@pytest.mark.sabotage(
    path="app/core/context.py", take_out="if incoming and SANE_REQUEST_ID.fullmatch(incoming)", put="if incoming"
)
@pytest.mark.parametrize(
    "incoming",
    [None, "", "short", "a" * 65, "has space", "line\nbreak", "tab\there1", 'quote"quote', "ünïcödé1", "12345678\n"],
)
def test_an_insane_request_id_is_replaced(incoming: str | None) -> None:
    made = context.request_id_from(incoming)
    assert made != incoming
    assert context.SANE_REQUEST_ID.fullmatch(made)


def test_a_position_is_only_ever_raised() -> None:
    work = context.Work("test-1234")
    for position in (5, 9, 7):
        work.reached(0, position)
    work.reached(1, 3)
    assert work.positions == {0: 9, 1: 3}


async def test_concurrent_works_do_not_see_each_other() -> None:
    met = asyncio.Barrier(2)

    async def one(name: str) -> str:
        with context.working(context.Work(name)):
            await met.wait()
            return context.current().request_id

    outside = context.current().request_id
    assert await asyncio.gather(one("first-12"), one("second-1")) == ["first-12", "second-1"]
    assert context.current().request_id == outside


async def test_what_is_left_until_the_deadline_is_never_negative() -> None:
    now = asyncio.get_running_loop().time()
    assert context.Work("test-1234", deadline=now - 5).remaining(3.0) == 0.0
    assert 50 < context.Work("test-1234", deadline=now + 60).remaining(3.0) <= 60
    assert context.Work("test-1234").remaining(3.0) == 3.0


def test_time_in_a_layer_adds_up_and_the_last_answer_stands() -> None:
    work = context.Work("test-1234")
    with work.timed("db", "replica-1"):
        pass
    first = work.spans["db"].milliseconds
    with work.timed("db", "primary") as span:
        span.milliseconds += 10
    assert work.spans["db"].description == "primary"
    assert work.spans["db"].milliseconds >= first + 10
