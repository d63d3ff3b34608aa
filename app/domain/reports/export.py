"""The sales report: what was sold on each day, by product, as a CSV or JSON file in the object storage.

It reads the sales model in pages by key and writes each to a file as it comes, so that memory does not grow with the
period. After each page it says how far it is, and stops if nobody wants it any more.
"""

import asyncio
import csv
import io
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sqlalchemy import BigInteger, Row, cast, func, select, tuple_

from app.core import wire
from app.domain.catalog.tables import products
from app.domain.reports.jobs import Job, Jobs
from app.domain.reports.tables import sales
from app.scaling.database import Database
from app.scaling.storage import Storage

LONGEST_DAYS = 366
PAGE = 1000  # rows: about 100 KB of a file, and milliseconds of a replica
COLUMNS = ("day", "product_id", "sku", "name", "orders", "quantity", "amount", "currency")
FORMATS = {"csv": "text/csv", "json": "application/json"}


@dataclass(frozen=True, slots=True)
class Period:
    """Days in UTC, both included, and the format of the file."""

    first: date
    last: date
    format: str

    @property
    def days(self) -> int:
        """How many days it has."""
        return (self.last - self.first).days + 1

    def to_json(self) -> dict[str, str]:
        """Return the parameters of the job."""
        return {"from": self.first.isoformat(), "to": self.last.isoformat(), "format": self.format}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Period":
        """Read the parameters of a job."""
        return cls(date.fromisoformat(value["from"]), date.fromisoformat(value["to"]), value["format"])


class SalesExport:
    """Makes sales reports.

    Args:
        database: its catalog database has the sales.
        storage: takes the files.
        jobs: is told how far it is.
    """

    def __init__(self, database: Database, storage: Storage, jobs: Jobs) -> None:
        self._database = database
        self._storage = storage
        self._jobs = jobs

    async def make(self, job: Job) -> None:
        """Do the job, from its beginning, unless it has ended.

        Raises:
            Unavailable: the database or the object storage does not answer; do it again later.
        """
        period = Period.from_json(job.parameters)
        with TemporaryDirectory(prefix="report-") as folder:
            path = Path(folder) / "report"
            if not await self._written(job, period, path):
                return
            key = f"reports/{job.id}.{period.format}"
            await self._storage.put_file(key, path, FORMATS[period.format])
        if not await self._jobs.finish(job.id, key):
            await self._storage.delete(key)

    async def _written(self, job: Job, period: Period, path: Path) -> bool:
        """Write the file; False if nobody wants it any more."""
        told = -1
        with path.open("wb") as file:
            write = _Lines(period.format)
            async for day, rows in self._pages(period):
                await asyncio.to_thread(file.write, write.page(rows))
                # 100 is for a file that is stored.
                progress = min(99, 100 * ((day - period.first).days + 1) // period.days)
                if progress > told:
                    told = progress
                    if not await self._jobs.advance(job.id, progress):
                        return False
            file.write(write.end())
        return True

    async def _pages(self, period: Period) -> AsyncIterator[tuple[date, Sequence[Row[Any]]]]:
        """Yield each day's rows, a page at a time; a day without sales has an empty page."""
        for number in range(period.days):
            day = period.first + timedelta(days=number)
            after: tuple[Any, ...] | None = None
            while True:
                rows = await self._page(day, after)
                yield day, rows
                if len(rows) < PAGE:
                    break
                after = (rows[-1].product_id, rows[-1].currency)

    async def _page(self, day: date, after: tuple[Any, ...] | None) -> Sequence[Row[Any]]:
        sold = (
            select(
                sales.c.day,
                sales.c.product_id,
                func.count().label("orders"),
                cast(func.sum(sales.c.quantity), BigInteger).label("quantity"),
                cast(func.sum(sales.c.amount), BigInteger).label("amount"),
                sales.c.currency,
            )
            .where(sales.c.day == day, sales.c.quantity > 0)
            .group_by(sales.c.day, sales.c.product_id, sales.c.currency)
            .order_by(sales.c.product_id, sales.c.currency)
            .limit(PAGE)
        )
        if after is not None:
            sold = sold.where(tuple_(sales.c.product_id, sales.c.currency) > tuple_(*after))
        page = sold.subquery()
        return await self._database.reader().all(
            select(page, products.c.sku, products.c.name)
            .join(products, products.c.id == page.c.product_id)
            .order_by(page.c.product_id, page.c.currency)
        )


class _Lines:
    """Turns pages of rows into the bytes of a file of one format."""

    def __init__(self, file_format: str) -> None:
        self._json = file_format == "json"
        self._begun = False

    def page(self, rows: Sequence[Row[Any]]) -> bytes:
        """Return the bytes of the next page."""
        values = [[_plain(getattr(row, name)) for name in COLUMNS] for row in rows]
        if self._json:
            objects = [wire.encode(dict(zip(COLUMNS, each, strict=True))) for each in values]
            opening = b"" if self._begun else b"["
            joint = b",\n" if self._begun and objects else b""
            self._begun = self._begun or bool(objects)
            return (opening if objects else b"") + joint + b",\n".join(objects)
        text = io.StringIO()
        writer = csv.writer(text)
        if not self._begun:
            writer.writerow(COLUMNS)
            self._begun = True
        writer.writerows([[_harmless(each) for each in line] for line in values])
        return text.getvalue().encode()

    def end(self) -> bytes:
        """Return what the file ends with."""
        if not self._json:
            return b""
        return b"]\n" if self._begun else b"[]\n"


def _plain(value: Any) -> int | str:
    return value if isinstance(value, int) else str(value)


def _harmless(value: Any) -> Any:
    """Keep a spreadsheet from running a product's name as a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
