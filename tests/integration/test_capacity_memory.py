"""What the capacity model takes a session and a cached value to weigh, held to what they weigh in a real Redis."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from conftest import Customer

from app.wiring import Resources
from deploy.capacity import model

DOZEN = 12


@pytest.mark.sabotage("deploy/capacity/model.py", "CALLER_BYTES = 2_000", "CALLER_BYTES = 200")
async def test_a_caller_and_a_cached_value_weigh_no_more_than_a_plan_takes_them_to(
    new_customer: Callable[..., Awaitable[Customer]], resources: Resources
) -> None:
    customer = await new_customer()
    products: list[dict[str, Any]] = (await customer.client.get("/api/v1/products?limit=20")).json()["items"]
    for product in products[:DOZEN]:
        assert (await customer.client.get(f"/api/v1/products/{product['id']}")).is_success
    assert (await customer.client.get(f"/api/v1/profiles/{customer.profile['id']}")).is_success
    async with resources.redis.calling("test") as redis:

        async def weights(*patterns: str) -> list[int]:
            keys = [key for pattern in patterns async for key in redis.scan_iter(pattern, count=10_000)]
            return [await redis.memory_usage(key, samples=0) or 0 for key in keys]

        own = await weights(f"*{customer.profile['id']}*")
        values = await weights("product:*", "list:*", "search:*")
    assert len(own) > 1
    assert len(values) > DOZEN
    assert sum(own) <= model.CALLER_BYTES
    assert sum(values) / len(values) <= model.VALUE_BYTES
