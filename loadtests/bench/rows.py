"""The limit of placing an order: a bare program that writes the rows of an order by asyncpg, with the same one commit.

    python -m loadtests.bench.rows SECONDS TASKS

It speaks no HTTP, knows no caller, prices and validates nothing, and prints how many orders it wrote in a second.
"""

import asyncio
import os
import sys
from time import perf_counter
from typing import Any
from uuid import UUID

import asyncpg
import uvloop

from app.core.ids import new_id

_ORDER = """
    INSERT INTO orders
        (profile_id, id, step, amount, currency, payment_method, history, version, created_at, updated_at)
    VALUES ($1, $2, 'placed', 1999, 'EUR', 'tok_ok', '[{"status": "processing"}]', 1, now(), now())
"""
_ITEM = """
    INSERT INTO order_items (profile_id, order_id, line, product_id, sku, name, quantity, unit_amount)
    VALUES ($1, $2, 0, $2, 'LAMP-0001', 'Lamp', 1, 1999)
"""
_KEY = """
    INSERT INTO idempotency_keys (profile_id, route, key, fingerprint, reply, created_at)
    VALUES ($1, 'placeOrder', $2::text, repeat('0', 64), '{"status": "processing"}', now())
"""
_MESSAGE = """
    INSERT INTO outbox (profile_id, id, event, subject_id, payload, request_id, created_at, due_at, tries)
    VALUES ($1, $2, 'order.placed', $2, '{"status": "processing"}', 'bench', now(), now(), 0)
"""
# As many connections as an instance has for its writes.
_CONNECTIONS = 5


async def write(pool: Any, owner: UUID, until: float) -> int:
    """Write one order after the other until that moment, and return how many."""
    count = 0
    while perf_counter() < until:
        order = new_id(owner)
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute(_KEY, owner, str(order))
            await connection.execute(_ORDER, owner, order)
            await connection.execute(_ITEM, owner, order)
            await connection.execute(_MESSAGE, owner, order)
        count += 1
    return count


async def main(seconds: float, tasks: int) -> float:
    """Return orders a second."""
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=_CONNECTIONS, max_size=_CONNECTIONS) as pool:
        started = perf_counter()
        counts = await asyncio.gather(*(write(pool, new_id(), started + seconds) for _ in range(tasks)))
        return sum(counts) / (perf_counter() - started)


if __name__ == "__main__":
    sys.stdout.write(str(uvloop.run(main(float(sys.argv[1]), int(sys.argv[2])))))
