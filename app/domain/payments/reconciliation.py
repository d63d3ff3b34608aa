"""Compares our payments with the provider's, attempt by attempt, and says what differs; it mends nothing by itself.

Every authorisation has an attempt that was committed before it was asked for, so going through the attempts misses no
money. What is younger than `ON_ITS_WAY` may still be moving and is left for the next time.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Row, select, tuple_

from app.core.telemetry import PAYMENT_DIFFERENCES, logger
from app.domain.payments.attempts import attempt_from, payment_attempts
from app.domain.payments.rules import Attempt, difference
from app.domain.payments.service import Payments
from app.scaling.database import Database, Reader

log = logger(__name__)

# The longest that a task waits before it tries again, many times over: what still differs then differs for good.
ON_ITS_WAY = timedelta(minutes=10)
# Compared hourly, a day and a bit: each payment often enough that a missed run misses none.
PERIOD = timedelta(hours=26)
PAGE = 500
# Questions at a time: half of the places that payments have at the provider, the other half is for customers.
AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Difference:
    """One payment on which we and the provider differ, and in what."""

    attempt: Attempt
    words: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """How many payments were compared, and those that differ."""

    compared: int
    differences: tuple[Difference, ...]


async def reconcile(
    database: Database, payments: Payments, *, period: timedelta = PERIOD, on_its_way: timedelta = ON_ITS_WAY
) -> Comparison:
    """Compare every payment that moved in the `period` before now and is not `on_its_way`.

    Raises:
        Unavailable: if the provider or a database does not answer; nothing is said then.
    """
    until = datetime.now(UTC) - on_its_way
    compared = 0
    differences: list[Difference] = []
    for reader, own in await database.everywhere(payment_attempts.c.profile_id):
        async for attempts in _pages(reader, own, until - period, until):
            for start in range(0, len(attempts), AT_ONCE):
                some = attempts[start : start + AT_ONCE]
                found = await asyncio.gather(*(payments.find(attempt) for attempt in some))
                compared += len(some)
                for attempt, held in zip(some, found, strict=True):
                    words = difference(attempt, held)
                    if words:
                        differences.append(Difference(attempt, words))
                        log.error(
                            "payment differs",
                            order_id=str(attempt.order_id),
                            attempt_id=str(attempt.id),
                            difference=words,
                        )
    PAYMENT_DIFFERENCES.set(len(differences))
    return Comparison(compared, tuple(differences))


async def _pages(
    reader: Reader, own: ColumnElement[bool], since: datetime, until: datetime
) -> AsyncIterator[list[Attempt]]:
    key = (payment_attempts.c.updated_at, payment_attempts.c.profile_id, payment_attempts.c.id)
    statement = select(payment_attempts).where(key[0] >= since, key[0] <= until, own).order_by(*key).limit(PAGE)
    rows: Any = await reader.all(statement)
    while rows:
        yield [attempt_from(row) for row in rows]
        last: Row[Any] = rows[-1]
        rows = await reader.all(statement.where(tuple_(*key) > tuple_(last.updated_at, last.profile_id, last.id)))
