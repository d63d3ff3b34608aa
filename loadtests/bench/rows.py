"""The limit of placing an order: a bare program that writes the rows of an order by asyncpg, with the same one commit.

    python -m loadtests.bench.rows SECONDS TASKS

Like most programs it sends BEGIN, an INSERT for each table, and COMMIT. It speaks no HTTP, knows no caller, prices and
validates nothing. As JSON it prints how many orders it wrote in a second (`rate`), and the microseconds of its own CPU
that each took (`cpu`).
"""

import asyncio
import json
import os
import sys
from time import perf_counter, process_time
from typing import Any
from uuid import UUID

import asyncpg
import uvloop

from app.core.ids import new_id

_ORDER = """
    INSERT INTO orders
        (profile_id, id, step, amount, currency, payment_method, history, version, created_at, updated_at)
    VALUES ($1, $2, 'placed', 1999, 'EUR', 'tok_ok', '[["processing", "2026-11-21T09:13:34.123Z"]]', 1, now(), now())
"""
_ITEM = """
    INSERT INTO order_items (profile_id, order_id, line, product_id, sku, name, quantity, unit_amount)
    VALUES ($1, $2, 0, $2, 'LAMP-0001', 'Lamp', 1, 1999)
"""
_KEY = """
    INSERT INTO idempotency_keys (profile_id, route, key, fingerprint, reply, created_at)
    VALUES ($1, 'orders.place', $2, repeat('0', 64), $3, now())
"""
_MESSAGE = """
    INSERT INTO outbox (profile_id, id, event, subject_id, payload, request_id, created_at, due_at, tries)
    VALUES ($1, $3, 'order.placed', $2, '{"status": "processing", "sequence": 1, "version": 1}', $4, now(), now(), 0)
"""
# As long as what the service keeps to say it again.
_MONEY = {"amount": 1999, "currency": "EUR"}
_LINE = {"product_id": str(UUID(int=0)), "sku": "LAMP-0001", "name": "Oak lamp", "quantity": 1, "unit_price": _MONEY}
_REPLY = {
    "id": str(UUID(int=0)),
    "status": "processing",
    "items": [_LINE | {"amount": _MONEY}],
    "total": _MONEY,
    "payment_method": "tok_ok",
    "history": [{"status": "processing", "at": "2026-11-21T09:13:34.123Z"}],
    "invoice_url": None,
    "created_at": "2026-11-21T09:13:34.123456Z",
    "updated_at": "2026-11-21T09:13:34.123456Z",
}
# As many connections as an instance has for its writes.
_CONNECTIONS = 5


async def write(pool: Any, owner: UUID, until: float) -> int:
    """Write one order after the other until that moment, and return how many."""
    count = 0
    while perf_counter() < until:
        order, message = new_id(owner), new_id(owner)
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute(_KEY, owner, str(order), json.dumps(_REPLY))
            await connection.execute(_ORDER, owner, order)
            await connection.execute(_ITEM, owner, order)
            await connection.execute(_MESSAGE, owner, order, message, message.hex)
        count += 1
    return count


async def main(seconds: float, tasks: int) -> dict[str, float]:
    """Return orders a second, and microseconds of CPU an order."""
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=_CONNECTIONS, max_size=_CONNECTIONS) as pool:
        started, spent = perf_counter(), process_time()
        written = sum(await asyncio.gather(*(write(pool, new_id(), started + seconds) for _ in range(tasks))))
        return {
            "rate": written / (perf_counter() - started),
            "cpu": (process_time() - spent) / written * 1e6,
        }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(uvloop.run(main(float(sys.argv[1]), int(sys.argv[2])))))
