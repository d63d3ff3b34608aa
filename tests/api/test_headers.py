"""Headers that every answer has, through NGINX, and what they say of who answered."""

import re
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from conftest import Customer
from expectations import check_problem

Make = Callable[..., Awaitable[Customer]]
NewProduct = Callable[..., Awaitable[dict[str, Any]]]
EVERYWHERE = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
}


@pytest.mark.sabotage("app/api/security.py", '    (b"x-content-type-options", b"nosniff"),\n', "")
@pytest.mark.parametrize(
    "path",
    ["/health/live", "/api/v1/products", "/api/v1/nothing", "/api/v1/profiles/me", "/api/v1/products?limit=0", "/docs"],
)
async def test_every_answer_is_safe_to_show_and_names_its_request(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(path, headers={"X-Request-ID": "my-own-request-1"})
    assert answer.headers["x-request-id"] == "my-own-request-1"
    assert re.fullmatch(r"api-\d", answer.headers["x-instance"])
    assert EVERYWHERE.items() <= dict(answer.headers).items()
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["cache-control"]


async def test_what_nginx_refuses_itself_is_a_problem_too(client: httpx.AsyncClient) -> None:
    check_problem(await client.get("/api/v1/profiles/%00"), 400, "bad_request")
    check_problem(await client.get("/" + "x" * 9000), 414, "uri_too_long")
    check_problem(await client.get("/", headers={"X-Long": "x" * 40_000}), 431, "headers_too_large")


@pytest.mark.sabotage("deploy/nginx/nginx.conf.template", "location ~ ^/metrics(/|$) {", "location ~ ^/nothing(/|$) {")
async def test_metrics_are_not_for_the_outside(client: httpx.AsyncClient) -> None:
    check_problem(await client.get("/metrics"), 404, "not_found")


async def test_server_timing_says_which_layer_answered(client: httpx.AsyncClient, new_product: NewProduct) -> None:
    product = await new_product()
    cached = await client.get(f"/api/v1/products/{product['id']}")
    assert re.fullmatch(r'cache;desc="l2";dur=\d+\.\d', cached.headers["server-timing"])
    missed = await client.get("/api/v1/products/01900000-0000-8000-8000-000000000000")
    assert re.fullmatch(
        r'cache;desc="(miss|l2)";dur=\d+\.\d(, db;desc="(replica-\d|primary)";dur=\d+\.\d)?',
        missed.headers["server-timing"],
    )


async def test_only_writes_give_a_consistency_token(client: httpx.AsyncClient, new_customer: Make) -> None:
    customer = await new_customer()
    path = f"/api/v1/profiles/{customer.profile['id']}"
    changed = await customer.client.patch(path, json={"bio": "x"}, headers={"If-Match": '"v1"'})
    assert changed.headers["consistency-token"]
    assert "consistency-token" not in (await customer.client.get(path)).headers
    refused = await customer.client.patch(path, json={"bio": "x"}, headers={"If-Match": '"v1"'})
    check_problem(refused, 412, "version_mismatch")
    assert "consistency-token" not in refused.headers
    forged = {"Consistency-Token": changed.headers["consistency-token"][:-1] + "A"}
    check_problem(await client.get(path, headers=forged), 400, "invalid_consistency_token", "header/Consistency-Token")


async def test_allow_names_every_method_of_the_path(client: httpx.AsyncClient) -> None:
    answer = await client.put("/api/v1/products/01900000-0000-8000-8000-000000000000")
    check_problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "GET, HEAD, PATCH"
    answer = await client.delete("/api/v1/profiles")
    assert answer.headers["allow"] == "GET, HEAD, POST"
