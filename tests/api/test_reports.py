"""Reports: asked for by administrators, made in the background, fetched behind a short link, cancelled."""

import csv
import io
import json
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import httpx
import pytest
from conftest import Customer, until
from expectations import check_problem

Make = Callable[..., Awaitable[Customer]]
NewProduct = Callable[..., Awaitable[dict[str, Any]]]
JOBS = "/api/v1/jobs"


def asked(**fields: Any) -> dict[str, Any]:
    return {"kind": "sales", "from": "2026-01-01", "to": "2026-01-31", **fields}


async def ask(admin: Customer, **fields: Any) -> dict[str, Any]:
    answer = await admin.client.post("/api/v1/reports", json=asked(**fields))
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"{JOBS}/{job['job_id']}"
    assert (job["status"], job["result_url"]) == ("processing", None)
    return job


async def done(admin: Customer, job: dict[str, Any]) -> dict[str, Any]:
    async def ended() -> dict[str, Any] | None:
        found = (await admin.client.get(f"{JOBS}/{job['job_id']}")).raise_for_status().json()
        return found if found["status"] != "processing" else None

    found = await until(ended)
    assert (found["status"], found["progress"]) == ("done", 100)
    return found


async def test_what_was_sold_today_is_in_the_report(
    admin: Customer, new_customer: Make, new_product: NewProduct, client: httpx.AsyncClient
) -> None:
    # A spreadsheet must not take the name of a product for a formula.
    product, customer = await new_product(name="=1+1 lamp"), await new_customer()
    order = (await customer.order(product["id"], 3)).json()
    await customer.invoiced(order["id"])
    today = order["created_at"].partition("T")[0]  # which may be over by now

    async def line() -> dict[str, Any] | None:
        job = await done(admin, await ask(admin, **{"from": today, "to": f"{today}T23:59:59+00:00"}))
        file = await client.get(job["result_url"])
        assert file.headers["content-type"].startswith("text/csv")
        rows = {row["product_id"]: row for row in csv.DictReader(io.StringIO(file.text))}
        return rows.get(product["id"])

    assert await until(line) == {
        "day": today,
        "product_id": product["id"],
        "sku": product["sku"],
        "name": "'=1+1 lamp",
        "orders": "1",
        "quantity": "3",
        "amount": str(3 * product["price"]["amount"]),
        "currency": "EUR",
    }
    job = await done(admin, await ask(admin, **{"from": today, "to": today, "format": "json"}))
    found = [
        row for row in json.loads((await client.get(job["result_url"])).text) if row["product_id"] == product["id"]
    ]
    assert [(row["quantity"], row["name"]) for row in found] == [(3, "=1+1 lamp")]


async def test_days_without_sales_are_an_empty_report(admin: Customer, client: httpx.AsyncClient) -> None:
    dates = {"from": "2001-01-01", "to": "2001-12-31"}
    job = await done(admin, await ask(admin, **dates))
    assert (await client.get(job["result_url"])).text.splitlines()[1:] == []
    job = await done(admin, await ask(admin, **dates, format="json"))
    assert (await client.get(job["result_url"])).json() == []


async def test_a_job_that_has_ended_cannot_be_cancelled(admin: Customer) -> None:
    job = await done(admin, await ask(admin))
    check_problem(await admin.client.post(f"{JOBS}/{job['job_id']}/cancel"), 409, "not_cancellable")
    check_problem(await admin.client.post(f"{JOBS}/{uuid4()}/cancel"), 404, "not_found")
    check_problem(await admin.client.get(f"{JOBS}/{uuid4()}"), 404, "not_found")


@pytest.mark.sabotage(
    "app/api/reports.py", "async def get(job_id: UUID, _admin: AdminCaller,", "async def get(job_id: UUID,"
)
async def test_reports_are_for_administrators(admin: Customer, new_customer: Make, client: httpx.AsyncClient) -> None:
    job, customer = await ask(admin), await new_customer()
    check_problem(await customer.client.post("/api/v1/reports", json=asked()), 403, "forbidden")
    check_problem(await customer.client.get(f"{JOBS}/{job['job_id']}"), 403, "forbidden")
    check_problem(await customer.client.post(f"{JOBS}/{job['job_id']}/cancel"), 403, "forbidden")
    check_problem(await client.get(f"{JOBS}/{job['job_id']}"), 401, "unauthenticated")


@pytest.mark.parametrize(
    ("fields", "pointers"),
    [
        ({"kind": "costs"}, ["/kind"]),
        ({"kind": None}, ["/kind"]),
        ({"from": "2026-02-30"}, ["/from"]),
        ({"from": 20260101}, ["/from"]),
        ({"from": "2026-01-01T00:00:00"}, ["/from"]),
        ({"from": "0001-01-01T00:00:00+23:00"}, ["/from"]),
        ({"from": ["2026-01-01"]}, ["/from"]),
        ({"to": None}, ["/to"]),
        ({"to": "x" * 5000}, ["/to"]),
        ({"to": "2025-12-31"}, ["/to"]),
        ({"to": "2027-01-02"}, ["/to"]),
        ({"format": "xlsx"}, ["/format"]),
        ({"first": "2026-01-01"}, ["/first"]),
    ],
)
async def test_a_bad_report_names_the_field(admin: Customer, fields: dict[str, Any], pointers: list[str]) -> None:
    check_problem(await admin.client.post("/api/v1/reports", json=asked(**fields)), 422, "invalid", *pointers)
