"""What is left when everything has come to rest, read around the service: its database, the ledger, the mailbox.

A customer expects that an order that was confirmed is charged, invoiced and mailed once; a warehouse that what was sold
is gone from the shelf; an operator that nothing was given up and that no process holds more than before.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import asyncpg
import httpx
import psutil

from deploy.chaos.load import STOCK, Load
from deploy.chaos.stage import INSTANCES, Stage

# Of our processes; servers keep what they like.
WATCHED = (*INSTANCES, "relay-1", "worker-1")
# What a process may hold more than before: a pool that had room, a client of the balancer that keeps its connection
# open. A leak of one for each request of a fault is hundreds.
SPARE_FILES = 40
SPARE_TASKS = 15

_ORDERS = """
    SELECT id::text, step, amount, invoice_key FROM orders WHERE profile_id::text = ANY($1)
"""


@dataclass(frozen=True, slots=True)
class Holdings:
    """Open files and connections of each of our processes, and the tasks of each instance."""

    files: dict[str, int]
    tasks: dict[str, int]

    def more_than(self, before: "Holdings") -> list[str]:
        """Return in words who holds more than before, past what is spare."""
        return [
            f"{name} holds {now} {what} and held {then[name]} before"
            for what, held, then, spare in (
                ("files and connections", self.files, before.files, SPARE_FILES),
                ("tasks", self.tasks, before.tasks, SPARE_TASKS),
            )
            for name, now in held.items()
            if now > then[name] + spare
        ]


class Audit:
    """Looks at what `load` has left on `stage`.

    Args:
        stage: its servers are asked at their own addresses.
        load: whose orders.
    """

    def __init__(self, stage: Stage, load: Load) -> None:
        self._stage = stage
        self._load = load
        self._mailed: Counter[str] = Counter()

    async def open_messages(self) -> int:
        """Return how many messages of the outbox are not done."""
        return int(await self._ask("SELECT count(*) FROM outbox WHERE done_at IS NULL"))

    async def problems(self, *, mails_may_repeat: bool) -> list[str]:
        """Return in words what is not as it should be; mails of before are not looked at again."""
        found = []
        rows = await self._rows(_ORDERS, [buyer.session.profile_id for buyer in self._load.buyers])
        ledger = await self._ledger()
        mailed = await self._mails()
        for order, step, amount, invoice in rows:
            if step != "confirmed":
                found.append(f"order {order} is {step}")
            if (charge := ledger.get(order)) != (1, 1, amount, 0, "captured"):
                found.append(f"order {order} of {amount} is in the ledger as {charge}")
            if not invoice:
                found.append(f"order {order} has no invoice")
            times = mailed[order]
            if order not in self._mailed and (times != 1 if not mails_may_repeat else times < 1):
                found.append(f"order {order} was mailed {times} times")
        self._mailed = mailed
        free = await self._ask("SELECT available FROM products WHERE id::text = $1", self._load.product_id)
        shelf = await self._ask("SELECT sum(free) FROM stock WHERE product_id::text = $1", self._load.product_id)
        if not free == shelf == STOCK - len(rows):
            found.append(f"{len(rows)} of {STOCK} are sold, {free} are for sale and {shelf} on the shelf")
        numbers = [int(number.rpartition("-")[2]) for (number,) in await self._rows("SELECT number FROM invoices")]
        if sorted(numbers) != list(range(1, len(numbers) + 1)):
            found.append(f"the {len(numbers)} invoices are not numbered from 1 on without a gap")
        if letters := await self._rows("SELECT task, error FROM dead_letters"):
            found.append(f"{len(letters)} tasks were given up, such as {tuple(letters[0])}")
        return found

    async def holdings(self) -> Holdings | None:
        """Return what our processes hold now; None while one of them is down or starts."""
        files, tasks = {}, {}
        try:
            for name in WATCHED:
                pid = self._stage.pid(name)
                if pid is None:
                    return None
                files[name] = psutil.Process(pid).num_fds()
            async with httpx.AsyncClient() as client:
                for name in INSTANCES:
                    told = (await client.get(f"{self._stage.address(name)}/metrics")).raise_for_status().text
                    tasks[name] = int(float(re.findall(r"^asyncio_tasks (\S+)$", told, re.MULTILINE)[0]))
        except (psutil.NoSuchProcess, httpx.TransportError):
            return None
        return Holdings(files, tasks)

    async def _ledger(self) -> dict[str, tuple[int, int, int, int, str]]:
        """Return for each order how many payments and charges it has, what was captured and refunded, and its state."""
        async with httpx.AsyncClient() as client:
            entries = (await client.get(f"{self._stage.address('payments')}/ledger")).raise_for_status().json()
        times = Counter(entry["reference"] for entry in entries.values())
        return {
            entry["reference"]: (
                times[entry["reference"]],
                entry["charges"],
                entry["captured"],
                entry["refunded"],
                entry["status"],
            )
            for entry in entries.values()
        }

    async def _mails(self) -> Counter[str]:
        """Return how often each order's confirmation is in the mailbox: its Message-ID is `kind.order@…`."""
        async with httpx.AsyncClient() as client:
            address = self._stage.cluster.process("smtp").http_address
            items = (await client.get(f"{address}/messages")).raise_for_status().json()["items"]
        return Counter(item["message_id"].strip("<>").partition("@")[0].rpartition(".")[2] for item in items)

    async def _ask(self, statement: str, *arguments: Any) -> Any:
        rows = await self._rows(statement, *arguments)
        return rows[0][0] if rows else None

    async def _rows(self, statement: str, *arguments: Any) -> list[Any]:
        connection = await asyncpg.connect(self._stage.address("primary"))
        try:
            rows: list[Any] = await connection.fetch(statement, *arguments)
        finally:
            await connection.close()
        return rows
