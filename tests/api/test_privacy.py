"""What a customer does leaves nothing personal and no secret in any log of any process."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from conftest import PASSWORD, Customer, until

from deploy.local.cluster import Cluster


@pytest.mark.sabotage(
    "app/api/middleware.py", '"status": outgoing.status}', '"status": outgoing.status, "seen": str(scope["headers"])}'
)
async def test_no_log_holds_a_secret_or_personal_data(
    cluster: Cluster,
    new_customer: Callable[..., Awaitable[Customer]],
    new_product: Callable[..., Awaitable[dict[str, Any]]],
) -> None:
    name, bio = f"Zaphod {uuid4().hex}", f"about me {uuid4().hex}"
    customer, product = await new_customer(name=name, bio=bio), await new_product()
    order = (await customer.order(product["id"])).raise_for_status().json()
    await customer.invoiced(order["id"])
    # What is refused is logged too.
    wrong = f"wrong {uuid4().hex}"
    credentials = {"email": customer.email, "password": wrong}
    assert (await customer.client.post("/api/v1/sessions", json=credentials)).status_code == 401
    assert (await customer.client.get("/api/v1/profiles", params={"name_prefix": name})).is_success
    assert (await customer.client.post("/api/v1/profiles", json={"email": customer.email, "name": 7})).is_client_error
    request_id = f"privacy-{uuid4().hex}"
    await customer.client.get("/api/v1/profiles/me", headers={"X-Request-ID": request_id})

    logs = {process.name: Path(process.log) for process in cluster.processes}

    async def logged() -> bool:
        return any(request_id in log.read_text(errors="replace") for log in logs.values())

    await until(logged)
    secrets = [cluster.environment["SECRET_KEY"], customer.token, PASSWORD, wrong]
    found = {
        (process, text)
        for process, log in logs.items()
        for text in (*secrets, customer.email, name, bio)
        if text in log.read_text(errors="replace")
    }
    assert not found
